"""`python -m ksa_mlx report`: its text, figures and processes; test_report_stages.py: stages."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import mlx.core as mx
import pytest

from ksa_mlx.attention import choice
from ksa_mlx.report import __main__ as report
from ksa_mlx.report import apart, child, machine, paper
from ksa_mlx.report.stage import Options, Stage
from ksa_mlx.report.stages import STAGES

from . import _made_up_mac
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
