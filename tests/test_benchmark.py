"""The benchmarks run at small sizes and report what they found. Times are not judged."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from ksa_mlx.attention import kernels
from ksa_mlx.benchmark import __main__ as benchmark
from ksa_mlx.benchmark import kernels as benchmark_kernels

from . import metal_cpu

TINY = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 97}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
KERNELS_TINY = dict(TINY, head_dim=64)  # groups of 64

needs_instrument = pytest.mark.skipif(
    not metal_cpu.available(), reason=str(metal_cpu.unavailable())
)


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(benchmark.SHAPES, "tiny", TINY)
    monkeypatch.setitem(benchmark.SHAPES, "wide", KERNELS_TINY)


def tables(text):
    """The Markdown tables of a text, each as a list of dicts."""
    found = []
    for part in text.split("\n\n"):
        lines = [line.strip("| ").split(" | ") for line in part.splitlines() if line[:1] == "|"]
        found += [[dict(zip(lines[0], row)) for row in lines[2:]]] if lines else []
    return found


def test_models(tiny, capsys, tmp_path):
    # The shape of the 4B is only allocated, for its held bytes.
    argv = ["--shape", "tiny", "--contexts", "40", "1100", "--prefill", "70", "--steps", "2"]
    argv += ["--turns", "1", "--json", str(tmp_path / "r.json")]
    if find_spec("matplotlib"):
        argv += ["--plot", str(tmp_path / "r.png")]
    benchmark.main(argv)
    decode, prefill, held = tables(capsys.readouterr().out)
    assert [row["context"] for row in decode] == ["40", "1100"]
    assert [row["tokens"] for row in prefill] == ["70"]
    assert all(float(row[name]) > 0 for row in decode for name in ("Qwen3", "KSA"))
    # A quarter of the layers are full; the others keep an eighth and the window.
    assert held[-1] == {
        "context": "131072", "full attention": "19.33 GB", "KSA": "6.76 GB", "ratio": "2.86",
    }  # fmt: skip
    results = json.loads((tmp_path / "r.json").read_text())
    assert [r["context"] for r in results["decode"]] == [40, 1100]
    if find_spec("matplotlib"):
        assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("option", ["--contexts", "--prefill", "--kernels --contexts"])
def test_contexts_that_do_not_fit(option, tmp_path):
    for n in (0, 1 << 20):
        with pytest.raises(SystemExit, match=f"context: found {n}, expected 1 to "):
            benchmark.main([*option.split(), str(n), "--json", str(tmp_path / "none")])
    assert not list(tmp_path.iterdir())


@needs_instrument
def test_counts_of_kernels(tiny, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark_kernels, "COUNTED_ROWS", 40)
    path = tmp_path / "k.json"
    argv = ["--kernels", "--shape", "wide", "--contexts", "1", "1100", "--json", str(path)]
    benchmark.main(argv)
    (rows,) = tables(capsys.readouterr().out)
    names = ["decode", "decode, 8 bit", "decode, 4 bit"]
    assert [row["kernel"] for row in rows] == [*names, *names, "prefill of 40"]
    assert all(row["loaded / visible"] == "1.000" for row in rows)
    assert all(float(row["error"]) < 1e-5 for row in rows)
    assert [row["launches"] for row in rows] == ["1"] * 3 + ["2"] * 3 + ["1"]
    # 9 summaries and 1028 tokens, of 64 float32 numbers, 2 KV heads.
    assert rows[3]["keys loaded"] == rows[3]["values"] == str((9 + 1028) * 64 * 4 * 2)
    assert int(rows[6]["matrix products"]) > 0
    kept = json.loads(path.read_text())["kernels"]
    assert kept[3]["loaded_by_buffer"]["ksa_decode keys"] == int(rows[3]["keys loaded"])
    assert kept[3]["loaded_by_buffer"]["ksa_combine parts"] > 0


@needs_instrument
def test_times_of_kernels(tiny, capsys, tmp_path, monkeypatch):
    """What runs on a Mac, with Metal feigned: the code, not the times."""
    for constant, value in (("LAYERS", 2), ("ROWS", 33), ("COPY_BYTES", 1 << 12)):
        monkeypatch.setattr(benchmark_kernels, constant, value)
    path = tmp_path / "k.json"
    argv = ["--kernels", "--shape", "wide", "--contexts", "1100", "--steps", "2", "--turns", "1"]
    with metal_cpu.running(reload=[kernels], check=False) as log:
        benchmark.main([*argv, "--json", str(path)])
    (rows,) = tables(capsys.readouterr().out)
    names = ["decode", "decode, 8 bit", "decode, 4 bit", "prefill of 33"]
    assert [row["kernel"] for row in rows] == names
    assert all(float(row["error"]) < 1e-5 for row in rows)
    assert "(" in rows[0]["faster"] and "(" not in rows[3]["faster"]
    # 3 for warming up, 2 steps, 2 layers; and once for the difference.
    assert len(log.of("ksa_decode")) == 3 * (5 * 2 + 1)
    kept = json.loads(path.read_text())["kernels"]
    assert kept[0]["gb_s"] * kept[0]["kernel_ms"] * 1e6 == pytest.approx(
        2 * (9 + 1028) * 64 * 4 * 2
    )
    assert all(r["copy_gb_s"] > 0 and r["gflops"] > 0 for r in kept)


def test_kernels_without_metal_and_instrument(monkeypatch, tmp_path, capsys):
    """One line, and exit code 1."""
    monkeypatch.setattr(metal_cpu, "unavailable", lambda: "no compiler")
    monkeypatch.setattr(metal_cpu, "available", lambda: False)
    with pytest.raises(SystemExit, match="needed is a Mac, or a clone of the project.*no compiler"):
        benchmark.main(["--kernels"])
    monkeypatch.setattr(
        benchmark_kernels, "__file__", str(tmp_path / "ksa_mlx" / "benchmark" / "x.py")
    )
    with pytest.raises(SystemExit, match="metal_cpu not found$"):
        benchmark.main(["--kernels"])


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "ksa_mlx.benchmark", "--contexts", "0"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False
    )
    assert done.returncode == 1
    assert (
        done.stderr.startswith("context: found 0, expected 1 to") and "\n" not in done.stderr[:-1]
    )
