"""Quantised KV: the rolling summary cache in mlx's affine format."""

import functools

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import QuantizedKVCache

import ksa_mlx
from ksa_mlx.attention.plan import BLOCK
from ksa_mlx.benchmark.models import filled, ksa_args
from ksa_mlx.cache.rolling import RollingSummaryCache

from ._models import build, tokens
from .test_splits import roundtrip

SHAPE = {
    "head_dim": 64,
    "hidden_size": 128,
    "summary_sliding_chunk_num": [1, 2000, 3],
    "mix_coeff": 0,
}

model_of = functools.lru_cache(None)(lambda: build(**SHAPE))


def quantized(model, bits, group=64, rollback=0, text_bits=None):
    caches = ksa_mlx.make_cache(model, rollback, text_bits)
    return [c.to_quantized(group_size=group, bits=bits) for c in caches]


def run(model, cache, text, sizes):
    outs, at = [], 0
    while at < text.shape[1]:
        n = min(sizes[len(outs) % len(sizes)], text.shape[1] - at)
        outs.append(model(text[:, at : at + n], cache=cache))
        mx.eval(outs[-1], [c.state for c in cache])
        at += n
    return mx.concatenate(outs, axis=1)


@pytest.mark.parametrize("bits,group", [(8, 64), (8, 32), (4, 64), (4, 32)])
def test_close_to_the_plain_cache(bits, group):
    """The logits' error is that of the format: small at 8 bits, bounded at 4."""
    model, text = model_of(), tokens(150)
    exact = model(text)
    got = run(model, quantized(model, bits, group), text, [40, 1, 3, 1])
    error = mx.abs(got - exact).mean() / mx.abs(exact).mean()
    assert 0 < error.item() < {8: 0.02, 4: 0.25}[bits]


@pytest.mark.parametrize("text_bits", [None, 4])
def test_any_split_is_the_same(text_bits):
    """Every token is read as it is held, in whichever pieces the text comes."""
    model, text = build(**{**SHAPE, "summary_sliding_chunk_num": [1, 3, 0]}), tokens(120, 2)
    one = run(model, quantized(model, 8, text_bits=text_bits), text, [1])
    for sizes in ([7], [30, 1], [120], [19, 2]):
        # A number at the edge of two of the format's steps may be rounded either way.
        got = run(model, quantized(model, 8, text_bits=text_bits), text, sizes)
        assert mx.abs(got - one).mean().item() < 2e-3 * mx.abs(one).mean().item(), sizes


def test_many_rows_go_block_by_block():
    """In full layers, whose scores of all rows would be held."""
    model, text = model_of(), tokens(BLOCK * 2 + 90)
    one = run(model, quantized(model, 8), text, [50])
    for sizes in ([BLOCK * 2 + 90], [20, BLOCK + 1]):
        got = run(model, quantized(model, 8), text, sizes)
        assert mx.abs(got - one).mean().item() < 2e-3 * mx.abs(one).mean().item(), sizes


def test_text_in_more_bits():
    """8 bits for text and 4 for summaries: nearly the bytes of 4, much less error."""
    model, text = build(**{**SHAPE, "summary_sliding_chunk_num": 1}), tokens(150)
    exact, error = model(text), {}
    for text_bits in (4, 8):
        got = run(model, quantized(model, 4, text_bits=text_bits), text, [40, 1, 3, 1])
        error[text_bits] = mx.abs(got - exact).mean().item()
    assert error[8] < 0.7 * error[4]
    args, held = ksa_args("4b"), {}
    for text_bits in (4, 8):
        cache = filled(RollingSummaryCache(8, 1, 128), args, 131072, mx.bfloat16, random=False)
        held[text_bits] = cache.to_quantized(64, 4, text_bits).nbytes
    assert 1 < held[8] / held[4] < 1.06


def test_bytes_fall_as_the_bits_say():
    args, held = ksa_args("4b"), {}
    for bits in (16, 8, 4):
        cache = filled(RollingSummaryCache(8, 1, 128), args, 20000, mx.bfloat16, random=False)
        held[bits] = (cache if bits == 16 else cache.to_quantized(64, bits)).nbytes
    # A scale and a bias of 16 bits a group of 64. Room for 2,560 summaries and 1,032 tokens, in
    # whole pages of scales: 512 slots.
    slots = 4096
    for bits in (8, 4):
        assert held[bits] == 2 * slots * 8 * 128 * (bits + 0.5) / 8
        assert held[bits] <= (held[16] + 2 * 512 * 8 * 128 * 2) * (bits + 0.5) / 16


@pytest.mark.parametrize("text_bits", [None, 4])
def test_rollback_and_files(text_bits):
    model, text = model_of(), tokens(100)
    plain = run(model, quantized(model, 8, text_bits=text_bits), text, [5])
    cache = quantized(model, 8, rollback=20, text_bits=text_bits)
    run(model, cache, text[:, :70], [5])
    assert [c.trim(17) for c in cache] == [17] * 3
    cache = roundtrip(cache)
    bits = [one.form.bits for one in cache[0].visible]
    assert bits == ([8, text_bits] if text_bits else [8])
    got = run(model, cache, text[:, 53:], [4])
    assert mx.abs(got - plain[:, 53:]).mean().item() < 2e-3 * mx.abs(plain).mean().item()


@pytest.mark.feature(
    "Quantised KV cache", "`--kv-bits` of `mlx_lm.generate` and `generate.py`", "works"
)
def test_through_generate_step():
    """mlx-lm quantises our caches by its own flags, in the middle of the text too."""
    model = model_of()
    prompt = tokens(60)[0]
    for start, text_bits in ((0, None), (70, None), (70, 4)):
        cache = ksa_mlx.make_cache(model, text_bits=text_bits)
        out = list(
            generate_step(
                prompt,
                model,
                max_tokens=30,
                prompt_cache=cache,
                kv_bits=8,
                kv_group_size=32,
                quantized_kv_start=start,
            )
        )
        assert len(out) == 30
        kinds = [RollingSummaryCache, QuantizedKVCache, RollingSummaryCache]
        assert [type(c) for c in cache] == kinds
        assert {one.form.group_size for one in cache[0].visible} == {32}
        bits = [one.form.bits for one in cache[0].visible]
        assert bits == ([8, text_bits] if text_bits else [8])


def test_a_group_that_does_not_divide():
    model = build(head_dim=16)
    cache = [c.to_quantized(group_size=64, bits=8) for c in model.make_cache()]
    with pytest.raises(ValueError, match="found 64, expected a divisor of head_dim = 16"):
        model(tokens(3), cache=cache)


def test_a_saved_plain_cache_keeps_the_bits_of_its_text():
    """`text_bits` is a wish for later: what is saved before mlx-lm quantises still has it."""
    model = model_of()
    cache = ksa_mlx.make_cache(model, text_bits=8)
    model(tokens(60), cache=cache)
    loaded = roundtrip(cache)[0].to_quantized(group_size=32, bits=4)
    assert [one.form.bits for one in loaded.visible] == [4, 8]


def test_a_state_of_another_layout_is_refused():
    """Also one whose first arrays another host would take for plain keys and values."""
    cache = ksa_mlx.make_cache(model_of())[0]
    for state in ((mx.zeros((1, 2, 8, 64)), mx.zeros((1, 2, 8, 64))), (mx.array([1, 8, 1]),)):
        with pytest.raises(ValueError, match="of another version of ksa-mlx"):
            RollingSummaryCache.from_state(state)
    assert cache.state[0].ndim == 1
