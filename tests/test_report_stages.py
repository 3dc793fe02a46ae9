"""The report's Metal stages on stand-ins, and the costs of instructions in the instrument."""

import mlx.core as mx
import pytest

from ksa_mlx.attention import choice, decode, metal, prefill, record, trial
from ksa_mlx.benchmark import models as benchmark_models
from ksa_mlx.report import costs, kernels, models
from ksa_mlx.report.stage import Options

from . import metal_cpu
from ._made_up_mac import MAC

CPU = Options(False, 4 << 30)


def test_costs_are_relative():
    found = {
        "fma": {"ns": 2.0},
        "exp2": {"ns": 10.0},
        "8x8 product": {"ns": 36.0},
        "simd_sum": {"error": "x"},
    }
    assert costs.relative(found) == {"fma": 1.0, "exp2": 4.0, "8x8 product": 18.0}
    assert costs.lines(found) == ["fma 1.0, exp2 4.0, 8x8 product 18.0"]
    assert costs.lines({"exp2": {"ns": 3.0}}) == []
    assert costs.cases(CPU) == {} and list(costs.cases(MAC)) == list(costs.OPERATIONS)


KINDS = {
    "simd_sum": "reductions", "simd_shuffle by lane": "lane_shuffles", "simd_shuffle_xor": "shuffles",
    "simd_broadcast": "broadcasts", "exp2": "exponentials", "8x8 product": "matrix_multiplies",
}  # fmt: skip


@pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))
@pytest.mark.parametrize("name", costs.OPERATIONS)
def test_a_cost_is_of_what_it_says(name):
    """In the instrument: no fault, nothing that Metal refuses, and so many of its kind alone."""
    op, rounds = list(costs.OPERATIONS).index(name), 3
    start = mx.random.uniform(shape=(512,), key=mx.random.key(0))
    with metal_cpu.running(reload=[metal], lint=True, orders=2, pretend_gpu=False) as log:
        out = costs.run(op, rounds, start)
    assert mx.isfinite(out).all()
    for kind in KINDS.values():
        count = getattr(log.last, kind)
        assert count == (512 // 32 * 16 * rounds if KINDS.get(name) == kind else 0), kind


def test_a_cost_is_a_difference(monkeypatch):
    """What a launch costs by itself is in both, and falls out."""
    seen = []
    monkeypatch.setattr(costs, "run", lambda op, rounds, start: seen.append(rounds) or mx.zeros(1))
    took = {"once": choice.np.array([5.0]), "twice": choice.np.array([7.0])}
    monkeypatch.setattr(
        costs, "in_turns", lambda runs, *_: [run() for run in runs.values()] and took
    )
    assert costs.measure(1)["ns"] == pytest.approx(2e9 / (16 * costs.ROUNDS))
    assert seen == [costs.ROUNDS, 2 * costs.ROUNDS]


@pytest.fixture
def small(monkeypatch):
    """Kernels are operations that were given other names, shapes are small, nothing is known."""
    monkeypatch.setattr(kernels, "KV_HEADS", 1)
    monkeypatch.setattr(kernels, "GROUP", 2)
    monkeypatch.setattr(choice, "CHAIN_BYTES", 1 << 20)
    monkeypatch.setattr(choice, "TURNS", 2)
    monkeypatch.setattr(choice, "can_time", lambda: True)
    monkeypatch.setattr(choice, "_taken", {})
    monkeypatch.setattr(choice, "_retuned", set())
    known = record.Record(None, "here")
    monkeypatch.setattr(record, "here", lambda: known)
    for module in (decode, prefill):
        ours = dict.fromkeys(module.ARMS, module.ARMS[choice.OPERATIONS])
        monkeypatch.setattr(module, "ARMS", ours)


def test_kernels_that_are_right(small, monkeypatch):
    cases = kernels.right_cases(MAC)
    assert 60 <= len(cases) <= 220 and kernels.right_cases(CPU) == {}
    one = "decode kernel, bf16, head_dim 128, plain, rows 1"
    found = {one: cases[one]()}
    assert kernels.is_right(found[one]) and kernels.right_line(one, found[one]) is None
    found["wrong"] = {"off": 0.5, "seconds": 1.0}
    found["broken"] = {"off": "does not run: line 1", "seconds": 1.0}
    found["hung"] = {"error": "took more than 10 s"}
    assert kernels.right_line("wrong", found["wrong"]) == "wrong: off by 0.5"
    assert kernels.right_line("broken", found["broken"]) == "broken: does not run: line 1"
    assert kernels.right_line("hung", found["hung"]) == "hung: took more than 10 s"
    assert kernels.right_lines(found)[0].startswith("1 of 4 compile and are right; off by ")
    assert kernels.right_lines({"hung": found["hung"]}) == ["0 of 1 right"]


def test_decode_and_prefill_are_timed(small):
    cases = kernels.decode_cases(MAC)
    for case in ("bf16, plain, rows 1, 1024 keys", "bf16, 4 bit, rows 1, 1024 keys"):
        found = cases[case]()
        assert set(found["ms"]) >= {"operations", "kernel"}
        assert kernels.timed_line(case, found).count("GB/s") == 2
        assert kernels.ratio(found) > 0
    assert found["bytes"] == 2 * 1024 * (64 + 2 * 2 * 2), "4 bits, and a scale and bias for 64"
    found = kernels.prefilled(kernels.key_of(mx.float32, 128, 16, "plain", 1100, "prefill"), True)
    assert set(found["ms"]) == {"operations", "kernel"} and found["causal"] > 0
    assert ", causal " in kernels.timed_line("x", found)
    assert "bf16, 2048 rows on 17408 keys" in kernels.prefill_cases(MAC)


def test_the_best_kernel_counts():
    found = {"ms": {"operations": 2.0, "kernel": 3.0, "kernel, 2 rows": 1.0}, "bytes": 1e6}
    assert kernels.ratio(found) == 0.5
    assert "kernel, 2 rows 1000 us (1 GB/s): 0.50" in kernels.timed_line("x", found)
    assert kernels.timed_line("x", {"error": "no"}) == "x: no"
    assert kernels.ratio({"ms": {"operations": 2.0}}) is None and kernels.ratio(None) is None


def test_what_is_chosen(small, monkeypatch):
    short = choice.Trial(trial.DECODE.make, checked=(61,), timed=(64, 128))
    monkeypatch.setattr(trial, "DECODE", short)
    monkeypatch.setattr(kernels.tune, "LENGTHS", (64,))
    cases = kernels.choice_cases(MAC)
    attention = cases["MLX's attention"]()
    assert list(attention) == ["64"] and "off by" in kernels.choice_line("x", attention)
    found = cases["decode, plain, rows 1"]()
    assert list(found) == ["64", "128"]
    for name, milliseconds in found.values():
        assert name in decode.ARMS and set(milliseconds) <= set(decode.ARMS)
    assert kernels.choice_line("x", found).startswith("x: 64 ")
    assert kernels.choice_cases(CPU) == {}


@pytest.fixture
def tiny(monkeypatch):
    sizes = benchmark_models.dims(64, 64, 4, 2, 1, 32, 100)
    monkeypatch.setitem(benchmark_models.SHAPES, "tiny", sizes)
    monkeypatch.setattr(models, "shape_of", lambda options: ("tiny", mx.float32, 4))


def test_models_are_timed(tiny):
    found = models.decode(MAC, 1100, 3)
    line = models.line("1100 tokens", found)
    assert line.endswith("in place / in place") and found["ksa"]["step"] > 0
    found = models.batch(MAC, 3, 3)
    assert found["ksa"]["tokens_s"] > 0 and "to build" in models.batch_line("3 rows", found)
    found = models.raised(MAC)
    assert models.raised_line("x", found).startswith("x: in place, ")
    assert models.RAISED_LIMITS.env["MLX_MAX_OPS_PER_BUFFER"] == "1000"
    assert models.raised_cases(CPU) == {}, "a CPU has no command buffers"


def test_a_copy_is_seen(tiny, monkeypatch):
    """Whoever holds a view of a layer makes MLX copy it, as a command buffer in flight does."""
    both = models.models(*models.shape_of(MAC))
    held = models.caches(both, 4000, mx.float32)
    assert not models.over(both["qwen3"], held["qwen3"], 3)["copies"]
    original = models.loop

    def holding(model, cache, rows, steps):
        views = [x[:, :, :1] for c in cache for x in (c.keys, c.values)]
        took = original(model, cache, rows, steps)
        mx.eval(views)
        return took

    monkeypatch.setattr(models, "loop", holding)
    found = models.over(both["qwen3"], held["qwen3"], 3)
    assert found["over"] >= 8 * held["qwen3"][0].keys.nbytes
    assert found["copies"] and models.verdict(found).startswith("copies 4.2 MB a step")


def test_what_has_room(monkeypatch):
    assert models.shape_of(MAC) == ("4b", mx.bfloat16, 4)
    assert models.contexts(MAC) == [1024, 16384, 65536]
    assert models.contexts(Options(True, 12 << 30)) == [1024, 16384]
    assert models.contexts(Options(True, 8 << 30)) == [1024]
    assert models.shape_of(Options(True, 5 << 30))[0] == "small"
    assert models.shape_of(CPU) == ("small", mx.float32, None)
