"""`python -m training` and its measurements: what is refused, and the second part by itself."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from ksa_mlx.errors import KSAError
from training import __main__ as begin

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "ksa_mlx" / "notebook"
WHOLE = [f"run/short/{name}" for name in begin.FILES]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["training.measure_recall", "{}"], "tokenizer.model: no such file"),
        (["training", "--out", "{}", "--resume"], "nothing to resume"),
        (["training", "--out", "{}", "--begin", "{}"], "expected a checkpoint"),
        (
            ["training", "--out", "{}", "--begin", str(SHIPPED), "--longer-steps", "0"],
            "expected steps",
        ),
    ],
)
def test_faults_are_one_line(tmp_path, arguments, expected):
    if arguments[0] == "training":
        pytest.importorskip("torch")
    command = [sys.executable, "-m", *(a.format(tmp_path) for a in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert expected in done.stderr and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "files, flags, line",
    [
        ([], ["--steps", "0"], "--steps: found 0, expected at least 1"),
        ([], ["--longer-steps", "-3"], "--longer-steps: found -3, expected at least 0"),
        ([], ["--threads", "0"], "--threads: found 0"),
        (["out/state.pt"], [], "out/state.pt: exists, add --resume"),
        (["out/longer/state.pt"], ["--resume"], "out/longer/state.pt: of a run with --begin"),
        # The folder of a run is no checkpoint, though it holds a tokenizer.
        (["run/tokenizer.model"], ["--begin", "run"], "--begin: run: expected a checkpoint: model"),
        (WHOLE, ["--begin", "run/short", "--steps", "7"], "--steps: does nothing"),
        (WHOLE, ["--begin", "run/short", "--vocab-size", "99"], "--vocab-size: does nothing"),
        (
            [*WHOLE, "out/state.pt"],
            ["--begin", "run/short", "--resume"],
            "--begin: out/state.pt is of a run that began from nothing",
        ),
        (
            [f.replace("run", "out") for f in WHOLE] + ["out/state.pt"],
            ["--resume", "--steps", "9000"],
            "--steps: does nothing, as the longer steps begin with out/short",
        ),
    ],
)
def test_runs_that_cannot_begin(tmp_path, monkeypatch, files, flags, line):
    monkeypatch.chdir(tmp_path)
    for file in map(Path, files):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    with pytest.raises(KSAError, match=re.escape(line)):
        begin.check(begin.parser().parse_args(["--out", "out", *flags]))
    assert {f for f in map(str, Path().rglob("*")) if Path(f).is_file()} == set(files)


@pytest.mark.slow
def test_longer_documents_change_a_checkpoint_and_resume(tmp_path):
    """The second part by itself: its levels, its state, and what it writes."""
    torch = pytest.importorskip("torch")
    command = [sys.executable, "-m", "training", "--out", str(tmp_path), "--begin", str(SHIPPED)]
    for more in (["--longer-steps", "1"], ["--longer-steps", "2", "--resume"]):
        done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stderr
    state = torch.load(tmp_path / "longer" / "state.pt", weights_only=True)
    assert state["progress"][:2] == [2, 2], "two steps, at the last of three levels"
    before, after = (
        mx.load(str(f / "model.safetensors")) for f in (SHIPPED, tmp_path / "checkpoint")
    )
    assert before.keys() == after.keys()
    changes = [mx.abs(before[n].astype(mx.float32) - after[n]).max().item() for n in before]
    assert 0 < max(changes) < 0.1
    assert (tmp_path / "checkpoint" / "tokenizer.model").read_bytes() == (
        SHIPPED / "tokenizer.model"
    ).read_bytes()
