"""The Metal instrument catches planted faults."""

import re

import mlx.core as mx
import pytest

from . import metal_cpu
from ._planted import floats, run, same

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

# Each is (kind, line of the fault or None, source, arguments); `i` is the thread, `lane` its lane.

REVERSE = """threadgroup float tile[64];
tile[i] = x[i];
{barrier}
out[i] = tile[63 - i];"""
TWICE = (
    REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_threadgroup);")
    + """
{barrier}
tile[i] = 2 * x[i];
threadgroup_barrier(mem_flags::mem_threadgroup);
out[i] += tile[63 - i];"""
)
DEVICE = """out2[i] = x[i];
{barrier}
out[i] = out2[63 - i];"""
TWO = {"shapes": [(64,), (64,)], "dtypes": [mx.float32] * 2}
HELPER = "inline float total(float v) { return simd_sum(v); }\n"
ATOMIC = {"atomic_outputs": True, "init_value": 0, "dtypes": [mx.int32], "shapes": [(65,)]}
LOCKSTEP = {"check": "lockstep"}

# fmt: off
FAULTS = {
    "no barrier": ("uninitialised", 4, REVERSE.format(barrier=""), {}),
    "barrier without flags":
        ("race", 4, REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_none);"), {}),
    "barrier for other memory":
        ("race", 4, REVERSE.format(barrier="threadgroup_barrier(mem_flags::mem_device);"), {}),
    "barrier of a simdgroup only":
        ("race", 4, TWICE.format(barrier="").replace("threadgroup_barrier", "simdgroup_barrier"), {"seed": 3}),
    "no barrier before the second use": ("race", 6, TWICE.format(barrier=""), {}),
    "no barrier within a simdgroup": ("race", 6, TWICE.replace("63 - i", "i ^ 1").format(barrier=""), {}),
    "device memory, wrong flag":
        ("race", 3, DEVICE.format(barrier="threadgroup_barrier(mem_flags::mem_threadgroup);"), TWO),
    "across threadgroups":
        ("uninitialised", 3, DEVICE.format(barrier="threadgroup_barrier(mem_flags::mem_device);"), TWO | {"group": 32}),
    "two writers": ("race", 1, "out[i / 2] = x[i];", {"shapes": [(32,)]}),
    "two writers, threadgroups": ("race", 1, "out[i % 32] = x[0];", {"shapes": [(32,)], "group": 32}),
    "histogram without atomics": ("race", 1, "out[uint(x[i] > 0)] += 1;", {"shapes": [(2,)], "init_value": 0}),

    "read past the end": ("out of bounds", 2, "\nout[i] = x[i + 1];", {}),
    "read before the start": ("out of bounds", 1, "out[i] = x[int(i) - 1];", {}),
    "vector read past the end": ("out of bounds", 1, "out[i] = ((const device float4*)x)[i].x;", {}),
    "write past the end": ("out of bounds", 1, "out[i + 1] = x[0];", {}),
    "atomic past the end":
        ("out of bounds", None, "atomic_fetch_add_explicit(&out[65], 1, memory_order_relaxed);", ATOMIC),
    "index of a threadgroup array":
        ("out of bounds", 2, REVERSE.format(barrier="").replace("tile[i]", "tile[i + 1]"), {}),
    "pointer past a threadgroup array":
        ("out of bounds", 2, REVERSE.format(barrier="").replace("tile[i]", "((threadgroup float*)tile)[i + 1]"), {}),
    "index of a private array": ("out of bounds", 1, "float a[4]; a[i] = x[0]; out[i] = a[0];", {}),
    "component of a vector": ("out of bounds", None, "float4 v = x[0]; out[i] = v[i];", {}),
    "misaligned vector": ("misaligned", 1, "out[i] = (*(const device float4*)(x + 1)).x;", {}),
    "write to an input": ("write to input", 1, "((device float*)x)[0] = 1; out[i] = x[0];", {}),
    "too much threadgroup memory":
        ("threadgroup memory", None, "threadgroup float a[8193]; a[i] = x[0]; out[i] = x[0];", {}),

    "uninitialised threadgroup memory":
        ("uninitialised", 2, "threadgroup float tile[64];\nout[i] = tile[i] + x[i];", {}),
    "left by an earlier threadgroup":
        ("uninitialised", 2, "threadgroup float tile[1]; if (i == 0) tile[0] = x[0];\nout[i] = tile[0];",
         {"threads": 2, "group": 1, "shapes": [(2,)]}),
    "output read before it is written": ("uninitialised", 1, "out[i] += x[0];", {}),
    "unwritten output": ("unwritten", None, "if (i != 5) out[i] = x[0];", {}),

    "index overflow": ("overflow", 1, "out[i] = x[(int(i) * 100000000) & 63];", {}),
    "division by zero": ("overflow", 1, "out[i] = x[1 / (i - 5)];", {}),
    "shift too far": ("overflow", 1, "out[i] = x[i >> (i + 1)];", {}),

    "lanes skip a simd_sum":
        ("divergence", 2, "float v = x[0];\nif (lane != 3) v = simd_sum(v);\nout[i] = v;", {}),
    "lanes in different simd operations":
        ("divergence", 1, "out[i] = lane < 3 ? simd_sum(x[0]) : simd_max(x[0]);", {}),
    "two calls on one line": ("divergence", 1, "out[i] = lane < 3 ? simd_sum(x[0]) : simd_sum(x[1]);", {}),
    "lanes return early": ("divergence", 2, "if (lane > 3) return;\nout[i] = simd_sum(x[0]);", {}),
    "barrier in a branch":
        ("divergence", 1, "if (lane > 3) threadgroup_barrier(mem_flags::mem_none); out[i] = x[0];", {}),
    "simdgroup returns before a barrier":
        ("divergence", 2, "if (i >= 32) return;\nthreadgroup_barrier(mem_flags::mem_none); out[i] = x[0];", {}),
    "simdgroups in different barriers":
        ("divergence", None, ("if (i < 32) threadgroup_barrier(mem_flags::mem_none);\n"
                              "else threadgroup_barrier(mem_flags::mem_none);"), {}),
    "shuffle from a missing lane":
        ("divergence", 1, "out[i] = simd_shuffle_xor(x[0], 16);", {"threads": 44, "shapes": [(44,)]}),
    "matrix in part of a simdgroup":
        ("divergence", 1, "simdgroup_float8x8 m; simdgroup_load(m, x); simdgroup_store(m, out);", {"threads": 16}),
    "one helper, two branches":
        ("divergence", 1, "float v = x[0]; if (lane < 3) v = total(v); else v = total(v + 1); out[i] = v;",
         LOCKSTEP | {"header": HELPER}),
    "lanes skip different iterations":
        ("divergence", 2, ("float v = 0; for (uint k = 0; k < 5; k++) { if (k == lane % 5) continue;\n"
                           "v += simd_sum(x[k]); } out[i] = v;"), LOCKSTEP),
    "lanes skip different iterations of while":
        ("divergence", 2, ("float v = 0; uint k = 0; while (k < 5) { k++; if (k == lane % 5 + 1) continue;\n"
                           "v += simd_sum(x[k]); } out[i] = v;"), LOCKSTEP),

    "order of atomics":
        ("order", None, ("int at = atomic_fetch_add_explicit(&out[0], 1, memory_order_relaxed);\n"
                         "atomic_store_explicit(&out[1 + at], int(i + x[0] * 0), memory_order_relaxed);"),
         ATOMIC | {"orders": 2}),
}
# fmt: on
THREAD = "uint i = thread_position_in_grid.x, lane = thread_index_in_simdgroup; "


@pytest.mark.quick(6)
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_caught(fault):
    kind, line, source, arguments = FAULTS[fault]
    with pytest.raises(metal_cpu.KernelFault) as caught:
        run(THREAD + source, floats(64), **arguments)
    message = str(caught.value)
    assert kind in caught.value.kinds, message
    assert line is None or re.search(rf"planted( header)?:{line}\b", message), message


def test_the_same_kernels_without_their_faults():
    x = floats(64)
    of_threadgroup = "threadgroup_barrier(mem_flags::mem_threadgroup);"
    of_simdgroup = "simdgroup_barrier(mem_flags::mem_threadgroup);"
    of_device = "threadgroup_barrier(mem_flags::mem_device);"
    same(run(THREAD + REVERSE.format(barrier=of_threadgroup), x, orders=5), x[::-1])
    same(run(THREAD + REVERSE.format(barrier=of_threadgroup), x, check="lockstep"), x[::-1])
    same(run(THREAD + TWICE.format(barrier=of_threadgroup), x, orders=5), 3 * x[::-1])
    pairs = x.reshape(32, 2)[:, ::-1].reshape(-1)
    neighbour = REVERSE.replace("63 - i", "i ^ 1").format(barrier=of_simdgroup)
    same(run(THREAD + neighbour, x, orders=5), pairs)
    same(run(THREAD + DEVICE.format(barrier=of_device), x, orders=5, **TWO)[0], x[::-1])
    by_simdgroup = "float v = x[0]; if (i < 32) v = total(v); else v = total(v + 1); out[i] = v;"
    run(THREAD + by_simdgroup, x, header=HELPER, check="lockstep")


def test_orders_alone_find_a_missing_barrier():
    with pytest.raises(
        metal_cpu.KernelFault, match="order: output out depends on the order of threads"
    ):
        run(THREAD + REVERSE.format(barrier=""), floats(64), check=False, orders=2)


def test_equal_writes():
    x = mx.ones(64)
    source = "out[thread_position_in_grid.x / 32] = x[thread_position_in_grid.x];"
    with pytest.raises(metal_cpu.KernelFault, match="race"):
        run(source, x, shapes=[(2,)])
    same(run(source, x, shapes=[(2,)], allow_equal_writes=True), [1, 1])
    with pytest.raises(metal_cpu.KernelFault, match="race"):
        run(source, mx.arange(64).astype(mx.float32), shapes=[(2,)], allow_equal_writes=True)


def test_a_fault_leaves_the_instrument_usable():
    x = floats(64)
    for _ in range(3):
        with pytest.raises(metal_cpu.KernelFault):
            run("out[0] = simd_sum(x[thread_position_in_grid.x + 64]);", x, shapes=[(1,)])
        same(run("out[thread_position_in_grid.x] = x[thread_position_in_grid.x];", x), x)


def test_a_slice_that_is_not_copied_keeps_its_alignment():
    """Rows of 3 floats: from the second row on, a float4 would be misaligned, on a GPU too."""
    x = floats(9, 3)
    source = (
        "out[thread_position_in_grid.x] = ((const device float4*)x)[thread_position_in_grid.x].x;"
    )
    log = []
    same(run(source, x[:8], shapes=[(6,)], threads=6, log=log), x.reshape(-1)[:24:4])
    assert log[0].copies == {}
    with pytest.raises(metal_cpu.KernelFault, match="misaligned"):
        run(source, x[1:], shapes=[(6,)], threads=6)
