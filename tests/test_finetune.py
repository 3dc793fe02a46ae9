"""Fine-tuning by mlx-lm: gradients through summary rows, adapters, and the stock commands."""

import json
import random
import sys
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten, tree_map
from mlx_lm import fuse, lora
from mlx_lm.tuner.trainer import grad_checkpoint
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load

from ksa_mlx import naive
from ksa_mlx.model import DecoderLayer

from ._convert_helpers import add_tokenizer, convert, hub_folder
from ._models import VARIANTS, build, tokens, worst


def loss(model, text, forward=None):
    logits = (forward or type(model).__call__)(model, text)
    return nn.losses.cross_entropy(logits[:, :-1], text[:, 1:]).mean()


def with_adapters(model, dora=False, seed=1):
    """A frozen model with trainable adapters on every projection, which are not zero."""
    model.freeze()
    linear_to_lora_layers(
        model, len(model.layers), {"rank": 2, "scale": 2.0, "dropout": 0.0}, use_dora=dora
    )
    key = mx.random.key(seed)
    model.update(
        tree_map(lambda w: 0.3 * mx.random.normal(w.shape, key=key), model.trainable_parameters())
    )
    model.train()
    return model


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("name", ["released layout", "own projections", "own qk norms"])
def test_adapter_gradients_are_those_of_the_definition(name, dora):
    model, text = with_adapters(build(**VARIANTS[name]), dora), tokens(30, 2)
    grads = nn.value_and_grad(model, loss)(model, text)[1]
    expected = nn.value_and_grad(model, partial(loss, forward=naive.forward))(model, text)[1]
    expected = dict(tree_flatten(expected))
    found = dict(tree_flatten(grads))
    adapted = {key.rsplit(".", 2)[-2] for key in found}
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"} <= adapted
    assert ("k_proj_summary" in adapted) == (model.args.mix_coeff != 0)
    for key, g in found.items():
        assert worst(g, expected[key]) <= 2e-4 * max(1, mx.abs(expected[key]).max().item()), key
        assert mx.abs(g).max().item() > 0, key


@pytest.mark.parametrize("name", ["released layout", "two summaries", "different windows"])
def test_gradients_are_finite_differences(name):
    model, text, step = build(**VARIANTS[name]), tokens(30, 2), 5e-3
    model.train()
    grads = dict(tree_flatten(nn.value_and_grad(model, loss)(model, text)[1]))
    for key in (
        "summary_embedding",
        "layers.0.self_attn.k_proj.weight",
        "layers.1.mlp.up_proj.weight",
    ):
        key = f"model.{key}"
        weight = dict(tree_flatten(model.parameters()))[key]
        # Along the gradient itself: the slope is its length.
        direction = grads[key] / mx.linalg.norm(grads[key])
        at = []
        for sign in (1, -1):
            model.load_weights([(key, weight + sign * step * direction)], strict=False)
            at.append(loss(model, text).item())
        model.load_weights([(key, weight)], strict=False)
        slope = mx.linalg.norm(grads[key]).item()
        assert abs((at[0] - at[1]) / (2 * step) - slope) < 0.02 * slope, key


def test_old_text_is_trained_through_summaries_only():
    """How far back the last token's loss has a gradient. 60 tokens, chunks of 4, window 2."""

    def reach(model):
        text = tokens(60)
        last = lambda x: model(text, input_embeddings=x)[0, -1].square().sum()
        return mx.abs(mx.grad(last)(model.model.embed_tokens(text))).max(axis=(0, 2))

    # A first layer's summaries carry the summary embedding only, no text.
    one = reach(build(num_hidden_layers=1, mix_coeff=1.0))
    assert one[:48].max().item() == 0 and one[48:].min().item() > 0
    # A second layer's have read the text; without them two windows reach back to token 40.
    model = build(num_hidden_layers=2, mix_coeff=1.0)
    assert reach(model).min().item() > 0
    attn = model.layers[1].self_attn
    for proj in (attn.k_proj_summary, attn.v_proj_summary):
        proj.weight = mx.zeros_like(proj.weight)
    two = reach(model)
    assert two[:40].max().item() == 0 and two[40:].min().item() > 0


@pytest.mark.slow
@pytest.mark.feature("Gradient checkpointing", "`mlx_lm.lora --grad-checkpoint`", "works")
@pytest.mark.parametrize("name", ["full layer inside", "two summaries", "bypass"])
def test_gradient_checkpointing(name, monkeypatch):
    """mlx-lm's `--grad-checkpoint`, inside mx.compile as its trainer runs it."""
    model, text = with_adapters(build(**VARIANTS[name])), tokens(40, 2)
    expected, grads = nn.value_and_grad(model, loss)(model, text)
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # undone afterwards
    grad_checkpoint(model.layers[0])
    step = mx.compile(
        lambda text: nn.value_and_grad(model, loss)(model, text), inputs=[model.state]
    )
    found, again = step(text)
    assert abs(found - expected).item() < 1e-6
    grads = dict(tree_flatten(grads))
    assert all(worst(g, grads[key]) <= 1e-5 for key, g in tree_flatten(again))


# The stock commands, on a folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A converted small model and sentences that are longer than its window."""
    place = tmp_path_factory.mktemp("finetune")
    source = hub_folder(place / "hub", "hybrid_mix1")
    add_tokenizer(source)
    assert convert(source, place / "model", "--dtype", "float32") == 0
    assert convert(source, place / "quantised", "-q", "--q-group-size", "32") == 0
    r = random.Random(0)
    for split in ("train", "valid", "test"):
        with open(place / f"{split}.jsonl", "w") as f:
            for _ in range(8):
                # The second half says the first again.
                words = [f"w{r.randrange(90)}" for _ in range(40)]
                f.write(json.dumps({"text": " ".join(words * 2)}) + "\n")
    return place


def run(monkeypatch, command, *argv):
    monkeypatch.setattr(sys, "argv", ["mlx_lm", *map(str, argv), "--trust-remote-code"])
    command.main()


def train(monkeypatch, folder, model, adapters, kind, *flags):
    """The loss curve of `mlx_lm.lora`: (iteration, training loss)."""
    curve = []

    class Report:
        def on_train_loss_report(self, info):
            curve.append(info["train_loss"])

        def on_val_loss_report(self, info):
            assert info["val_loss"] > 0

    monkeypatch.setattr(lora, "get_reporting_callbacks", lambda *args, **kwargs: Report())
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)
    options = (
        "--train --num-layers -1 --batch-size 2 --iters 16 --steps-per-report 4 --val-batches 1"
    )
    run(
        monkeypatch,
        lora,
        *("--model", folder / model, "--data", folder, "--adapter-path", adapters),
        *("--fine-tune-type", kind, "--learning-rate", "0.003", *options.split(), *flags),
    )
    return curve


@pytest.mark.slow
@pytest.mark.feature(
    "LoRA, DoRA, full fine-tuning, on quantised weights too",
    "`mlx_lm.lora`",
    "works, adapters also sit on the summaries' own projections; data sets of the Hub need "
    "`mlx-lm[train]`",
)
@pytest.mark.feature("Fusing adapters", "`mlx_lm.fuse`", "works; the fused folder loads")
@pytest.mark.parametrize(
    "kind, model, flags",
    [
        ("lora", "model", ["--grad-checkpoint"]),
        ("dora", "model", []),
        ("full", "model", []),
        ("lora", "quantised", ["--grad-accumulation-steps", "2"]),
    ],
)
def test_lora_and_fuse(kind, model, flags, folder, tmp_path, monkeypatch):
    curve = train(monkeypatch, folder, model, tmp_path / "adapters", kind, *flags)
    assert len(curve) == 4 and curve[-1] < curve[0] - 0.02
    adapted, _ = load(folder / model, adapter_path=str(tmp_path / "adapters"))
    before, _ = load(folder / model)
    keep = ["--model", folder / model, "--adapter-path", tmp_path / "adapters"]
    dequantize = ["--dequantize"] if model == "quantised" else []
    run(monkeypatch, fuse, *keep, "--save-path", tmp_path / "fused", *dequantize)

    fused, _ = load(tmp_path / "fused")
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["model_file"] and (tmp_path / "fused" / config["model_file"]).is_file()
    assert "quantization" not in config
    text = tokens(90)
    expected = adapted(text)
    assert worst(fused(text), expected) < 0.01
    assert worst(before(text), expected) > 0.1
    # Cached, beyond the window: what was trained is what is read.
    cache = fused.make_cache()
    outs = [fused(text[:, a : a + 30], cache=cache) for a in range(0, 90, 30)]
    assert worst(mx.concatenate(outs, axis=1), expected) < 0.01
