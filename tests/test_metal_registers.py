"""The kernels' private arrays are registers: all loops over them are unrolled."""

import mlx.core as mx
import pytest

from ksa_mlx.attention import metal
from ksa_mlx.attention.kernel import Variant, decode_kernel
from ksa_mlx.attention.prefill import layout, prefill_kernel
from ksa_mlx.cache.storage import PLAIN, Affine, Segment

from . import metal_cpu
from .metal_cpu import registers
from .test_metal_cuda import collect

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

BODY = """    float sums[16];
    KEEP
    for (int i = 0; i < 16; i++) sums[i] = x[i];
    for (int k = 0; k < x_shape[0]; k++) {
        KEEP
        for (int i = 0; i < 16; i++) sums[i] = simd_sum(sums[i] * x[k]);
    }
    KEEP
    for (int i = 0; i < 16; i++) out[i] = sums[i];"""


@pytest.mark.parametrize("unroll, left", [("full", []), ("disable", ["[16 x float]"])])
def test_an_array_that_stays_is_found(unroll, left):
    header = f'#define KEEP _Pragma("clang loop unroll({unroll})")\n'
    kernel = metal_cpu.metal_kernel("planted", ["x"], ["out"], BODY, header)
    assert registers.in_memory(kernel.for_types([mx.zeros((64,))], [mx.float32], [])) == left


def launches(dim: int):
    """Each shape of decode's threadgroups for this head_dim, and prefill."""

    def zeros(heads, n):
        return mx.zeros((1, heads, n, dim), dtype=mx.float16)

    x = zeros(1, 32)
    packed = {bits: mx.quantize(x, group_size=32, bits=bits) for bits in (4, 8)}
    for heads, rows in ((1, 1), (2, 1), (4, 1), (16, 8)):
        one = Segment(x, x, 0, 8, PLAIN)
        for splits in (1, 2):
            decode_kernel(zeros(heads, rows), [[one]], variant=Variant(0, splits))
        both = [Segment(packed[n], packed[n], 0, 8, Affine(n, 32)) for n in (8, 4)]
        decode_kernel(zeros(heads, rows), [both])
    prefill_kernel(x, x, x, x, x, layout([32], [0], [0], [1], 4, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_kernels_keep_nothing_in_memory(dim):
    sources = collect(lambda: launches(dim)).values()
    names = {source.name for source in sources}
    assert names >= {"ksa_decode_1_plain", "ksa_combine", "ksa_prefill"}
    for source in sources:
        assert registers.in_memory(source) == [], (source.name, source.template)


@pytest.mark.slow
def test_without_the_pragmas_they_would():
    def changed():
        read = metal.source
        metal.source = lambda name: read(name).replace("KSA_UNROLL\n", "\n")
        launches(128)

    left = {x for source in collect(changed).values() for x in registers.in_memory(source)}
    assert '%"struct.ksa::Rows"' in left and any("simdgroup_matrix" in x for x in left)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dim, group", [(64, 4), (80, 4), (128, 4), (256, 4)])
def test_a_key_of_decode_needs_few_registers(dim, group, bits):
    """110 live floats and more halved MLX's bandwidth on an M1 Ultra (MLX#3837)."""
    if dim % 64 and bits < 16:
        pytest.skip("mlx has no such groups")
    x = mx.zeros((1, 1, 32, dim), dtype=mx.float16)
    held, form = x, PLAIN
    if bits < 16:
        held, form = mx.quantize(x, group_size=64, bits=bits), Affine(bits, 64)
    queries = mx.zeros((1, group, 1, dim), dtype=mx.float16)
    one = Segment(held, held, 0, 9, form)
    (source,) = collect(lambda: decode_kernel(queries, [[one]])).values()
    assert 40 < registers.live_floats(source) <= 100
