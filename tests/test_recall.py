"""`python -m ksa_mlx recall`: the control, losses, what is kept, what is printed and refused."""

import json
import shutil
import struct
from importlib.util import find_spec
from itertools import pairwise
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from ksa_mlx import naive
from ksa_mlx.benchmark.timing import WIDTH
from ksa_mlx.errors import KSAError
from ksa_mlx.memory.caches import Quantised
from ksa_mlx.recall import __main__ as recall
from ksa_mlx.recall import run as runs
from ksa_mlx.recall import table
from ksa_mlx.recall.losses import EDGES, buckets, by_position, losses
from ksa_mlx.recall.models import Way, check_fits, has_summaries, labels
from ksa_mlx.recall.store import Store
from ksa_mlx.recall.summary import summary
from ksa_mlx.recall.text_only import TextOnly

from . import _models

# The control


def text_only_visibility(n: int, chunk: int, s: int, window: int) -> np.ndarray:
    """As `naive.visibility`, for the control: text sees the window and the first chunk."""
    m = n // chunk * s
    query, key = np.arange(n)[:, None], np.arange(n)[None]
    sees = np.zeros((n + m, n + m), bool)
    near = key // chunk >= query // chunk - window
    sees[:n, :n] = (key <= query) & (near | (key < chunk))
    sees[n:, :n] = True  # a row must see something; no text sees these
    return sees


@pytest.mark.quick(3)
@pytest.mark.parametrize("variant", _models.VARIANTS)
def test_the_control_is_as_defined(variant, monkeypatch):
    model, ids = _models.build(**_models.VARIANTS[variant]), _models.tokens(290)
    whole = naive.forward(model, ids)
    monkeypatch.setattr(naive, "visibility", text_only_visibility)
    expected, hidden = naive.forward(model, ids), TextOnly(model)
    assert _models.worst(hidden(ids), expected) < 1e-3 < _models.worst(whole, expected)
    cache, parts = hidden.make_cache(), []
    for a, b in pairwise((0, 1, 13, 280, 290)):
        parts.append(hidden(ids[:, a:b], cache=cache))
    assert _models.worst(mx.concatenate(parts, axis=1), expected) < 1e-3


def test_the_control_does_not_depend_on_summaries():
    """And its weights are the model's own."""
    model, ids = _models.build(**_models.VARIANTS["own projections"]), _models.tokens(60)
    hidden = TextOnly(model)
    before, model_before = hidden(ids), model(ids)
    mx.eval(before, model_before)
    model.model.summary_embedding = model.model.summary_embedding + 3
    assert _models.worst(hidden(ids), before) == 0 < _models.worst(model(ids), model_before)
    assert not has_summaries(_models.build(summary_sliding_chunk_num=2000))
    assert has_summaries(model) and not has_summaries(SimpleNamespace(args=None))


def test_the_control_on_quantised_caches():
    model = _models.build(head_dim=32)
    hidden, ids = TextOnly(model), _models.tokens(90)[0].tolist()
    plain = losses(hidden, ids)
    off = {b: np.abs(losses(hidden, ids, Quantised(b, 32, 0)) - plain).mean() for b in (8, 4)}
    assert losses(hidden, ids, Quantised(8, 32, 1000)).tolist() == plain.tolist()
    assert off[8] == off[4] == 0  # within one step: quantised behind it
    assert _quantised(hidden, 8, ids) < _quantised(hidden, 4, ids)


def _quantised(model, bits: int, ids: list[int]) -> float:
    """How far the logits of 10 ids are off on caches that hold the others in so many bits."""
    found = []
    for quantise in (False, True):
        cache = model.make_cache()
        mx.eval(model(mx.array([ids[:-10]]), cache=cache))
        cache = [c.to_quantized(32, bits) for c in cache] if quantise else cache
        found.append(model(mx.array([ids[-10:]]), cache=cache))
    return mx.abs(found[0] - found[1]).mean().item()


# Losses


def test_losses_agree_with_the_definition():
    model, ids = (
        _models.build(**_models.VARIANTS["released layout"]),
        _models.tokens(560)[0].tolist(),
    )
    ticks = []
    found = losses(model, ids, tick=ticks.append)
    logits = naive.forward(model, mx.array([ids]))[0]
    expected = nn.losses.cross_entropy(logits[:-1], mx.array(ids[1:]))
    assert found.shape == (559,) and sum(ticks) == 559
    assert np.allclose(found, np.array(expected), atol=2e-3)


def test_buckets():
    assert buckets(50) == [(0, 50)]
    assert buckets(1024) == [(0, 64), (64, 256), (256, 1024)]
    assert [a for a, _ in buckets(9000)] == [*EDGES, 4096, 8192] and buckets(9000)[-1][1] == 9000
    # The loss of the token at position p is number p - 1.
    of = by_position(np.arange(1, 400.0))
    assert list(of) == [0, 64, 256]
    assert of[0] == [32.0] and of[64] == [95.5, 159.5, 223.5] and of[256] == [287.5, 351.5]


# What is kept


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_store_goes_on(tmp_path):
    path = tmp_path / "r.jsonl"
    store = Store(path, {"seed": 1})
    store.add({"model": "a", "x": [1.5, None]})
    with pytest.raises(KSAError, match="another run writes to it"):
        Store(path, {"seed": 1})
    store.close()
    with open(path, "ab") as file:
        file.write(b'{"model": "b", "x"')  # a kill
    store = Store(path, {"seed": 1})
    assert store.find(model="a")["x"] == [1.5, None] and store.find(model="b") is None
    store.add({"model": "c"})
    store.close()
    assert [r.get("model") for r in rows_of(path)] == [None, "a", "c"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('{"recall": 1, "seed": 2}\n', "measured with --seed 2, now it is 1; give another file"),
        ('{"recall": 0, "seed": 1}\n', "measured with version 0, now it is 1"),
        ('{"recall": 1}\n', "measured with --seed null, now it is 1"),
        ('{"model": 1}\n', "line 1: found no results of recall"),
        ('{"recall": 1, "seed": 1}\n[]\n', "line 2: found no results of recall"),
        ("My diary", "line 1: found no results of recall"),
    ],
)
def test_files_of_others_are_refused_and_left_alone(tmp_path, text, line):
    path = tmp_path / "r.jsonl"
    path.write_text(text)
    with pytest.raises(KSAError, match=line) as error:
        Store(path, {"seed": 1})
    assert str(error.value).startswith(f"--results: {path}") and path.read_text() == text


def test_killed_in_the_first_line(tmp_path):
    path = tmp_path / "r.jsonl"
    for left in ("", "{", '{"recall": 1, "se'):
        path.write_text(left)
        store = Store(path, {"seed": 1})
        store.add({"model": "a"})
        store.close()
        assert rows_of(path) == [{"recall": 1, "seed": 1}, {"model": "a"}]
    path.unlink()
    Store(path, {"seed": 1}).close()
    assert not path.exists()


# The command


@pytest.fixture(scope="module")
def folder(notebook_models, tmp_path_factory):
    """The embedded model in float32, and a random Qwen3 that has its tokenizer beside it."""
    home = tmp_path_factory.mktemp("models")
    ksa, plain = home / "ksa", home / "plain"
    shutil.copytree(notebook_models[0], ksa)
    config = json.loads((ksa / "config.json").read_text())
    names = qwen3.ModelArgs.__dataclass_fields__
    config = {k: v for k, v in config.items() if k in names}
    config.update(model_type="qwen3", vocab_size=1280, max_position_embeddings=2048)
    model = qwen3.Model(qwen3.ModelArgs(**config))
    shutil.copytree(ksa, plain, ignore=shutil.ignore_patterns("*.safetensors", "*.py", "*.json"))
    shutil.copy(ksa / "tokenizer_config.json", plain)
    (plain / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(plain / "model.safetensors"), dict(tree_flatten(model.parameters())))
    return SimpleNamespace(ksa=str(ksa), plain=str(plain))


@pytest.fixture
def run(folder, tmp_path, capsys, monkeypatch):
    """Run the command, small; returns its exit status and what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*argv, model=(folder.ksa,), kinds=("digits",)):
        argv = ["--model", *model, "--kinds", *kinds, "--chat", "bare", *map(str, argv)]
        status = recall.main([*argv, "--lengths", "200", "--questions", "8"])
        out, err = capsys.readouterr()
        assert max((len(line) for line in out.splitlines()), default=0) <= WIDTH
        return SimpleNamespace(status=status, out=out, err=err)

    return run


@pytest.mark.slow
def test_both_kinds_of_models(run, folder, tmp_path):
    """Side by side, with the control and quantised caches, as table, JSON and figure."""
    book = tmp_path / "book.txt"
    book.write_text("The moon was quiet after the storm.\n" * 60)
    argv = ["--kv-bits", 4, "--data", book, "--json", "r.json"]
    argv += ["--plot", "r.png"] if find_spec("matplotlib") else []
    done = run(*argv, model=(folder.ksa, folder.plain), kinds=("needle",))
    assert (done.status, done.err) == (0, "")
    found = json.loads((tmp_path / "r.json").read_text())
    share = {(r["model"], r["way"]): r["exact"] for r in found["recall"]}
    assert list(share) == [
        *(("ksa", w) for w in ("plain", "KV 4 bits", "summaries hidden")),
        *(("plain", w) for w in ("plain", "KV 4 bits")),
    ]
    assert share["ksa", "plain"] >= 0.7 > 0.4 > share["ksa", "summaries hidden"]
    assert share["plain", "plain"] == 0
    # The last of the needles lies in the window, where the control sees it.
    hidden = {r["depth"]: r["exact"] for r in found["depths"] if r["way"] == "summaries hidden"}
    assert list(hidden) == [0, 0.25, 0.5, 0.75, 1] and hidden[0.5] == 0 < hidden[1]
    for r in found["recall"]:
        assert r["exact_low"] <= r["exact"] <= r["exact_high"] and r["questions"] == 10
        assert r["nll_low"] <= r["nll"] <= r["nll_high"]
    loss = {(r["model"], r["way"]): r["nll"] for r in found["losses"] if r["file"] == "all"}
    assert len(loss) == 5 and min(loss.values()) > 0
    assert found["chat"] == "bare" and found["seed"] == 0
    for line in ("ksa, summaries hidden", "plain, KV 4 bits", "book.txt", "Exact answers by depth"):
        assert line in done.out
    if find_spec("matplotlib"):
        png = (tmp_path / "r.png").read_bytes()
        assert png[:4] == b"\x89PNG" and min(struct.unpack(">II", png[16:24])) > 300


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on(run, tmp_path, monkeypatch):
    """Whatever a kill leaves of the file, the same command makes the same file of it."""
    path = tmp_path / "recall.jsonl"
    argv = ["--no-control", "--kv-bits", 8]
    whole = run(*argv, kinds=("digits", "common"))
    text, scored = path.read_bytes(), []
    score = runs.score
    monkeypatch.setattr(runs, "score", lambda *a: scored.append(1) or score(*a))
    lines = text.splitlines(keepends=True)
    assert len(lines) == 2 + 2 * (1 + 8)
    for cut in (10, len(b"".join(lines[:-1])) + 25, len(text)):
        path.write_bytes(text[:cut])
        scored.clear()
        again = run(*argv, kinds=("digits", "common"))
        assert path.read_bytes() == text and again.out == whole.out
        assert len(scored) == 18 - max(0, text[:cut].count(b"\n") - 2)
    # More of it adds to the file, and what was measured is not measured again.
    scored.clear()
    assert run(kinds=("digits", "words")).status == 0 and len(scored) == 3
    assert path.read_bytes().startswith(text)


def test_stopped_by_hand(run, tmp_path, monkeypatch):
    def score(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(runs, "score", score)
    done = run("--results", "r.jsonl")
    assert done.status == 130 and done.err == "stopped; the same command goes on from r.jsonl\n"


def test_another_model_of_the_same_name(run, folder, tmp_path):
    assert run("--no-control").status == 0
    weights = f"{folder.ksa}/model.safetensors"
    kept = mx.load(weights)
    changed = {k: v + (0.01 if "norm" in k else 0) for k, v in kept.items()}
    mx.eval(kept, changed)
    mx.save_safetensors(weights, changed, {"format": "mlx"})
    try:
        done = run("--no-control")
    finally:
        mx.save_safetensors(weights, kept, {"format": "mlx"})
    assert done.status == 1 and "measured with another model" in done.err
    assert len(done.err.splitlines()) == 1


def test_refused(folder, tmp_path, capsys, monkeypatch):
    """One line each, before anything is measured."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for argv, line in (
        (["--model", "nowhere/at/all"], "--model: nowhere/at/all: "),
        (["--lengths", 0], "--lengths: found 0, expected at least 1 token"),
        (
            ["--lengths", 40000],
            f"--lengths: found 40,000, expected at most the context of {folder.ksa}",
        ),
        (["--lengths", 60], "digits: found a length of 60 tokens, expected at least 1"),
        (["--lengths", 200, 200], "--lengths: found 200 twice"),
        (["--questions", 0], "--questions: found 0, expected at least 1"),
        (["--depths", 3], "--depths: needs --kinds needle"),
        (["--kv-group-size", 32], "--kv-group-size: needs --kv-bits"),
        (
            ["--kv-bits", 4, "--kv-group-size", 128],
            "--kv-group-size: found 128, expected a divisor",
        ),
        (["--memory-limit", "5MB"], "--lengths: 200 tokens of "),
        (["--kinds"], "--kinds: found none, expected at least one, or --data"),
        (["--data", "empty.txt"], "--data: empty.txt: found an empty file"),
        (["--data", "binary"], "--data: binary: found no text in UTF-8"),
        (["--filler", "none.txt"], "--filler: none.txt: No such file"),
        (["--plot", "figure.gif"], "--plot: found figure.gif, expected a file name in .png"),
        (["--json", "no/where.json"], "--json: no/where.json: no folder"),
        (["--results", "no/where.jsonl"], "--results: no/where.jsonl: no folder"),
        (["--json", "recall.jsonl"], "--results: found recall.jsonl, which is the file of --json"),
        (["--data", "a/book.txt", "b/book.txt"], "--data: a/book.txt: found a second 'book.txt'"),
        (["--data", "all"], "--data: all: found a second 'all'"),
        (["--kinds", "--data", "binary", "--questions", 40, "--seed", 4], "--seed: needs --kinds"),
        (["--kinds", "--data", "binary", "--questions", 40, "--chat"], "--chat: needs --kinds"),
        (["--kinds", "common", "--filler", "binary"], "--filler: needs --kinds other than common"),
        (["--seed", -1], "--seed: found -1, expected at least 0"),
    ):
        base = ["--model", folder.ksa, "--kinds", "digits", "--lengths", "200", "--questions", "8"]
        assert recall.main([*base, *map(str, argv)]) == 1, argv
        out, err = capsys.readouterr()
        assert err.startswith(f"error: {line}") and err.count("\n") == 1 and not out, err
    assert not (tmp_path / "recall.jsonl").exists()


def test_labels_and_ways():
    assert labels(["a/x", "b/y/"]) == {"a/x": "x", "b/y/": "y"}
    assert labels(["a/x", "b/x"]) == {"a/x": "a/x", "b/x": "b/x"}
    assert [str(w) for w in (Way(), Way(8), Way(hidden=True))] == [
        "plain", "KV 8 bits", "summaries hidden",
    ]  # fmt: skip


def test_caches_that_cannot_be_quantised():
    model = SimpleNamespace(args=SimpleNamespace(), layers=[1], make_cache=lambda: [Refusing()])
    with pytest.raises(KSAError, match="--kv-bits: the caches of m cannot be quantised"):
        check_fits("m", model, Way(8), 100, 64, None, 2048)


class Refusing:
    offset = 0

    def to_quantized(self, group_size, bits):
        raise NotImplementedError


def test_figures_of_rows():
    about = {"model": "m", "way": "plain"}
    one = {**about, "part": "needle", "length": 512, "depth": [0.0, 1.0], "distance": [9, 2]}
    blocks = {"0": [1.0, 3.0], "64": [2.0]}
    found = summary(
        [
            {**one, "text": 0, "exact": [True, True], "nll": [0.0, 1.0]},
            {**one, "text": 1, "exact": [False, True], "nll": [2.0, 1.0]},
            {**about, "part": "losses", "file": "a", "blocks": blocks},
            {**about, "part": "losses", "file": "b", "blocks": {"0": [5.0]}},
        ]
    )
    (whole,) = found["recall"]
    assert (whole["exact"], whole["questions"], whole["nll"]) == (0.75, 4, 1.0)
    assert (whole["nll_low"], whole["nll_high"]) == (0.5, 1.5)  # of two texts
    assert [(d["depth"], d["exact"]) for d in found["depths"]] == [(0.0, 0.5), (1.0, 1.0)]
    assert {(x["file"], x["from"]): x["nll"] for x in found["losses"]} == {
        ("a", 0): 2.0, ("a", 64): 2.0, ("b", 0): 5.0, ("all", 0): 3.0, ("all", 64): 2.0,
    }  # fmt: skip


def test_tables_break_where_they_are_wide(capsys):
    figure = {
        "exact": 1.0,
        "exact_low": 0.9,
        "exact_high": 1.0,
        "nll": 12.345,
        "nll_low": 10.0,
        "nll_high": 13.0,
    }
    name = {
        "model": "SmolLM2-135M-Instruct-KSA",
        "way": "summaries hidden",
        "kind": "digits",
        "questions": 40,
    }
    lengths = [1024 * 2**i for i in range(8)]
    table.show(
        {"recall": [name | figure | {"length": n} for n in lengths], "depths": [], "losses": []}
    )
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= WIDTH
    assert all(out.count(f" {n:,}") == 2 for n in lengths)
    assert out.count(" 100% (90-100)") == out.count(" 12.345 (10.00-13.00)") == 8
