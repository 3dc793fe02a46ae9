"""`python -m ksa_mlx report`: its text and figures, its processes, and its Metal stages on stand-ins."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import pytest

from ksa_mlx.attention import choice, decode, metal, prefill, record, trial
from ksa_mlx.benchmark import models as benchmark_models
from ksa_mlx.report import __main__ as report
from ksa_mlx.report import apart, child, costs, kernels, machine, models, paper
from ksa_mlx.report.stage import Options, Stage
from ksa_mlx.report.stages import STAGES

from . import _made_up_mac, metal_cpu
from ._made_up_mac import MAC

ROOT = Path(__file__).parent.parent
CPU = Options(False, 4 << 30)


# ---- The whole


@pytest.mark.slow
def test_without_metal_it_says_so_and_ends_well(tmp_path):
    """From an empty folder, with what every install has; far below a minute on an idle machine."""
    if mx.metal.is_available():
        pytest.skip("here is Metal")
    command = [sys.executable, "-m", "ksa_mlx", "report"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "KSA_MLX_ROLLBACK": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
    assert "no Metal here: kernels were not run" in done.stdout
    assert "KSA_MLX_ROLLBACK=3" in done.stdout, "what may have changed something"
    assert "error" not in done.stdout and "Traceback" not in done.stdout
    found = json.loads((tmp_path / "ksa-mlx-report.json").read_text())
    assert set(found) == {"who", "machine", "decode", "prefill", "model", "batch"}
    assert found["machine"]["read"]["gb_s"] > 0
    assert found["model"]["1024 tokens"]["in_place"]["ksa"]["copies"] is False
    text = (tmp_path / "ksa-mlx-report.txt").read_text()
    assert text.startswith("What decides:\n  no Metal here") and "At best:" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ksa-mlx-report.json",
        "ksa-mlx-report.txt",
    ]


@pytest.fixture
def made_up(monkeypatch):
    """The report runs on a Mac that was made up."""
    monkeypatch.setattr(report, "here", lambda model: MAC._replace(model=model))
    monkeypatch.setattr(report.apart, "run", _made_up_mac.run)
    monkeypatch.setattr(report.time, "monotonic", _made_up_mac.clock())


def test_the_example_in_the_docs(made_up, tmp_path, monkeypatch, capsys):
    """The text of a made-up Mac is what docs/report.md shows."""
    monkeypatch.chdir(tmp_path)
    assert report.main([]) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 100
    text = (tmp_path / "ksa-mlx-report.txt").read_text()
    assert len(text.splitlines()) <= 120
    assert _made_up_mac.parts()[1] == text, "python -m tests._made_up_mac writes it anew"


def test_the_numbers_that_decide(made_up, tmp_path, capsys):
    report.main(["--out", str(tmp_path / "x")])
    top = (tmp_path / "x.txt").read_text().split("\n\n")[0].splitlines()
    assert len(top) <= report.TOP
    for number in ("read bandwidth: ", "plain decode, 17408 keys, kernel / operations: 1.0",
                   "4-bit decode, kernel / operations: 0.4", "kernel / plain kernel: 0.",
                   "prefill, kernel / operations: 1.", "an operation in a row: 2.4",
                   "caches appended: in place", "with MLX_MAX_OPS_PER_BUFFER=1000: copies ",
                   "chosen at 16384 keys: prefill operations; plain operations; plain, rows 4 "):  # fmt: skip
        assert any(number in line for line in top), number
    assert not any("not measured" in line for line in top)
    assert "\n".join(top) in capsys.readouterr().out, "printed at the end"


def test_a_crash_leaves_what_was_measured(made_up, tmp_path, monkeypatch, capsys):
    """The file has the numbers on top after each stage; the exit status is not 0."""

    def run(stage, options, seconds):
        if stage.name == "decode":
            raise MemoryError("out of memory")
        return _made_up_mac.run(stage, options, seconds)

    monkeypatch.setattr(report.apart, "run", run)
    assert report.main(["--out", str(tmp_path / "x")]) == 1
    text = (tmp_path / "x.txt").read_text()
    assert "read bandwidth: 3" in text and "prefill, kernel / operations: not measured" in text
    assert "multiply-adds" in text and "out of memory" in capsys.readouterr().err


def test_an_interruption_leaves_what_was_measured(made_up, tmp_path, monkeypatch, capsys):
    def run(stage, options, seconds):
        if stage.name == "costs":
            raise KeyboardInterrupt
        return _made_up_mac.run(stage, options, seconds)

    monkeypatch.setattr(report.apart, "run", run)
    assert report.main(["--out", str(tmp_path / "x")]) == 130
    out, err = capsys.readouterr()
    assert "read bandwidth: 310 GB/s" in out and err.startswith("stopped; what was measured")
    assert (tmp_path / "x.txt").read_text().startswith("What decides:\n  read bandwidth: 310 GB/s")


def test_time_runs_out(made_up, tmp_path, monkeypatch, capsys):
    """Stages for which none is left are named, and the rest get no more than there is."""
    given = []

    def run(stage, options, seconds):
        given.append(seconds)
        return _made_up_mac.run(stage, options, seconds)

    monkeypatch.setattr(report.apart, "run", run)
    monkeypatch.setattr(report.time, "monotonic", _made_up_mac.clock(step=20))
    assert report.main(["--out", str(tmp_path / "x"), "--minutes", "2"]) == 0
    assert given[0] == 60 and all(seconds <= 60 for seconds in given) and len(given) < len(STAGES)
    assert "no time was left" in capsys.readouterr().out


def test_failures_are_lines(made_up, tmp_path, monkeypatch, capsys):
    """Whatever fails in any stage, the report ends well and within its lines."""
    monkeypatch.setattr(report.apart, "run", _made_up_mac.failing)
    assert report.main(["--out", str(tmp_path / "x")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 125 and sum("SIGABRT" in line for line in lines) > 10
    assert "  0 of " in "\n".join(lines), "a stage that fails throughout leaves room for the others"
    assert any(line.startswith("  8 rows: ") for line in lines)
    assert "more lines: see the JSON" in (tmp_path / "x.txt").read_text()
    assert len(json.loads((tmp_path / "x.json").read_text())["compiles"]) > 40


@pytest.mark.parametrize(
    "argv, said",
    [
        (["--minutes", "0"], "--minutes: found 0, expected more than 0"),
        (["--minutes", "nan"], "--minutes: found nan"),
        (["--out", "none/x"], "--out: none/x.txt: no folder"),
        (["--out", ""], "--out: found ''"),
        (["--model", "none"], "none"),
        (["--nonsense"], "KSA_MLX_KERNELS: found 'nonsense'"),
        (["--model", str(ROOT / "ksa_mlx" / "notebook")], "expected the released KSA-4B's"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_what_cannot_be_done_is_one_line(argv, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    if argv == ["--nonsense"]:
        argv = []
        monkeypatch.setenv("KSA_MLX_KERNELS", "nonsense")
    assert report.main(argv) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: ") and said in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_lines_are_wrapped_and_counted(tmp_path, capsys):
    page = paper.Paper(tmp_path / "x", kept=10)
    page.say("word " * 50, "")
    page.say(*(f"line {i}" for i in range(200)))
    page.keep(["top"])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 110 and max(map(len, printed)) <= 100
    text = (tmp_path / "x.txt").read_text().splitlines()
    assert text[0] == "top" and text[-1] == "(94 more lines: see the JSON)"


# ---- Processes

SCRIPT = textwrap.dedent("""
    import json, os, sys, time
    name, options, start = json.loads(sys.argv[1])
    def say(**event): print(json.dumps(event), flush=True)
    for case in ["good", "crash", "hang", "leaves", "also good", "last"][start:]:
        say(case=case)
        print("a library says something\\n[1, 2]")
        if case == "crash":
            print("Assertion failed: no GPU", file=sys.stderr)
            os.abort()
        if case == "hang":
            time.sleep(60)
        if case == "leaves":
            sys.exit(3)
        say(case=case, found={"start": start, "limit": os.environ.get("MLX_LIMIT"), "options": options})
""")


def names(options):
    return dict.fromkeys(["good", "crash", "hang", "leaves", "also good", "last"], dict)


STAND_IN = Stage("stand-in", "", names, seconds=20, case_seconds=1, env={"MLX_LIMIT": "7"})


@pytest.fixture
def script(tmp_path, monkeypatch):
    file = tmp_path / "child.py"
    file.write_text(SCRIPT)
    monkeypatch.setattr(apart, "CHILD", [sys.executable, str(file)])


def test_what_ends_a_process_costs_one_case(script):
    found = dict(apart.run(STAND_IN, MAC, 20))
    assert list(found) == ["good", "crash", "hang", "leaves", "also good", "last"]
    assert found["good"] == {"start": 0, "limit": "7", "options": list(MAC)}
    assert found["crash"]["error"] == "its process ended with SIGABRT: Assertion failed: no GPU"
    assert found["hang"]["error"] == "took more than 1 s"
    assert found["leaves"]["error"] == "its process ended with status 3"
    assert found["also good"]["start"] == found["last"]["start"] == 4


def test_processes_are_not_started_for_ever(script, monkeypatch):
    monkeypatch.setattr(apart, "STARTS", 2)
    assert list(dict(apart.run(STAND_IN, MAC, 20))) == ["good", "crash", "hang"]


def test_a_stage_has_a_time_limit(script):
    found = dict(apart.run(STAND_IN, MAC, 0.7))
    assert list(found.values())[-1] == {"error": "no time was left"} and "last" not in found


def test_without_metal_stages_run_here(script, monkeypatch):
    def failing():
        raise RuntimeError("line 1:\n  error")

    stage = Stage("x", "", lambda options: {"a": lambda: {"n": 1}, "b": failing})
    assert dict(apart.run(stage, CPU, 9)) == {"a": {"n": 1}, "b": {"error": "line 1: error"}}
    assert dict(apart.run(stage, CPU, -1)) == {"a": {"error": "no time was left"}}


def test_the_process_itself(monkeypatch, capsys):
    """Cases from one of them on, warnings and errors among what they found."""

    def warns():
        choice.warnings.warn("ksa-mlx: slow", RuntimeWarning, stacklevel=1)
        return {"options": list(options)}

    def fails():
        raise ValueError("wrong\nsize")

    options = Options(True, 5, "m")
    cases = {"first": warns, "second": warns, "third": fails}
    monkeypatch.setattr(child, "STAGES", [Stage("x", "", lambda options: cases)])
    assert child.main(json.dumps(["x", options, 1])) == 0
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert events == [
        {"case": "second"},
        {"case": "second", "found": {"options": [True, 5, "m"], "warnings": ["ksa-mlx: slow"]}},
        {"case": "third"},
        {"case": "third", "found": {"error": "wrong size"}},
    ]


def test_stages_have_names_of_their_own():
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    order = [stage.name for stage in STAGES]
    assert order[:4] == ["who", "machine", "compiles", "costs"], "what leaves a useful paste first"


# ---- This machine


def test_who(monkeypatch):
    """What a Mac's own tools say."""
    said = {
        ("sysctl", "-n", "machdep.cpu.brand_string"): "Apple M9 Max\n",
        ("pmset", "-g"): "Currently in use:\n lowpowermode         1\n",
        ("pmset", "-g", "therm"): "CPU_Speed_Limit \t= 60\n",
    }
    monkeypatch.setattr(machine, "system", lambda *command: said[command])
    monkeypatch.setattr(machine.platform, "mac_ver", lambda: ("26.3", ("", "", ""), "arm64"))
    info = {"architecture": "applegpu_g17s", "memory_size": 36 << 30}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    monkeypatch.setenv("MLX_MAX_OPS_PER_BUFFER", "9")
    found = machine.who()
    assert (found["chip"], found["tensor_units"], found["low_power"]) == (
        "Apple M9 Max",
        True,
        True,
    )
    line = machine.who_lines("", {**found, "metal": True})
    for part in ("Apple M9 Max (applegpu_g17s), 38.7 GB, macOS 26.3", "LOW POWER MODE", "to 60 %",
                 "tensor units: yes", f"MLX {mx.__version__}", "MLX_MAX_OPS_PER_BUFFER=9"):  # fmt: skip
        assert part in line


def test_tools_that_are_not_there():
    assert machine.system("no-such-tool") == ""


@pytest.mark.parametrize(
    "gpu, macos, expected",
    [("applegpu_g17s", "26.2", True), ("applegpu_g17s", "26.1", False), ("applegpu_g16g", "27.0", False),
     ("applegpu_g18d", "27", True), ("x86_64", "", False)],
)  # fmt: skip
def test_tensor_units(gpu, macos, expected):
    assert machine.has_tensor_units(gpu, macos) == expected


# ---- Metal's stages, on stand-ins


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
