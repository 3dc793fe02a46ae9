"""The instrument's counts, on kernels whose counts are known; the sources' form."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from . import kernel_cycles, metal_cpu
from .metal_cpu import live, mix, registers, wrap
from .metal_cpu.launch import OPERATIONS

instrument = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))


def run(body: str, n: int = 64, threads: int = 64, group: int = 64) -> metal_cpu.Launch:
    """One checked launch over x, n random numbers."""
    x = mx.array(np.random.default_rng(0).standard_normal(n).astype(np.float32))
    size = {"grid": (threads, 1, 1), "threadgroup": (group, 1, 1)}
    with metal_cpu.running(orders=2) as log:
        kernel = mx.fast.metal_kernel("counted", ["x"], ["out"], START + body)
        kernel(inputs=[x], output_shapes=[(threads,)], output_dtypes=[mx.float32], **size)
    return log.last


START = """uint i = thread_position_in_grid.x;
ushort lane = ushort(thread_index_in_simdgroup);
float v = x[i % x_shape[0]];
out[i] = v;
"""
ONE = {  # what one simdgroup counts for one statement
    "v += simd_sum(v);": "reductions",
    "v += simd_max(v);": "reductions",
    "v += simd_prefix_inclusive_sum(v);": "reductions",
    "v += quad_sum(v);": "quad_reductions",
    "v += simd_any(v > 0.0f) ? 1.0f : 0.0f;": "votes",
    "v += simd_all(v > 0.0f) ? 1.0f : 0.0f;": "votes",
    "v += float(static_cast<simd_vote::vote_t>(simd_ballot(v > 0.0f)));": "votes",
    "v += simd_broadcast(v, 3);": "broadcasts",
    "v += simd_broadcast_first(v);": "broadcasts",
    "v += simd_shuffle(v, 3);": "broadcasts",
    "v += simd_shuffle(v, ushort(lane ^ 5));": "shuffles",
    "v += simd_shuffle_xor(v, 5);": "shuffles",
    "v += simd_shuffle_down(v, 1);": "shuffles",
    "v += simd_shuffle_rotate_up(v, 1);": "shuffles",
    "v += simd_shuffle_and_fill_up(v, 0.0f, 2);": "shuffles",
    "v += quad_broadcast(v, 1);": "shuffles",
    "v += simd_shuffle(v, ushort(31 - lane + lane / 31));": "lane_shuffles",
    "v += simd_shuffle(v, ushort(lane / 4));": "lane_shuffles",
    "v += simd_shuffle_xor(v, ushort(lane / 16));": "lane_shuffles",
    "v += simd_shuffle_down(v, ushort(lane % 2));": "lane_shuffles",
    "v += fast::exp2(v);": "exponentials",
    "v += precise::exp(v);": "exponentials",
    "v += float(exp2(half(v)));": "exponentials",
}


@instrument
@pytest.mark.parametrize("statement", ONE)
def test_one_operation(statement):
    launch = run(statement + "\nout[i] += v;")
    assert {name: getattr(launch, name) for name in OPERATIONS if getattr(launch, name)} == {
        ONE[statement]: 2  # two simdgroups
    }
    assert launch.simd_operations == (0 if ONE[statement] == "exponentials" else 2)


@instrument
def test_exponentials_are_those_of_a_simdgroup():
    """A branch that one lane takes costs as much as one that all take; a loop, as often as its longest lane."""
    assert run("if (lane == 7) v = fast::exp2(v); out[i] += v;").exponentials == 2
    assert (
        run(
            "if (lane < 4) v = fast::exp2(v); else v = fast::exp(v) + 1.0f; out[i] = v;"
        ).exponentials
        == 4
    )
    assert (
        run("for (int n = 0; n < int(lane); n++) v = fast::exp2(-v); out[i] += v;").exponentials
        == 2 * 31
    )
    again = "v = fast::exp2(-v); simdgroup_barrier(mem_flags::mem_none); v = fast::exp2(-v); out[i] += v;"
    assert run(again).exponentials == 4
    assert run("float4 w = fast::exp2(float4(v)); out[i] += w.x;").exponentials in (2, 8)


@instrument
def test_a_broadcast_from_several_lanes_is_a_fault():
    with pytest.raises(metal_cpu.KernelFault, match="counted:5 ask for different lanes") as fault:
        run("out[i] = simd_broadcast(v, ushort(lane / 16));")
    assert fault.value.kinds == ["divergence"]


PER_KEY = """float sum = 0.0f;
float highest = simd_max(v);
for (int k = 0; k < x_shape[0]; k += 4) {
  float part[4];
  for (int j = 0; j < 4; j++) part[j] = x[k + j] * v;
  sum += simd_sum(part[0] + part[1] + part[2] + part[3]);
  highest = max(highest, simd_shuffle_xor(highest, 1));
  if (k % 8 == 0) sum += fast::exp2(highest);
}
out[i] = sum;
"""


@instrument
def test_per_key():
    short, long = run(PER_KEY, n=64), run(PER_KEY, n=192)
    keys = 128 * 2  # each of two simdgroups sees every key
    counts = metal_cpu.per_key([short], [long], keys)
    expected = {"simd_operations": 0.5, "reductions": 0.25, "shuffles": 0.25, "exponentials": 0.125}
    # x_shape is read again for every 4 keys.
    assert {k: v for k, v in counts.items() if v} == {**expected, "loads": 1.25}


CARRIES = """float sums[16];
#pragma clang loop unroll(full)
for (int j = 0; j < 16; j++) sums[j] = x[j];
const float scale = x[16];
for (int k = 0; k < x_shape[0]; k++) {
  #pragma clang loop unroll(full)
  for (int j = 0; j < 16; j++) sums[j] = simd_sum(sums[j] * x[k]) * scale;
}
float all = 0.0f;
#pragma clang loop unroll(full)
for (int j = 0; j < 16; j++) all += sums[j];
out[i] = all + LATER;
"""


@instrument
@pytest.mark.parametrize("later, carried", [("0.0f", 17), ("x[17]", 17), ("v", 18)])
def test_live_floats(later, carried):
    """16 sums and what scales them; v also, where it is read after the loop."""
    kernel = metal_cpu.metal_kernel("live", ["x"], ["out"], START + CARRIES.replace("LATER", later))
    assert registers.live_floats(kernel.for_types([mx.zeros(64)], [mx.float32], [])) == carried


def test_live_floats_of_text():
    """A value that an inner loop does not touch lives across it all the same; halves count half."""
    ir = """define void @f(i32 %0, half %1) {
  %3 = load <4 x float>, ptr %p, align 4
  %4 = fadd half %1, %1
  br label %5, !dbg !1

5:                                                ; preds = %9, %2
  %6 = phi float [ 0.0, %2 ], [ %10, %9 ]
  %7 = fcmp ogt float %6, 1.0
  br i1 %7, label %8, label %11

8:                                                ; preds = %8, %5
  %x = phi double [ 1.0, %5 ], [ %x, %8 ]
  br i1 %7, label %8, label %9

9:                                                ; preds = %8
  %10 = call float @g(float %6, <4 x float> %3)
  br label %5

11:                                               ; preds = %5
  %12 = fpext half %4 to float
  ret void
}
"""
    # Outer: %3 four, %4 a half, %6 one. Inner: %x two besides.
    assert live.live_floats(ir) == 4 + 0.5 + 1 + 2


RARE = """float sum = 0.0f;
for (int k = 0; k < x_shape[0]; k++) {
  const float y = x[k] * v;
  sum = fast::fma(y, y, sum) * v;
  if (simd_any(y > 3.0f)) {
    sum = (sum * sum + v) * y / sum;
    sum -= simd_sum(sum) + float(as_type<uint>(sum) >> lane);
  }
  sum += float((as_type<uint>(y) >> lane) * 3u + uint(k));
}
out[i] = sum;
"""


@instrument
def test_the_mix_of_the_busiest_loop():
    """What each iteration does: not the branch that it may not take, and nothing of the simd operation's inside."""
    kernel = metal_cpu.metal_kernel("mixed", ["x"], ["out"], START + RARE)
    loop = mix.busiest_loop(registers.optimized(kernel.for_types([mx.zeros(64)], [mx.float32], [])))
    # Products of x and v, of the sum and v; fma; the last addition and its operand's, the next k.
    assert loop == {"arithmetic": 6, "shift": 2, "convert": 1, "branch": 2, "meetings": 1}


def test_cycles():
    """One key as the decode loop for it would count: 32 multiply-adds, 5 shuffles, an exponential for 3."""
    counts = {"arithmetic": 32.0, "broadcasts": 4.0, "shuffles": 1.0, "exponentials": 1 / 3}
    row = kernel_cycles.Row("decode", 512, {**counts, "simd_operations": 5.0}, 82)
    assert row.cycles == pytest.approx(32 + 5 * 2.04 + 4 / 3)
    # M1: 8 cores of 4 schedulers, 1.28 GHz; 68.25 GB/s are 133 million keys a second.
    assert kernel_cycles.CHIPS["M1"].available(512) == pytest.approx(8 * 4 * 1280 / 133.3, rel=1e-3)


# ---- the form of the sources


SOURCES = sorted((Path(__file__).parents[1] / "metal").iterdir())


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_sources_are_ascii(path):
    """MLX hands them to Metal through NSASCIIStringEncoding."""
    text = path.read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if not line.isascii()] == []


def outside_of_namespace(text: str) -> list[str]:
    """Lines of a header that declare something outside of `namespace ksa`, where a name of MLX's could meet it."""
    found, depth, inside = [], 0, False
    for line in wrap.strip_comments(text).splitlines():
        word = line.strip()
        if depth == 0:
            inside = word.startswith("namespace ksa")
            if not inside and word and word[0] != "#" and word != "using namespace metal;":
                found.append(word)
        depth += line.count("{") - line.count("}")
    return found


HEADERS = [path for path in SOURCES if path.suffix == ".h"]


@pytest.mark.parametrize("path", HEADERS, ids=lambda path: path.name)
def test_headers_declare_in_a_namespace(path):
    assert outside_of_namespace(path.read_text(encoding="utf-8")) == []


def test_what_is_outside_of_the_namespace_is_found():
    text = "#include <metal_simdgroup>\nusing namespace metal;\nnamespace ksa {\nint a() { return 1; }\n}  // ksa\n"
    assert outside_of_namespace(text) == []
    assert outside_of_namespace(text + "inline int b() {\n  return 2;\n}\n") == ["inline int b() {"]
