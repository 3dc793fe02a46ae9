"""Calls of few tokens, across the edges of chunks too, change the window's buffers in place."""

import copy
import random

import mlx.core as mx
import numpy as np
import pytest

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.attention.decode import OPERATIONS, arm
from ksa_mlx.benchmark.models import filled
from ksa_mlx.cache.rolling import RollingSummaryCache

from ._models import build, tokens, worst

LARGE = {
    "summary_sliding_chunk_num": 500,
    "summary_chunk_size": 8,
    "head_dim": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "max_position_embeddings": 200000,
}


def where(cache) -> list[int]:
    """The addresses of a cache's buffers: a copy has another."""
    planes = [x for buffer in cache.storage.buffers for x in buffer.planes]
    return [np.asarray(x).__array_interface__["data"][0] for x in planes]


def peaks(cache, model, schedule, in_place=True):
    """Bytes above what is held, of each call of a schedule: (tokens read, tokens taken back)."""
    found, moved = [], []
    for read, back in schedule:
        at, base = where(cache[0]), mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(model(tokens(read), cache=cache))
        found.append(mx.get_peak_memory() - base)
        for c in cache:
            c.trim(back)
        mx.eval([c.state for c in cache])
        moved.append(sum(a != b for a, b in zip(at, where(cache[0]), strict=True)))
    assert not (in_place and any(moved)), moved
    return found


@pytest.mark.parametrize("bits", [None, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9, 16])
def test_verification_copies_no_window(rows, bits):
    """Nearly all drafts are rejected, or nearly none, from every place within a chunk: no buffer
    ever moves, neither in the call nor by what is taken back."""
    n = 20000 - 6
    model = build(**LARGE)
    cache = [filled(c, model.args, n, mx.float32) for c in ksa_mlx.make_cache(model, 64)]
    if bits:
        cache = [c.to_quantized(32, bits) for c in cache]
    mx.eval(cache[0].state)
    # The first chunk moves what nobody has read ahead, and makes room.
    peaks(cache, model, [(1, 0)] * 9, in_place=False)
    few, many = [(rows, rows - 1)] * 20, [(rows, min(1, rows - 1))] * 12
    got = peaks(cache, model, few + many)
    if not bits:  # MLX's operations on packed numbers make contiguous copies of what they read
        held = sum(x.nbytes for x in cache[0].storage.text.planes)
        assert max(got) < held / 2, (held, got)


def test_it_would_be_seen():
    """The same where somebody holds the buffers."""
    model = build(**LARGE)
    cache = [filled(c, model.args, 20000, mx.float32) for c in ksa_mlx.make_cache(model, 64)]
    peaks(cache, model, [(1, 0)] * 9, in_place=False)
    held = copy.deepcopy(cache)
    with pytest.raises(AssertionError, match="2"):
        peaks(cache, model, [(2, 1)])
    assert held[0].offset == 20009


@pytest.mark.parametrize("shape", [(4, 0), (4, 1), (4, 2), (3, 3), (8, 2), (1, 3)], ids=str)
@pytest.mark.parametrize("summaries", [1, 2])
def test_few_tokens_and_trims(shape, summaries):
    """Random calls of 1 to 2 k tokens, each taken back in part, against the definition."""
    k, window = shape
    model = build(
        summary_chunk_size=k, summary_sliding_chunk_num=window, summary_token_num=summaries
    )
    text = tokens(150, seed=k)
    logits = naive.forward(model, text)
    pick, cache, at = random.Random(window), ksa_mlx.make_cache(model, 2 * k), 0
    furthest = 0
    while at < 140:
        n = min(pick.randint(1, 2 * k), 150 - at)
        out = model(text[:, at : at + n], cache=cache)
        assert worst(out, logits[:, at : at + n]) < 1e-3, (at, n)
        furthest = max(furthest, at + n)
        reach = min(2 * k - (furthest - at - n), at + n - 1)
        back = min(reach, pick.choice([0, 0, pick.randint(0, n - 1), pick.randint(0, 2 * k)]))
        for c in cache:
            c.trim(back)
        at = cache[0].offset
        summarised, ranges = cache[0].place.seen(at)
        if at:
            # All text of the window, each slot once, and a summary for each token before it.
            slots = [x for a, b in ranges for x in range(a, b)]
            first = max(0, (at - 1) // k - window)
            assert len(slots) == len(set(slots)) == at - first * k
            assert summarised == first * summaries


@pytest.mark.parametrize(
    ("bits", "text_bits", "value_bits", "rows", "name"),
    [
        (None, None, None, 5, "kernel"),
        (8, None, 4, 1, "kernel"),
        (8, None, 4, 5, "kernel"),
        (4, 8, 4, 1, "kernel"),
        (4, 8, 4, 5, OPERATIONS),
        (8, None, 6, 1, OPERATIONS),
    ],
)
def test_what_the_kernel_takes(bits, text_bits, value_bits, rows, name):
    """Across an edge two ranges of one buffer, or with summaries in another three, which it does
    not; and of bits those that it reads, of keys and of values."""
    cache = RollingSummaryCache(8, 1, 4, rollback=16, text_bits=text_bits, value_bits=value_bits)
    pair = [mx.zeros((1, 1, 60, 32))] * 2
    cache.extend(*pair, 0, 3, tuple(x[:, :, :3] for x in pair))
    if bits:
        cache = cache.to_quantized(32, bits)
    moves = cache.place.advance(rows + 2, 3, 4)
    cache.begin(moves, tuple(x[:, :, : rows + 2] for x in pair), tuple(x[:, :, :1] for x in pair))
    seen = cache.seen(*moves.pieces[-1][2:])
    assert len(moves.pieces) == (2 if rows > 2 else 1)
    assert arm("metal", mx.zeros((1, 2, 1, 32)), [seen]) == name
