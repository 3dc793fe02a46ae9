"""The rest of mlx-lm's doors: perplexity, evaluate, convert, manage, embeddings, processors."""

import importlib
import json
import sys
import types

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm import manage, perplexity
from mlx_lm.generate import generate_step
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.utils import load

from ksa_mlx import naive

from ._convert_helpers import add_tokenizer, convert, hub_folder
from ._models import VARIANTS, build, tokens, worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("mlx_lm")
    source = hub_folder(place / "hub", "hybrid_mix1")
    add_tokenizer(source)
    assert convert(source, place / "model", "--dtype", "float32") == 0
    return place / "model"


def run(monkeypatch, command, *argv):
    monkeypatch.setattr(sys, "argv", ["mlx_lm", *map(str, argv)])
    command.main()


@pytest.mark.feature("Perplexity", "`mlx_lm.perplexity`", "works, with `mlx-lm[train]`")
def test_perplexity(folder, monkeypatch, capsys):
    """The command, on texts of our own: its data sets come from the network."""
    texts = tokens(60, 6)
    monkeypatch.setattr(perplexity, "load_data", lambda *args, **kwargs: texts)
    run(monkeypatch, perplexity, "--model", folder, "--batch-size", 4, "--trust-remote-code")
    found = float(capsys.readouterr().out.split("Perplexity: ")[1].split()[0])
    model, _ = load(folder)
    expected = nn.losses.cross_entropy(naive.forward(model, texts[:, :-1]), texts[:, 1:]).mean()
    assert found == pytest.approx(mx.exp(expected).item(), rel=1e-3)


@pytest.fixture
def scorer(monkeypatch):
    """mlx-lm's MLXLM around a model. lm_eval only lends it a base class and a decorator, and is
    large: a stand-in is enough here."""
    lm_eval = types.ModuleType("lm_eval")
    lm_eval.__path__ = []
    parts = {
        "lm_eval": lm_eval,
        "lm_eval.api": types.ModuleType("lm_eval.api"),
        "lm_eval.api.model": types.ModuleType("lm_eval.api.model"),
        "lm_eval.api.registry": types.ModuleType("lm_eval.api.registry"),
    }
    parts["lm_eval.api.model"].LM = type("LM", (), {})
    parts["lm_eval.api.registry"].register_model = lambda name: lambda cls: cls
    for name, part in parts.items():
        monkeypatch.setitem(sys.modules, name, part)
    monkeypatch.delitem(sys.modules, "mlx_lm.evaluate", raising=False)
    yield importlib.import_module("mlx_lm.evaluate").MLXLM
    sys.modules.pop("mlx_lm.evaluate", None)


def log_probs(model, ids):
    """By the definition: log-probability of each token of a text after the first."""
    ids = mx.array(ids)[None]
    logits = nn.log_softmax(naive.forward(model, ids[:, :-1]))
    return mx.take_along_axis(logits, ids[:, 1:, None], axis=-1)[0, :, 0]


@pytest.mark.feature("Scoring", "`mlx_lm.evaluate`", "works, with `mlx-lm[evaluate]`")
@pytest.mark.parametrize("name", ["released layout", "two summaries", "bypass"])
def test_evaluate_scores_several_texts_on_one_cache(scorer, name):
    """`_score_fn`: rows of different length, padded on the right, in one plain cache."""
    model = build(**VARIANTS[name])
    lm = scorer.__new__(scorer)
    lm._model = model
    texts = [tokens(n, seed=n)[0].tolist() for n in (50, 31, 1 + 12, 47)]
    for step_size in (2048, 16, 7):
        scores, lengths, greedy = lm._score_fn(texts, step_size=step_size)
        assert scores.shape == greedy.shape == (4, 49) and lengths.tolist() == [50, 31, 13, 47]
        for row, text in enumerate(texts):
            expected = log_probs(model, text)
            assert worst(scores[row, : len(text) - 1], expected) < 1e-3


def test_evaluate_loglikelihoods(scorer):
    """A shared prefix is read once; every continuation goes on from a copy of its cache."""
    model = build(**VARIANTS["released layout"])
    lm = scorer.__new__(scorer)
    lm._model, lm._max_tokens, lm._batch_size, lm.use_chat_template = model, None, 2, False
    encode = lambda text, add_special_tokens: [int(x) for x in text.split()]
    lm.tokenizer = types.SimpleNamespace(encode=encode)
    words = lambda n, seed: " ".join(map(str, tokens(n, seed=seed)[0].tolist()))
    prefix = words(40, 1)
    pairs = [(prefix, " " + words(n, n)) for n in (1, 9, 30)] + [(words(11, 5), " " + words(25, 6))]
    found = lm.loglikelihood([types.SimpleNamespace(args=p) for p in pairs])
    for (context, rest), (score, _) in zip(pairs, found, strict=True):
        ids = encode(context + rest, True)
        expected = log_probs(model, ids)[len(encode(context, True)) - 1 :].sum().item()
        assert score == pytest.approx(expected, abs=2e-3)
    rolling = lm.loglikelihood_rolling([types.SimpleNamespace(args=(c + r,)) for c, r in pairs])
    for (context, rest), score in zip(pairs, rolling, strict=True):
        expected = log_probs(model, encode(context + rest, True)).sum().item()
        assert score == pytest.approx(expected, abs=1e-2)


@pytest.mark.feature(
    "Quantise or dequantise a converted folder",
    "`mlx_lm.convert`, `convert.py`",
    "works",
)
def test_convert_of_a_converted_folder(folder, tmp_path, monkeypatch):
    """mlx_lm.convert: quantise, quantise again otherwise, dequantise."""
    command = importlib.import_module("mlx_lm.convert")  # mlx_lm.convert is its function
    to = lambda name, source, *flags: run(
        monkeypatch,
        command,
        *("--hf-path", source, "--mlx-path", tmp_path / name, "--trust-remote-code", *flags),
    )
    to("q8", folder, "-q", "--q-bits", 8, "--q-group-size", 32)
    to("plain", tmp_path / "q8", "-d")
    to("q4", tmp_path / "plain", "-q", "--q-bits", 4, "--q-group-size", 64)
    # mlx-lm leaves quantised layers as they are: to quantise otherwise, dequantise first.
    to("twice", tmp_path / "q8", "-q", "--q-bits", 4)

    text, out, sizes = tokens(60), {}, {}
    for name, bits in (("q8", 8), ("plain", None), ("q4", 4)):
        model, _ = load(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert (tmp_path / name / config["model_file"]).is_file()
        assert config.get("quantization", {}).get("bits") == bits
        sizes[name] = sum(w.nbytes for _, w in tree_flatten(model.parameters()))
        out[name] = model(text)
    assert sizes["q4"] < sizes["q8"] < sizes["plain"]
    out["twice"] = load(tmp_path / "twice")[0](text)
    assert worst(out["twice"], out["q8"]) < 1e-4 and worst(out["plain"], out["q8"]) < 1e-3
    exact = load(folder)[0](text)
    assert 0 < worst(out["q8"], exact) < 0.1 * mx.abs(exact).max().item()
    assert worst(out["q8"], exact) < worst(out["q4"], exact)


@pytest.mark.feature("List and delete models", "`mlx_lm.manage`", "works")
def test_manage(folder, tmp_path, monkeypatch, capsys):
    """mlx_lm.manage lists and deletes a converted model in the Hub's cache on this machine."""
    repo = tmp_path / "hub" / "models--someone--ksa-mlx"
    snapshot = repo / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("a" * 40)
    for file in folder.iterdir():
        blob = repo / "blobs" / file.name
        blob.write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(repo.parent))
    scan = manage.scan_cache_dir
    monkeypatch.setattr(manage, "scan_cache_dir", lambda: scan(repo.parent))
    run(monkeypatch, manage, "--scan", "--pattern", "ksa")
    assert "someone/ksa-mlx" in capsys.readouterr().out
    monkeypatch.setattr("builtins.input", lambda prompt: "y")
    run(monkeypatch, manage, "--delete", "--pattern", "ksa")
    assert "deleted successfully" in capsys.readouterr().out
    assert not snapshot.exists()


@pytest.mark.feature("Input embeddings", "`generate_step(..., input_embeddings=...)`", "works")
def test_input_embeddings_through_generate_step():
    """Embeddings instead of ids, in prefill steps that end inside chunks and beyond the window."""
    model = build(**VARIANTS["two summaries"])
    text = tokens(45)[0]
    ids = [t for t, _ in generate_step(text, model, max_tokens=9, prefill_step_size=16)]
    embedded = model.model.embed_tokens(text)
    for prompt in (text, mx.array([], dtype=mx.int32)):
        found = generate_step(
            prompt, model, max_tokens=9, prefill_step_size=16, input_embeddings=embedded
        )
        assert [t for t, _ in found] == ids


@pytest.mark.feature("Logits processors", "`generate_step(..., logits_processors=...)`", "works")
def test_logits_processors_see_the_text():
    model = build()
    text = tokens(40)[0]
    plain = [t for t, _ in generate_step(text, model, max_tokens=12)]
    seen = []

    def forbid_even(ids, logits):
        seen.append(ids.size)
        return mx.where(mx.arange(logits.shape[-1]) % 2 == 0, -mx.inf, logits)

    processors = [forbid_even, *make_logits_processors(repetition_penalty=1.5)]
    found = [t for t, _ in generate_step(text, model, max_tokens=12, logits_processors=processors)]
    assert all(t % 2 for t in found) and any(t % 2 == 0 for t in plain)
    assert seen[:12] == list(range(40, 52))
