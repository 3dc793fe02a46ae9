"""The Metal instrument itself: it wraps kernels as MLX does, computes what Metal does."""

import mlx.core as mx
import numpy as np
import pytest

from . import metal_cpu
from ._planted import floats, rng, run, same
from .metal_cpu import wrap

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))


# ---- wrapping


@pytest.mark.parametrize("template", [None, [("T", mx.bfloat16), ("N", 3), ("B", True)]])
@pytest.mark.parametrize("atomic_outputs", [False, True])
def test_source_is_what_mlx_makes(template, atomic_outputs, tmp_path, capfd):
    """MLX prints the source of a kernel also without Metal, while it exports a function."""
    body = """
        uint i = thread_position_in_grid.x + threads_per_threadgroup.x * simdgroup_index_in_threadgroup;
        out[i] = half(x[i]) * s + y[0] + x_shape[0] + y_strides[0] + y_ndim;
        out2[i] = i;"""
    made = {
        "name": "example",
        "input_names": ["x", "s", "y"],
        "output_names": ["out", "out2"],
        "source": body,
        "header": "#define ONE 1\n",
        "atomic_outputs": atomic_outputs,
    }
    x, s, y, dtypes = (
        mx.zeros((2, 8), dtype=mx.bfloat16),
        mx.array(1.0),
        mx.zeros((3,), dtype=mx.bool_),
        [mx.float16, mx.uint32],
    )
    kernel = mx.fast.metal_kernel(**made)

    def call(*inputs):
        shapes, size = [(8,), (8,)], (8, 1, 1)
        return kernel(
            inputs=inputs,
            template=template,
            grid=size,
            threadgroup=size,
            output_shapes=shapes,
            output_dtypes=dtypes,
            verbose=True,
        )

    mx.export_function(str(tmp_path / "kernel.mlxfn"), call, x, s, y)
    printed = capfd.readouterr().out.split("```\n")[1]
    ours = wrap.metal_source(metal_cpu.metal_kernel(**made).for_types([x, s, y], dtypes, template))
    assert ours.strip() == printed.strip()


def test_shapes_strides_and_copies():
    x = floats(5, 7).T
    source = """
        uint i = thread_position_in_grid.x;
        out[i] = x[(i / x_shape[1]) * x_strides[0] + (i % x_shape[1]) * x_strides[1]] + x_ndim;"""
    logs = []
    for contiguous, copies in ((True, {"x": 140}), (False, {})):
        same(
            run(source, x, shapes=[(7, 5)], threads=35, ensure_row_contiguous=contiguous, log=logs),
            x + 2,
        )
        assert logs[-1].copies == copies
    cache = mx.zeros((1, 2, 16, 4))
    run("out[0] = x[0];", cache[..., :8, :], shapes=[(1,)], threads=1, log=logs)
    assert logs[-1].copies == {"x": 2 * 8 * 4 * 4}
    run("out[0] = x[0];", cache, shapes=[(1,)], threads=1, log=logs)
    assert logs[-1].copies == {}


def test_threadgroups_at_the_edge_of_the_grid():
    x = floats(44)
    out = run("uint i = thread_position_in_grid.x; out[i] = simd_sum(x[i]) + 1000 * threads_per_threadgroup.x;",
              mx.ones(44), shapes=[(44,)], threads=44, group=32)  # fmt: skip
    same(out, np.where(np.arange(44) < 32, 32 + 32000, 12 + 12000))
    grid = run(
        "uint3 p = thread_position_in_grid; uint3 t = threadgroup_position_in_grid;"
        "out[(p.z * threads_per_grid.y + p.y) * threads_per_grid.x + p.x] = t.x + 10 * t.y + 100 * t.z + x[0] * 0;",
        x, shapes=[(2, 3, 5)], threads=(5, 3, 2), group=(4, 2, 1),
    )  # fmt: skip
    z, y, x = np.meshgrid(range(2), range(3), range(5), indexing="ij")
    same(grid, x // 4 + 10 * (y // 2) + 100 * z)


def test_argument_errors_are_those_of_mlx():
    message = "Expected `inputs` to have size 1 but got size 0"
    with metal_cpu.running(), pytest.raises(ValueError, match=message):
        mx.fast.metal_kernel("k", ["x"], ["out"], "")(
            inputs=[],
            output_shapes=[(1,)],
            output_dtypes=[mx.float32],
            grid=(1, 1, 1),
            threadgroup=(1, 1, 1),
        )
    with pytest.raises(ValueError, match="greater than"):
        run("out[0] = x[0];", floats(8), threads=2048)
    with pytest.raises(metal_cpu.CompileError, match=r"planted:1:.*undeclared"):
        run("out[0] = x[0] + nobody;", floats(8))


def test_patches_are_undone():
    before = mx.fast.metal_kernel, mx.metal.is_available, mx.default_device
    with metal_cpu.running():
        assert mx.metal.is_available() and mx.default_device() == mx.gpu
    assert (mx.fast.metal_kernel, mx.metal.is_available, mx.default_device) == before


# ---- what Metal computes

LANES = np.arange(32)
SIMD_OPERATIONS = {
    "simd_sum(v)": lambda v: np.full(32, v.sum()),
    "simd_product(v > 0 ? 2.0f : 1.0f)": lambda v: np.full(32, 2.0 ** (v > 0).sum()),
    "simd_max(v)": lambda v: np.full(32, v.max()),
    "simd_min(v)": lambda v: np.full(32, v.min()),
    "simd_prefix_inclusive_sum(v)": lambda v: v.cumsum(),
    "simd_prefix_exclusive_sum(v)": lambda v: v.cumsum() - v,
    "simd_shuffle(v, ushort(31 - lane))": lambda v: v[::-1],
    "simd_shuffle_xor(v, 5)": lambda v: v[LANES ^ 5],
    "simd_shuffle_down(v, 3)": lambda v: np.where(LANES + 3 < 32, v[(LANES + 3) % 32], v),
    "simd_shuffle_up(v, 3)": lambda v: np.where(LANES >= 3, v[LANES - 3], v),
    "simd_shuffle_rotate_down(v, 3)": lambda v: np.roll(v, -3),
    "simd_shuffle_rotate_up(v, 3)": lambda v: np.roll(v, 3),
    "simd_shuffle_and_fill_up(v, 100.0f, 2)": lambda v: np.r_[100, 100, v[:-2]],
    "simd_shuffle_and_fill_down(v, 100.0f, 2)": lambda v: np.r_[v[2:], 100, 100],
    "simd_broadcast(v, 7)": lambda v: np.full(32, v[7]),
    "simd_broadcast_first(v)": lambda v: np.full(32, v[0]),
    "quad_sum(v)": lambda v: v.reshape(8, 4).sum(1).repeat(4),
    "quad_max(v)": lambda v: v.reshape(8, 4).max(1).repeat(4),
    "quad_broadcast(v, 2)": lambda v: v[2::4].repeat(4),
    "quad_shuffle_xor(v, 1)": lambda v: v[LANES ^ 1],
    "float(popcount(uint(ulong(simd_ballot(v > 0)))))": lambda v: np.full(32, (v > 0).sum()),
    "float(simd_any(v > 8))": lambda v: np.full(32, (v > 8).any()),
    "float(simd_all(v > -10))": lambda v: np.full(32, (v > -10).all()),
    "float(simd_or(1u << (lane % 8)))": lambda v: np.full(32, 255),
    "simd_sum(float2(v, 1.0f)).y": lambda v: np.full(32, 32),
}


def test_simd_operations():
    v = rng.integers(-9, 9, 64).astype(np.float32)
    lines = "\n".join(f"p[{i}] = {operation};" for i, operation in enumerate(SIMD_OPERATIONS))
    n = len(SIMD_OPERATIONS)
    source = f"""
        uint lane = thread_index_in_simdgroup;
        float v = x[thread_position_in_grid.x];
        device float* p = out + thread_position_in_grid.x * {n};
        {lines}"""
    out = np.array(run(source, mx.array(v), shapes=[(2, 32, n)], orders=3))
    for i, (operation, expected) in enumerate(SIMD_OPERATIONS.items()):
        for half in range(2):
            np.testing.assert_array_equal(
                out[half, :, i], expected(v[32 * half : 32 * half + 32]), err_msg=operation
            )


@pytest.mark.quick(2)
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("transpose", [False, True])
def test_simdgroup_matrices(dtype, transpose):
    """A 16x16 product by 4 simdgroups; y goes through padded threadgroup memory, and may be loaded transposed."""
    x, y = floats(16, 16, dtype=dtype), floats(16, 16, dtype=dtype)
    source = """
        uint tile_row = simdgroup_index_in_threadgroup / 2, tile_column = simdgroup_index_in_threadgroup % 2;
        threadgroup T padded[16 * 20];
        for (uint i = thread_index_in_threadgroup; i < 256; i += 128) padded[(i / 16) * 20 + i % 16] = y[i];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_matrix<T, 8, 8> a, b;
        simdgroup_float8x8 sum = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
        for (uint k = 0; k < 2; k++) {
            simdgroup_load(a, x, 16, ulong2(k * 8, tile_row * 8));
            const threadgroup T* tile = padded + (TRANSPOSE ? tile_column * 160 + k * 8 : k * 160 + tile_column * 8);
            simdgroup_load(b, tile, 20, ulong2(0, 0), TRANSPOSE);
            simdgroup_multiply_accumulate(sum, a, b, sum);
        }
        simdgroup_store(sum, out + tile_row * 128 + tile_column * 8, 16);
        float2 mine = float2(sum.thread_elements());
        out2[thread_index_in_threadgroup] = mine.x + mine.y;"""
    log = []
    template = [("T", dtype), ("TRANSPOSE", transpose)]
    out, pairs = run(
        source,
        x,
        y,
        shapes=[(16, 16), (128,)],
        dtypes=[mx.float32] * 2,
        threads=128,
        template=template,
        orders=3,
        log=log,
    )
    a, b = np.array(x.astype(mx.float32)), np.array(y.astype(mx.float32))
    expected = a @ (b.T if transpose else b)
    np.testing.assert_allclose(np.array(out), expected, rtol=1e-5, atol=1e-5)
    # The lanes' layout: two neighbours in a row, rows and columns interleaved in blocks of 4x4.
    lane = LANES
    row, column = (lane // 4 & 4) + lane // 2 % 4, (lane // 4 & 2) * 2 + lane % 2 * 2
    tiles = np.array(out).reshape(2, 8, 2, 8).swapaxes(1, 2).reshape(4, 8, 8)
    np.testing.assert_allclose(
        np.array(pairs).reshape(4, 32),
        tiles[:, row, column] + tiles[:, row, column + 1],
        rtol=1e-5,
        atol=1e-6,
    )
    assert (log[0].matrix_loads, log[0].matrix_multiplies, log[0].matrix_stores) == (16, 8, 4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_types_round_after_every_operation(dtype):
    x = floats(64, dtype=dtype)
    source = (
        "uint i = thread_position_in_grid.x; T a = x[i]; T b = a * a; out[i] = b + a / T(3.0f);"
    )
    for contract in ("off", "fast"):
        same(
            run(source, x, dtypes=[dtype], template=[("T", dtype)], contract=contract),
            x * x + x / mx.array(3.0, dtype),
        )


def test_bfloat_narrows_explicitly_only():
    x = floats(64, dtype=mx.bfloat16)
    with pytest.raises(metal_cpu.CompileError, match="no viable conversion"):
        run(
            "bfloat16_t a = x[0] * 1.5f; out[thread_position_in_grid.x] = a;",
            x,
            dtypes=[mx.bfloat16],
        )


def test_contraction_and_noise():
    x, y = floats(64), floats(64)
    source = "uint i = thread_position_in_grid.x; out[i] = x[i] * y[i] + 0.1f;"
    a, b, c = np.array(x), np.array(y), np.float32(0.1)
    same(run(source, x, y), a * b + c)
    same(run(source, x, y, contract="fast"), (a.astype(np.float64) * b + c).astype(np.float32))

    source = "uint i = thread_position_in_grid.x; out[i] = fast::exp(x[i]); out2[i] = precise::exp(x[i]) + exp(x[i]);"
    both = {"shapes": [(64,), (64,)], "dtypes": [mx.float32] * 2}
    exact, exact2 = (np.array(v) for v in run(source, x, **both))
    np.testing.assert_allclose(exact, np.exp(a.astype(np.float64)), rtol=1.2e-7)
    noisy, noisy2 = (np.array(v) for v in run(source, x, fast_noise=3, **both))
    ulps = noisy.view(np.int32) - exact.view(np.int32)
    assert set(ulps) == set(range(-3, 4)) and (noisy2 == exact2).all()


def test_vectors():
    x = floats(16, 4)
    source = """
        uint i = thread_position_in_grid.x;
        const device float4* rows = (const device float4*)x;
        float4 v = rows[i];
        half4 h = half4(v.wzyx);
        v.xy = v.zw;
        float4 w = float4(v.xy * 1.0f, 1.0f, 2.0f) * 2.0f;
        v.zw += 1.0f - v.zw;
        v.zw = v.xy;
        out[i] = dot(rows[i], float4(h)) + w.x + w[3] + float(as_type<uint>(1.0f) == 0x3f800000u) + max(v, w).z;"""  # v is now zwzw
    r = np.array(x)
    w = np.c_[r[:, 2:] * 2, np.full(16, 2), np.full(16, 4)]
    expected = (
        (r * r[:, ::-1].astype(np.float16)).sum(1)
        + w[:, 0]
        + w[:, 3]
        + 1
        + np.maximum(r[:, 2], w[:, 2])
    )
    log = []
    np.testing.assert_allclose(
        np.array(run(source, x, shapes=[(16,)], threads=16, log=log)), expected, rtol=1e-5
    )
    assert log[0].buffers["x"].distinct_elements == 64


def test_atomics_and_init_value():
    x = mx.array(rng.integers(0, 18, 64).astype(np.int32))
    source = (
        "atomic_fetch_add_explicit(&out[x[thread_position_in_grid.x]], 1, memory_order_relaxed);"
    )
    out = run(
        source,
        x,
        shapes=[(18,)],
        dtypes=[mx.int32],
        group=32,
        atomic_outputs=True,
        init_value=0,
        orders=3,
    )
    same(out, np.bincount(np.array(x), minlength=18))
    x = floats(64)
    same(
        run(
            "out[thread_position_in_grid.x] += x[thread_position_in_grid.x];",
            x,
            group=32,
            init_value=1,
        ),
        x + 1,
    )


def test_integer_and_bool_types():
    for dtype in (
        mx.bool_,
        mx.int8,
        mx.uint8,
        mx.int16,
        mx.uint16,
        mx.int32,
        mx.uint32,
        mx.int64,
        mx.uint64,
    ):
        x = mx.array(rng.integers(0, 100, 64)).astype(dtype)
        out = run("uint i = thread_position_in_grid.x; out[i] = x[63 - i];", x, dtypes=[dtype])
        same(out, x[::-1])
        assert out.dtype == dtype


def test_counts():
    """64 threads reduce 4 rows of 128 elements, and read the first element of y once each."""
    source = """
        uint i = thread_position_in_threadgroup.x;
        threadgroup float parts[64];
        const device float4* rows = (const device float4*)x;
        float4 v = rows[threadgroup_position_in_grid.x * 32 + i % 32];
        parts[i] = v.x + v.y + v.z + v.w + y[0];
        threadgroup_barrier(mem_flags::mem_threadgroup);
        simdgroup_barrier(mem_flags::mem_none);
        float sum = simd_sum(parts[i]);
        if (i == 0) out[threadgroup_position_in_grid.x] = sum;"""
    x, y, log = floats(8, 128), floats(16), []
    out = run(source, x, y, shapes=[(4,)], threads=256, group=64, log=log)
    np.testing.assert_allclose(
        np.array(out), np.array(x)[:4].sum(1) + 32 * y[0].item(), rtol=1e-4, atol=1e-4
    )
    launch = log[0]
    assert (
        launch.threadgroups,
        launch.threadgroup_barriers,
        launch.simdgroup_barriers,
        launch.simd_operations,
    ) == (4, 4, 8, 8)
    assert launch.threadgroup_bytes == 256
    rows = launch.buffers["x"]
    assert (rows.loaded_elements, rows.distinct_elements) == (1024, 512)
    np.testing.assert_array_equal(rows.touched, np.arange(8)[:, None].repeat(128, 1) < 4)
    assert (launch.buffers["y"].loaded_elements, launch.buffers["y"].distinct_elements) == (256, 1)
    assert (launch.buffers["out"].stored_elements, launch.buffers["out"].stored_bytes) == (4, 16)


@pytest.mark.parametrize(
    "source",
    [
        "threadgroup float a = 1.0f;",
        "threadgroup float a[4] = {1.0f};",
        "if (x[0] > 0) threadgroup float a[4];",
    ],
)
def test_threadgroup_variables_are_statements(source):
    with pytest.raises(SyntaxError, match="line 1: write a threadgroup variable"):
        run(source, floats(8))


def test_threadgroup_variables_are_found():
    source = """
        // threadgroup float in a comment[3];
        threadgroup float a[2][4], b;
        threadgroup metal::vec<half, 4> c[8];
        { threadgroup uchar d[N * 2]; threadgroup float* p = &a[0][0]; const threadgroup float& q = b; }
        threadgroup_barrier(mem_flags::mem_threadgroup);"""
    placed = wrap.place_threadgroup_variables(source, "[{type}|{name}]")
    for variable in (
        "[float[2][4]|a]",
        "[float|b]",
        "[metal::vec<half, 4>[8]|c]",
        "[uchar[N * 2]|d]",
    ):
        assert variable in placed
    assert placed.count("threadgroup float") == 2 and "comment" not in placed
    assert placed.count("\n") == source.count("\n")
