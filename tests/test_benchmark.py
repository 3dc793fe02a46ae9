"""The benchmarks run at small sizes and report what they found. Times are not judged."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ksa_mlx.attention import metal
from ksa_mlx.benchmark import __main__ as benchmark
from ksa_mlx.benchmark import building, models, plot
from ksa_mlx.benchmark import kernels as benchmark_kernels
from ksa_mlx.benchmark.timing import WIDTH, Table, in_turns, ratio

from . import metal_cpu

ROOT = Path(__file__).parents[1]
TINY = models.dims(64, 96, 4, 4, 2, 32, 96)
KERNELS_TINY = dict(TINY, head_dim=64)  # groups of 64

needs_instrument = pytest.mark.skipif(
    not metal_cpu.available(), reason=str(metal_cpu.unavailable())
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setitem(benchmark.SHAPES, "wide", KERNELS_TINY)


@pytest.fixture
def run(tiny, capsys, tmp_path):
    """Run the program; returns its tables by name, as --json has them, and what it printed."""

    def run(*argv, **kwargs):
        path = tmp_path / "r.json"
        assert benchmark.main([*map(str, argv), "--json", str(path)], **kwargs) == 0
        text = capsys.readouterr().out
        assert max(len(line) for line in text.splitlines()) <= WIDTH
        return json.loads(path.read_text()), text

    return run


@pytest.mark.slow
def test_models(run, tmp_path):
    # The shape of the 4B is only allocated, for its held bytes.
    argv = ["--shape", "tiny", "--contexts", 1100, 40, "--prefill", 70, "--steps", 2]
    argv += ["--turns", 1, "--building", 0]
    if find_spec("matplotlib"):
        argv += ["--plot", tmp_path / "r.png"]
    found, text = run(*argv)
    assert [r["context"] for r in found["decode"]] == [1100, 40]
    assert [r["tokens"] for r in found["prefill"]] == [70]
    assert all(r["median_ms"][k] > 0 for r in found["decode"] for k in ("qwen3", "ksa", "limit"))
    # A quarter of the layers are full; the others keep an eighth and the window.
    assert text.splitlines()[-1].split() == "131072 19.33 GB 6.76 GB 2.86".split()
    if find_spec("matplotlib"):
        assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


def test_quantised_caches(run):
    argv = ("--shape", "wide", "--kv-bits", 8, 4, "--contexts", 1100, "--steps", 2)
    (row,) = run(*argv)[0]["kv_bits"]
    assert list(row["kv_bytes"]) == ["plain", "8", "4", "4, text 8"]
    assert row["kv_bytes"]["4"] < row["kv_bytes"]["4, text 8"] < row["kv_bytes"]["plain"]
    assert row["speedup"]["plain"]["median"] == 1


def test_lines_fit_at_the_largest_sizes(capsys):
    """Columns never run into each other."""
    r = {"median": 9.99, "low": 9.98, "high": 10.01}
    ms = {"qwen3": 9999.99, "ksa": 9999.99, "limit": 9999.99}
    for table, cells in (
        (
            benchmark.speed.decode_table(),
            benchmark.speed.decode_cells(
                {"context": 131072, "kv_bytes": {"qwen3": 99.9e9, "ksa": 999.9e6}}
                | {"median_ms": ms, "speedup": r}
                | {"limit": r, "of_limit": {"median": 1, "low": 0.9, "high": 1.1}}
                | {"of_limit_mean": 10.0}
            ),
        ),
        (
            benchmark.speed.prefill_table(),
            benchmark.speed.prefill_cells(
                {"tokens": 131072, "median_s": ms, "speedup": r}
                | {"peak_bytes": {"qwen3": 99.9e9, "ksa": 999.9e6}}
            ),
        ),
        (
            benchmark_kernels.times_table(),
            benchmark_kernels.times_cells(
                {"kernel": "prefill of 2048", "context": 131072, "kernel_ms": 999.123}
                | {"ops_ms": 9999.123, "faster": r, "gb_s": 9999.1, "copy_gb_s": 999.1}
                | {"gflops": 123456, "error": 1.2e-5}
            ),
        ),
        (
            benchmark_kernels.counts_table(),
            benchmark_kernels.counts_cells(
                {"kernel": "prefill of 2048", "context": 131072, "visible": 999.9e6, "keys": 1}
                | {"values": 1, "visible_affine": 1, "launches": 2, "threadgroups": 12345}
                | {"barriers": 1234567, "matrix_loads": 123456, "matrix_multiplies": 1234567}
                | {"error": 1.2e-5}
            ),
        ),
    ):
        table.add(*cells)
        line = capsys.readouterr().out.splitlines()[-1]
        assert len(line) <= WIDTH
        for cell, width in zip(cells[1:], table.widths[1:], strict=True):
            assert len(cell) < width, (cell, width)


def test_lines_come_one_by_one(capsys):
    table = Table("Numbers", [("what\nit is", 8), ("how many", 10)])
    assert capsys.readouterr().out == ""
    table.add("a", 1)
    assert capsys.readouterr().out == "\nNumbers\n\nwhat\nit is     how many\na                1\n"
    table.add("b", 23)
    assert capsys.readouterr().out == "b               23\n"


def test_turns_and_ratios(monkeypatch):
    """Runs alternate, warm-ups and what comes after a run are not counted."""
    clock, order = [0.0], []
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    def takes(name, seconds):
        def run():
            order.append(name)
            clock[0] += seconds * (len(order) + 1) // 2  # each turn takes longer than the last
            return name

        return run

    def after(result):
        clock[0] += 100

    ticks = []
    runs = {"a": takes("a", 2), "b": takes("b", 4)}
    seconds = in_turns(runs, 3, warmup=1, tick=lambda: ticks.append(1), after=after)
    assert order == ["a", "b"] * 4 and len(ticks) == 4
    assert seconds["a"].tolist() == [4, 6, 8] and seconds["b"].tolist() == [10, 14, 18]
    assert ratio(np.array([1.0, 4, 9]), np.array([1.0, 2, 3])) == {
        "median": 2, "low": 1.5, "high": 2.5,
    }  # fmt: skip


@pytest.mark.parametrize(
    "argv, expected",
    [
        *(
            (f"{flag} {n}", f"{flag.split()[-1]}: found {n}, expected 1 to ")
            for flag in ("--contexts", "--prefill", "--kernels --contexts")
            for n in (0, 1 << 20)
        ),
        ("--steps 0", "--steps: found 0, expected at least 1"),
        ("--building -1", "--building: found -1, expected at least 0"),
        ("--json {}", "--json: found '{}', which is a folder, expected a file's path"),
        ("--json {}/none/r.json", "--json: {}/none/r.json: no folder {}/none"),
        ("--plot {}/r.jpg", "--plot: found {}/r.jpg, expected a file name in .png, .pdf, .svg"),
        ("--json {}/r.svg --plot {}/r.svg", "--plot: found {}/r.svg, which is the file of --json"),
        ("--plot {}/r.png --kernels", "--plot: expected --contexts, without --kernels"),
        ("--kernels", "--kernels: no Metal device here; expected a Mac. In a clone with clang"),
    ],
)
def test_refused_in_one_line(argv, expected, tmp_path, capsys, monkeypatch):
    """Before anything is built."""
    monkeypatch.setattr(benchmark, "build", None)
    monkeypatch.setattr(benchmark_kernels, "on_metal", lambda: False)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: True)
    argv, expected = (x.replace("{}", str(tmp_path)) for x in (argv, expected))
    assert benchmark.main(argv.split()) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {expected}") and err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_instrument_that_does_not_run(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "on_metal", lambda: False)
    monkeypatch.setattr(metal_cpu, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(metal_cpu, "available", lambda: False)
    assert benchmark.main(["--kernels"], instrument=metal_cpu) == 1
    assert capsys.readouterr().err.endswith("executes kernels on a CPU: no compiler\n")


def test_matplotlib_is_asked_for_at_once(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "build", None)
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["--plot", "x.png"]) == 1
    assert capsys.readouterr().err == "error: --plot: needs matplotlib: pip install -e '.[plot]'\n"


@pytest.mark.parametrize("choice", ["nonsense", "metal"])
def test_a_wrong_choice_of_kernels_is_named(choice, capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "build", None)
    monkeypatch.setattr(benchmark.mx.metal, "is_available", lambda: False)
    monkeypatch.setenv("KSA_MLX_KERNELS", choice)
    assert benchmark.main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith(
        f"error: KSA_MLX_KERNELS: found '{choice}', expected auto, ops, retune (no Metal device here)\n"
    )
    assert err.count("\n") == 1


@needs_instrument
def test_counts_of_kernels(run, monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "COUNTED_ROWS", 40)
    found, text = run(
        "--kernels", "--shape", "wide", "--contexts", 16, 1100, instrument=metal_cpu
    )  # fmt: skip
    rows = found["kernels"]
    names = ["decode", "decode, 8 bit", "decode, 4 bit"]
    assert [row["kernel"] for row in rows] == [*names, *names, "prefill of 40"]
    # Loaded / visible: tiles of 16 keys, of which the last is read again where there are no more.
    assert [text.count(x) for x in ("1.000", "1.003")] == [4, 3], text
    assert all(row["error"] < 1e-5 for row in rows)
    assert [row["launches"] for row in rows] == [1] * 3 + [2] * 3 + [1]
    # 9 summaries and 1028 tokens, in whole tiles, of 64 float32 numbers, 2 KV heads.
    assert rows[3]["keys"] == rows[3]["values"] == 1040 * 64 * 4 * 2
    assert rows[6]["matrix_multiplies"] > 0
    assert rows[3]["loaded_by_buffer"]["ksa_decode_1_plain keys_0"] == rows[3]["keys"]
    assert rows[3]["loaded_by_buffer"]["ksa_combine parts"] > 0


@needs_instrument
def test_times_of_kernels(run, monkeypatch):
    """What runs on a Mac, with Metal feigned: the code, not the times."""
    for constant, value in (("LAYERS", 2), ("ROWS", 33), ("COPY_BYTES", 1 << 12)):
        monkeypatch.setattr(benchmark_kernels, constant, value)
    argv = ["--kernels", "--shape", "wide", "--contexts", 1100, "--steps", 2, "--turns", 1]
    with metal_cpu.running(reload=[metal], check=False) as log:
        rows = run(*argv)[0]["kernels"]
    names = ["decode", "decode, 8 bit", "decode, 4 bit", "prefill of 33"]
    assert [row["kernel"] for row in rows] == names
    assert all(row["error"] < 1e-5 for row in rows)
    assert rows[0]["faster"]["low"] < rows[0]["faster"]["high"]
    assert rows[3]["faster"]["low"] == rows[3]["faster"]["high"]
    # 3 for warming up, 2 steps, 2 layers; and once for the difference.
    assert len(log.of("ksa_decode")) == 3 * (5 * 2 + 1)
    assert rows[0]["gb_s"] * rows[0]["kernel_ms"] * 1e6 == pytest.approx(
        2 * (9 + 1028) * 64 * 4 * 2
    )
    assert all(r["copy_gb_s"] > 0 and r["gflops"] > 0 for r in rows)


@pytest.mark.slow
def test_building_is_of_the_batches_that_it_says():
    both = building.builders()
    row = building.measure(both, "8 rows, 8 phases", 3)
    assert row["ratio"]["median"] > 0 and building.cells(row)[0] == "8 rows, 8 phases"
    for name, builder in both.items():
        for lengths in building.BATCHES.values():
            cache = builder.caches(lengths)
            assert len(cache) == building.LAYERS
            offsets = [cache[0].offset] if len(lengths) == 1 else cache[0].offset.tolist()
            assert offsets == lengths, name
        builder.model(building.mx.zeros((8, 1), building.mx.int32), cache=cache)
        assert all(layer.offset == n for n, c in builder.read.items() for layer in c)


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_nothing_measured_is_lost(how, tmp_path):
    """Killed in a long prefill: what came before is printed, and whole in the file."""
    path = tmp_path / "r.json"
    argv = "--contexts 64 1100 --steps 3 --prefill 131072 --json".split()
    command = [sys.executable, "-m", "ksa_mlx.benchmark", *argv, str(path)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    lines, end = [], time.monotonic() + 120
    try:
        while not (lines and lines[-1].startswith("1100 ")) and time.monotonic() < end:
            lines.append(process.stdout.readline())
        os.kill(process.pid, how)
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert [line.split()[0] for line in lines[-2:]] == ["64", "1100"]
    assert [r["context"] for r in json.loads(path.read_text())["decode"]] == [64, 1100]
    assert list(tmp_path.iterdir()) == [path]
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert err == "stopped; what was measured stands above\n"


@pytest.mark.slow
def test_command_line():
    command = [sys.executable, "-m", "ksa_mlx.benchmark", "--contexts", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: --contexts: found 0, expected 1 to")
    assert done.stderr.count("\n") == 1
