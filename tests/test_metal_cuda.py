"""The kernels' sources also compile for NVIDIA's GPUs; nothing is run there. See metal_cuda/README.md."""

import ctypes
import re

import mlx.core as mx
import numpy as np
import pytest

from ksa_mlx.attention import metal
from ksa_mlx.attention.kernel import Variant, decode_kernel
from ksa_mlx.attention.prefill import layout, prefill_kernel
from ksa_mlx.cache.storage import PLAIN, Affine, Segment

from . import metal_cpu, metal_cuda
from .metal_cuda import gpu, stand_in

pytestmark = pytest.mark.skipif(
    metal_cuda.unavailable() is not None, reason=str(metal_cuda.unavailable())
)


def collect(calls):
    """The KernelSources that calls() launches, each once, by entry point."""
    seen = {}

    def launch(source, buffers, outputs, record):
        seen[metal_cuda.entry(source)] = source
        for output in outputs:
            output[...] = 0

    with stand_in.running(launch, reload=[metal]):
        calls()
    return seen


def some_of_each():
    """Decode with few rows, with many, and split; quantised; prefill."""

    def zeros(dtype, heads, n, dim):
        return mx.zeros((1, heads, n, dim), dtype=dtype)

    for dtype, dim, heads, rows, splits in (
        (mx.float32, 64, 1, 1, 1),
        (mx.bfloat16, 128, 4, 8, 1),
        (mx.float16, 80, 4, 1, 2),
    ):
        cache = zeros(dtype, 1, 32, dim)
        one = Segment(cache, cache, 0, 8, PLAIN)
        decode_kernel(zeros(dtype, heads, rows, dim), [[one]], variant=Variant(0, splits))
    x = zeros(mx.float16, 1, 32, 128)
    wide, narrow = (Segment(*(mx.quantize(x, 64, n),) * 2, 0, 8, Affine(n, 64)) for n in (8, 4))
    for first in (wide, Segment(x, x, 0, 8, PLAIN)):
        decode_kernel(x[:, :, :1], [[first, narrow]])
    where = layout([9], [0], [0], [1], 4, 1, 2)
    for dtype, dim in ((mx.float32, 64), (mx.bfloat16, 256)):
        x = zeros(dtype, 1, 9, dim)
        prefill_kernel(x, x, x, x, x, where)


@pytest.mark.slow
def test_kernels_compile():
    sources = collect(some_of_each)
    ptx = metal_cuda.ptx(metal_cuda.cuda_source(sources.values()))
    found = dict(re.findall(r"\.entry (\w+)\(([^)]*)\)", ptx))
    assert set(found) == set(sources)
    bodies = dict(zip(found, re.split(r"\.entry ", ptx)[1:], strict=False))
    for name, source in sources.items():
        assert found[name].count(".param") == len(source.arguments)
        body, combine = bodies[name], source.name == "ksa_combine"
        assert ("bar.sync" in body) == ("shfl.sync" in body) == (not combine)
        assert ("vote.sync.any" in body) == source.name.startswith("ksa_decode")
        assert "st.global" in body


def one(body):
    """The KernelSource of a kernel with this body, whose input has 64 numbers."""

    def call():
        kernel = mx.fast.metal_kernel(
            name="one", input_names=["x"], output_names=["out"], source=body
        )
        kernel(
            inputs=[mx.arange(64, dtype=mx.float32)],
            grid=(64, 2, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(64,)],
            output_dtypes=[mx.float32],
        )

    return collect(call).values()


def test_what_cuda_does_not_know_is_refused():
    with pytest.raises(metal_cuda.CompileError, match=r"one\(1\): error: .*simd_prefix_sum"):
        metal_cuda.ptx(metal_cuda.cuda_source(one("out[0] = simd_prefix_sum(x[0]);")))
    with pytest.raises(NotImplementedError, match="grid_origin"):
        metal_cuda.cuda_source(one("out[0] = x[grid_origin.x];"))


@pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))
def test_matrix_products_by_shuffles():
    """matrix.h gives what the instrument's simdgroup matrices give."""
    body = """
      const int lane = thread_index_in_simdgroup;
      simdgroup_float8x8 m[3];
      float2 parts[3];
      for (int i = 0; i < 3; i++) {
        simdgroup_load(m[i], x + i * 64, 8);
        parts[i] = float2(m[i].thread_elements()[0], m[i].thread_elements()[1]);
      }
      const float2 by_shuffles = matrix_multiply(parts[0], parts[1], parts[2], lane);
      simdgroup_multiply_accumulate(m[2], m[0], m[1], m[2]);
      for (int i = 0; i < 2; i++) {
        out[lane * 4 + i] = by_shuffles[i];
        out[lane * 4 + 2 + i] = m[2].thread_elements()[i];
      }
    """
    library = (metal_cuda.gen.HERE / "matrix.h").read_text()
    header = f"#include <metal_simdgroup_matrix>\nusing namespace metal;\n{library}"
    x = np.random.default_rng(0).integers(-50, 50, size=(3, 8, 8))
    with metal_cpu.running():
        kernel = mx.fast.metal_kernel(
            name="shuffles", input_names=["x"], output_names=["out"], source=body, header=header
        )
        (out,) = kernel(
            inputs=[mx.array(x.astype(np.float32))],
            grid=(32, 1, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(32, 2, 2)],
            output_dtypes=[mx.float32],
        )
    assert mx.array_equal(out[:, 0], out[:, 1])
    assert sorted(np.array(out[:, 0]).ravel()) == sorted((x[0] @ x[1] + x[2]).ravel())


def test_a_launch_calls_the_driver(monkeypatch):
    """Which calls a launch makes, with a driver that does nothing."""
    calls = []

    class Driver:
        def __getattr__(self, name):
            return lambda *arguments: calls.append((name, arguments)) or 0

    monkeypatch.setattr(gpu, "_driver", Driver)
    monkeypatch.setattr(gpu, "_context", lambda: "sm_80")
    kernel = mx.fast.metal_kernel
    with stand_in.running(gpu.launch):
        (out,) = mx.fast.metal_kernel(
            name="two", input_names=["x"], output_names=["out"], source="out[0] = bfloat16_t(x[0]);"
        )(
            inputs=[mx.arange(64, dtype=mx.float32)],
            grid=(64, 2, 1),
            threadgroup=(32, 1, 1),
            output_shapes=[(5,)],
            output_dtypes=[mx.bfloat16],
        )
    assert mx.fast.metal_kernel is kernel
    assert out.shape == (5,) and mx.isnan(out).all()  # still poisoned
    names = [name for name, _ in calls]
    assert names == (
        ["cuModuleLoadData", "cuModuleGetFunction"]
        + ["cuMemAlloc_v2", "cuMemcpyHtoD_v2"] * 2
        + ["cuLaunchKernel", "cuCtxSynchronize", "cuMemcpyDtoH_v2"]
        + ["cuMemFree_v2"] * 2
    )
    sizes = [a[-1].value for name, a in calls if name.startswith("cuMemcpy")]
    assert sizes == [256, 10, 10]
    (launch,) = (a for name, a in calls if name == "cuLaunchKernel")
    assert launch[1:7] == (2, 2, 1, 32, 1, 1)
    assert len(launch[-2]) == 2 and isinstance(launch[-2][0], int)
    assert b".entry cuda_custom_kernel_two" in calls[0][1][1]
    assert isinstance(launch[0], ctypes.c_void_p)
