"""The sources of all kernels: what Metal would take, and that nothing stays in memory."""

import mlx.core as mx
import pytest

from ksa_mlx.attention.kernel import Variant, decode_kernel
from ksa_mlx.attention.prefill import layout, prefill_kernel
from ksa_mlx.cache.storage import PLAIN, Affine, Segment

from . import metal_cpu
from ._kernels import DTYPES, run
from .metal_cpu import lint

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))


def every_kernel(dtype, dim, slots):
    """Call each kernel in each of its forms."""
    dtype = DTYPES[dtype]

    def zeros(heads, n):
        return mx.zeros((1, heads, n, dim), dtype=dtype)

    cache = zeros(1, slots)
    plain = Segment(cache, cache, 0, 1, PLAIN)
    for heads, rows, splits in ((1, 1, 1), (1, 8, 1), (4, 8, 1), (1, 1, 2)):
        variant, seen = Variant(0, splits), [(0, 1)] * rows
        decode_kernel(zeros(heads, rows), [[plain]], [[seen]], variant)
        if dim % 32 == 0:
            packed, wide = (mx.quantize(cache, group_size=32, bits=bits) for bits in (4, 8))
            split = Segment(packed, wide, 0, 1, Affine(4, 32, 8))
            decode_kernel(zeros(heads, rows), [[split]], [[seen]], variant)
            both = [[Segment(wide, wide, 0, 1, Affine(8, 32)), plain]] * 3
            q = mx.zeros((3, heads, rows, dim), dtype=dtype)
            decode_kernel(q, both, [[seen] * 2] * 3, variant)
    where = layout([9], [0], [0], [1], 4, 1, 2)
    prefill_kernel(zeros(1, 9), zeros(1, 9), zeros(1, 9), cache, cache, where)


LINTED = [("float32", 32, 16), ("bfloat16", 128, 300), ("float16", 256, 300), ("bfloat16", 80, 16)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, dim, slots", LINTED)
def test_lint(monkeypatch, dtype, dim, slots):
    """Metal would take the sources; no input is so small that MLX passes it as `constant`."""
    seen = set()

    def check(self, *, inputs, output_shapes, output_dtypes, template, **_):
        kernel = self.for_types(inputs, output_dtypes, template)
        if kernel not in seen:
            seen.add(kernel)
            assert lint.problems(kernel) == []
        assert not any(a.what == "data" and " constant " in a.declaration for a in kernel.arguments)
        return [mx.zeros(s, dtype=d) for s, d in zip(output_shapes, output_dtypes, strict=False)]

    monkeypatch.setattr(metal_cpu.metal_kernel, "__call__", check)
    with run():
        every_kernel(dtype, dim, slots)
    names = {k.name for k in seen}
    assert names >= {"ksa_decode_1_plain", "ksa_combine", "ksa_prefill"}
