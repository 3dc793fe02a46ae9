"""The command: from a base and texts to a folder that runs, what it refuses, and its evaluation."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import mlx.core as mx
import numpy as np
import pytest

import ksa_mlx
from ksa_mlx.benchmark.results import Results
from ksa_mlx.memory.room import gb
from ksa_mlx.recall import tasks
from ksa_mlx.retrofit import distill, evaluate, needs
from ksa_mlx.retrofit.__main__ import main, verdict
from ksa_mlx.retrofit.base import open_base
from ksa_mlx.retrofit.build import teacher
from ksa_mlx.retrofit.stages import Settings
from ksa_mlx.retrofit.texts import recall_maker
from ksa_mlx.retrofit.trainable import is_summary, put, trainable
from tests._bases import README, base_folder
from tests._retrofit import ids, student
from tests.test_distributed import ROOT

FLAGS = ["--window", "2", "--length", "640", "--batch-size", "1", "--lora-rank", "2"]
TOKENS = ["--stage1-tokens", "2K", "--stage2-tokens", "2K", "--questions", "8"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    place = tmp_path_factory.mktemp("base") / "llama"
    return base_folder(place, "llama", max_position_embeddings=1200)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name in ("README.md", "docs/design.md", "docs/notebook.md"):
        file = README.parent / name
        (folder / file.name).write_text(file.read_text(encoding="utf-8"), encoding="utf-8")
    return folder


def command(base, data, out, *more):
    return ["--model", base, "--data", data, "--mlx-path", out, *FLAGS, *TOKENS, *more]


def run(*argv) -> int:
    return main([str(a) for a in argv])


@pytest.fixture(scope="module")
def made(base, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "ksa"
    assert run(*command(base, data, out, "--hf-path", f"{out}-hf")) == 0
    return out


def test_the_folder_runs(made):
    model, tokenizer = ksa_mlx.load(str(made))
    assert sum(w is None for w in model.args.windows) == 1  # a quarter of three layers
    prefix = json.loads((made / "config.json").read_text())["prefix_token_ids"]
    assert tokenizer.encode("Hello.")[: len(prefix)] == prefix
    text = mx.array([tokenizer.encode("A text that is longer than the window. " * 20)])
    cache, whole = model.make_cache(), model(text)
    assert mx.abs(model(text, cache=cache) - whole).max() < 1e-3
    assert (made.parent / "ksa-hf" / "config.json").is_file()


def test_what_it_found_is_kept(made):
    folder = made.with_name("ksa.training")
    found = json.loads((folder / "found.json").read_text())
    assert {r["reader"] for r in found["loss"]} == set(evaluate.READERS)
    assert [len(r["exact"]) for r in found["recall"]] == [8] * 4
    assert len(found["probe"][0]["lost"]["text"]) == 3
    lines = [json.loads(x) for x in (folder / "log.jsonl").read_text().splitlines()]
    assert {x["stage"] for x in lines} == {"regression", "sink", "distillation"}
    pytest.importorskip("matplotlib")
    assert (folder / "training.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "more, why",
    [
        (["--window", "0"], "--window: found 0, expected at least 1"),
        (["--length", "200"], "--length: found 200, expected at least 432 for a window of 2"),
        (["--full-layers", "auto:x%"], "--full-layers: found 'auto:x%', expected auto:PERCENT%"),
        (["--full-layers", "0,9"], "numbers below 3 such as 7,8,15"),
        (["--recall", "1"], "--recall: found 1.0, expected 0 to 1"),
        (["--learning-rate", "0"], "--learning-rate: found 0.0, expected more than 0"),
        (["--memory-limit", "1M"], "training needs"),
        (["--stage1-tokens", "9G"], "found"),
        (["--length", "2048"], "--length: found 2048, expected at most 1200"),
        (["--length", "440"], "too short for texts that ask for facts (digits: found a length of"),
        (["--eval-data", "nowhere"], "nowhere: no such file or folder"),
        (["--model", "nowhere"], "nowhere"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_refusals_are_one_line(more, why, base, data, tmp_path, capsys):
    assert run(*command(base, data, tmp_path / "x", *more)) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len([line for line in error if line.startswith("error: ")]) == 1
    assert why in error[-1] and not list(tmp_path.iterdir())


def test_texts_to_measure_with_are_checked_at_once(base, data, tmp_path, capsys):
    held = tmp_path / "held"
    (held / "a").mkdir(parents=True)
    for name, text, why in (
        ("code-1.txt", "", "code-1.txt: found 0 tokens, expected at least 312 to measure with"),
        ("code-1.txt", "Some words. " * 9, "tokens, expected at least 312 to measure with"),
        ("a/novel-1.txt", "Some words. " * 90, "a second text novel-1"),
    ):
        (held / "novel-1.txt").write_text("Other words. " * 400)
        (held / name).write_text(text)
        assert run(*command(base, data, tmp_path / "x", "--eval-data", held)) == 1
        assert why in capsys.readouterr().err
        (held / name).unlink()
        assert not (tmp_path / "x.training").exists()


@pytest.mark.parametrize(
    "more, why",
    [
        (["--recall", "0.5"], "--recall: found 0.5, expected 0.2 as the run began"),
        (["--full-layers", "auto:50%"], "--full-layers: found auto:50%, expected auto:25%"),
        (["--window", "3"], "--window: found 3, expected 2 as the run began"),
        (["--questions", "16"], "--questions: found 16, expected 8 as the run began"),
    ],
)
def test_a_run_goes_on_as_it_began(more, why, made, base, data, tmp_path, capsys):
    shutil.copytree(made.with_name("ksa.training"), tmp_path / "z.training")
    assert run(*command(base, data, tmp_path / "z", "--resume", *more)) == 1
    assert why in capsys.readouterr().err
    assert not (tmp_path / "z").exists()


@pytest.mark.parametrize(
    "damaged, why",
    [
        ('{"probe": [', "not readable as JSON ("),
        ("\x00", "not readable as JSON ("),
        ("[]", "found a list, expected a JSON object"),
    ],
)
def test_damaged_measurements_are_one_line(damaged, why, made, base, data, tmp_path, capsys):
    training = tmp_path / "w.training"
    shutil.copytree(made.with_name("ksa.training"), training)
    (training / "found.json").write_text(damaged)
    assert run(*command(base, data, tmp_path / "w", "--resume")) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(f"error: {training / 'found.json'}: {why}")
    assert last.endswith("remove it to measure again") and not (tmp_path / "w").exists()


def test_a_figure_that_cannot_be_written_is_refused_before_the_run(base, data, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert run(*command(base, data, tmp_path / "x", "--plot", "nowhere/x.png")) == 1
    assert "error: --plot: nowhere/x.png: no folder" in capsys.readouterr().err


def test_what_is_there_is_not_overwritten(made, base, data, tmp_path, capsys):
    assert run(*command(base, data, made)) == 1
    assert "exists already; name a new folder" in capsys.readouterr().err
    (tmp_path / "y.training").mkdir()
    assert run(*command(base, data, tmp_path / "y")) == 1
    assert "a run has begun there; --resume goes on with it" in capsys.readouterr().err


@pytest.mark.slow
def test_ctrl_c_keeps_the_step_and_resume_ends_alike(made, base, data, tmp_path):
    out, held = tmp_path / "ksa", tmp_path / "text-1.txt"
    held.write_text("Other words than those of the other run. " * 90)  # weights do not depend on it
    few = command(base, data, out, "--eval-data", held, "--questions", "0")
    argv = [sys.executable, "-m", "ksa_mlx", "retrofit", *map(str, few)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    log = out.with_name("ksa.training") / "log.jsonl"
    for _ in range(600):
        if log.is_file() and '"loss"' in log.read_text():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.strip().splitlines()[-1] == f"error: interrupted; --resume goes on with {out}"
    assert not out.exists()
    assert subprocess.run([*argv, "--resume"], env=env, cwd=tmp_path).returncode == 0
    file = "model.safetensors"
    assert (out / file).read_bytes() == (made / file).read_bytes()


def test_a_recall_text_is_one_text(base, monkeypatch):
    """Its questions are asked one after the other; no text is made and thrown away."""
    tokenizer, made, text = open_base(base).tokenizer, [], tasks.Texts.text
    monkeypatch.setattr(tasks.Texts, "text", lambda *a: made.append(a) or text(*a))
    found, places = recall_maker(tokenizer, list(range(8)), 0)(0, 640, np.arange(3, 600))
    assert len(made) == 1 and len(found) == 640 and found[:8] == list(range(8))
    assert len(places) >= 8 and min(places) > 300 and max(places) < 640


# The evaluation


def test_losses_of_the_readers(tmp_path):
    model = student()
    base, x = teacher(model), ids(batch=1)[0].tolist() * 8
    results = Results(str(tmp_path / "found.json"))
    texts = evaluate.Texts({"kind-1": x}, {})
    list(evaluate.measure(base, model, texts, results))
    rows = {r["reader"]: r["blocks"] for r in results.found["loss"]}

    def exact(logits):
        z = np.array(logits[0], dtype=np.float64)
        loss = np.log(np.exp(z).sum(-1)) - z[np.arange(len(x)), [*x[1:], 0]]
        return np.concatenate([[0], loss[:-1]]).reshape(-1, 64).mean(-1)

    for name, logits in (("teacher", base(mx.array([x]))), ("student", model(mx.array([x])))):
        np.testing.assert_allclose(rows[name], exact(logits), rtol=1e-4)
    assert not np.allclose(rows["near"], rows["teacher"], rtol=1e-3)
    np.testing.assert_allclose(rows["near"], rows["hidden"], rtol=1e-5)  # no LoRA yet
    before = (tmp_path / "found.json").read_bytes()
    list(evaluate.measure(base, model, texts, results))  # nothing is measured twice
    assert (tmp_path / "found.json").read_bytes() == before


def test_shares_and_their_intervals():
    def row(reader, of, level, slope=0.0):
        rng = np.random.default_rng(len(of))
        return {
            "reader": reader,
            "of": of,
            "blocks": (level + slope * rng.normal(size=64)).tolist(),
        }

    rows = [
        *(row("teacher", f"{k}-1", 2.0) for k in ("novel", "code")),
        *(row("near", f"{k}-1", 3.0) for k in ("novel", "code")),
        row("student", "novel-1", 2.5),
        row("student", "code-1", 2.25, 0.1),
    ]
    found = evaluate.shares(rows, (1024, 2048))
    assert found["novel"] == evaluate.Share(0.5, 0.5, 0.5)
    assert found["code"].low < found["code"].share < found["code"].high
    assert found["mean"].share == pytest.approx((0.5 + found["code"].share) / 2)
    # A run that was stopped has not read all texts with all readers.
    assert "code" not in evaluate.shares(rows[:-1], (1024, 2048))
    assert evaluate.shares([{**r, "blocks": r["blocks"][:10]} for r in rows], (1024, 2048)) == {}
    # A text that ends within a distance counts as far as it goes, and none where it is not.
    short = [{**r, "blocks": r["blocks"][:20]} if r["of"] == "code-1" else r for r in rows]
    said = evaluate.table({"loss": short})
    assert "tokens 1,024 to 2,048" in said and "tokens 2,048 to 4,096" in said
    assert "nan" not in said and said.count("code") == 2 and said.count("novel") == 3


def test_a_run_that_recalls_nothing_is_no_success():
    def rows(student):
        parts = {"teacher": 1.0, "near": 0.2, "student": student, "hidden": 0.2}
        return [{"reader": k, "of": 1024, "exact": [v], "nll": [0]} for k, v in parts.items()]

    assert "not a success" in verdict({"recall": rows(0.22)})
    assert "not a success" not in verdict({"recall": rows(0.9)})


# What it needs


@pytest.mark.parametrize("checkpointed", [False, True])
def test_needs_are_about_what_is_measured(checkpointed):
    """The peak of a step of the distillation."""
    settings = Settings(length=640, batch_size=2, window=2, lora_rank=0)
    model = student(hidden_size=64, head_dim=16, intermediate_size=128, num_hidden_layers=4,
                    summary_sliding_chunk_num=[2, 2000, 2, 2])  # fmt: skip
    x = mx.array(np.random.default_rng(0).integers(0, 64, (2, 640)))
    at = np.stack([np.arange(300, 620)] * 2)
    wanted = distill.goal(teacher(model), x, at, np.ones(at.shape, np.float32), 32)
    params = trainable(model, is_summary)

    def loss(params):
        put(model, params)
        return distill.loss(model, wanted, checkpointed)[0]

    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(params))
    peak = mx.get_peak_memory() - before
    need = needs.need(model, settings, checkpointed)
    assert 0.5 < need.distillation / peak < 2, (need.distillation, peak)
    assert gb(need.total) in str(need)


def test_work_grows_with_the_base():
    small, large = (needs.work(student(hidden_size=h).args, Settings()) for h in (32, 64))
    assert small.regression < small.distillation < large.distillation
