"""Attention to train on: its blocks give the plain gradient, and hold the scores of one."""

from functools import partial

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import grad_checkpoint

from ksa_mlx.attention import blockwise, decode, plan
from ksa_mlx.attention.plan import LONG, Call
from ksa_mlx.model import DecoderLayer

from ._models import VARIANTS, build, tokens, worst


def loss(model, text):
    logits = model(text).astype(mx.float32)
    return nn.losses.cross_entropy(logits[:, :-1], text[:, 1:]).mean()


def gradients(model, text):
    value, grads = nn.value_and_grad(model, loss)(model, text)
    return value, dict(tree_flatten(grads))


@pytest.fixture
def small(monkeypatch):
    """Blocks of 16 rows; call it to have them computed again in the backward."""
    monkeypatch.setattr(plan, "BLOCK", 16)
    monkeypatch.setattr(blockwise, "BLOCK", 16)
    monkeypatch.setattr(decode, "BLOCK", 16)
    return lambda: monkeypatch.setattr(plan, "LONG", 20)


@pytest.mark.parametrize(
    "name", ["released layout", "full layer inside", "two summaries", "no window", "qwen2"]
)
def test_gradients_are_the_plain_ones(name, small):
    model, text = build(**VARIANTS[name]), tokens(75, 2)
    model.train()
    value, expected = gradients(model, text)
    small()
    found, grads = gradients(model, text)
    assert abs(found - value).item() < 1e-6
    for key, g in grads.items():
        assert worst(g, expected[key]) <= 1e-5 * mx.abs(expected[key]).max().item(), key
    model.eval()
    exact = model(text)
    model.train()
    assert worst(model(text), exact) < 1e-4


def test_gradients_in_half_precision(small):
    """Those of keys and values are sums over all blocks: rounded once, not in every block."""
    model, text = build(**VARIANTS["full layer inside"]), tokens(75, 2)
    model.train()
    _, exact = gradients(model, text)
    model.set_dtype(mx.bfloat16)
    _, plain = gradients(model, text)
    small()
    _, found = gradients(model, text)
    error = lambda grads: sum(
        mx.square(g.astype(mx.float32) - exact[key]).sum().item() for key, g in grads.items()
    )
    assert {g.dtype for g in found.values()} == {mx.bfloat16}
    assert error(found) < 1.2 * error(plain)


@pytest.mark.slow
def test_compiled_and_checkpointed(small, monkeypatch):
    """As mlx-lm's trainer runs it."""
    shape = {"num_hidden_layers": 2, "summary_sliding_chunk_num": [1, 2000]}
    model, text = build(**shape), tokens(75, 2)
    model.train()
    value, expected = gradients(model, text)
    small()
    monkeypatch.setattr(DecoderLayer, "__call__", DecoderLayer.__call__)  # undone afterwards
    grad_checkpoint(model.layers[0])
    step = mx.compile(partial(gradients, model), inputs=[model.state])
    found, grads = step(text)
    assert abs(found - value).item() < 1e-6
    for key, g in grads.items():
        assert worst(g, expected[key]) <= 1e-5 * mx.abs(expected[key]).max().item(), key


def test_when():
    """In training, without a cache, where the text is long."""
    args = build().args
    assert Call(args, LONG + 1, None, True, True).blockwise
    assert not Call(args, LONG, None, True, True).blockwise
    assert not Call(args, LONG + 1, None, True, False).blockwise
    cache = build().make_cache()[0]
    assert not Call(args, LONG + 1, cache, True, True).blockwise


@pytest.mark.slow
@pytest.mark.parametrize("window", [16, 9000], ids=["windowed", "full"])
def test_memory_does_not_grow_with_the_scores(window, monkeypatch):
    """Of a backward through a layer of 2 heads: twice the text, twice the peak."""
    shape = {"num_hidden_layers": 1, "num_attention_heads": 2, "mix_coeff": 1.0}
    windows = {"summary_sliding_chunk_num": window, "summary_chunk_size": 8}
    model = build(**shape, **windows, max_position_embeddings=65536)
    model.train()

    def peak(n):
        x = mx.random.normal((1, n, 32), key=mx.random.key(n))
        mean = lambda model, x: model.model(None, None, x).square().mean()
        mx.eval(x)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(nn.value_and_grad(model, mean)(model, x))
        return mx.get_peak_memory() - before

    short, long = peak(2048), peak(6144)
    assert long < 3.5 * short
    monkeypatch.setattr(plan, "LONG", 10**9)
    assert peak(6144) > 2 * long
