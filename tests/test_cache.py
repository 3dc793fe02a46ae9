"""The rolling summary cache by itself: what it holds, keeps and refuses."""

import copy

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import ksa_mlx
from ksa_mlx.benchmark.models import filled, held_bytes
from ksa_mlx.cache.place import CAPACITY
from ksa_mlx.cache.rolling import RollingSummaryCache
from ksa_mlx.cache.storage import PLAIN, Affine, Joined

from ._models import build, tokens, worst


def fed(model, n, rollback=0, step=1):
    cache = ksa_mlx.make_cache(model, rollback=rollback)
    text = tokens(n)
    for a in range(0, n, step):
        mx.eval(model(text[:, a : a + step], cache=cache))
    return cache


def test_held_bytes_of_the_4b():
    """Within 3 % of 4096 * (9 n + 27 (n / 8 + 1032)) at 128K: 6.8 GB against 19.3 GB."""
    n = 131072
    held = held_bytes("4b", n, mx.bfloat16)
    assert abs(held["ksa"] / (4096 * (9 * n + 27 * (n / 8 + 1032))) - 1) < 0.03
    assert held["qwen3"] == 4096 * 36 * n


def test_what_is_seen_is_contiguous():
    """At every length the visible slots are as many as the rule says."""
    k, s, W = 4, 2, 3
    model = build(summary_chunk_size=k, summary_token_num=s, summary_sliding_chunk_num=W)
    cache = ksa_mlx.make_cache(model)
    for n in range(1, 80):
        model(tokens(1), cache=cache)
        (seen,) = cache[0].visible
        first = max(0, (n - 1) // k - W)
        assert seen.stop - seen.start == first * s + n - first * k


def test_capacity_grows_in_steps():
    model = build(summary_sliding_chunk_num=100, summary_chunk_size=4)
    cache, capacities = ksa_mlx.make_cache(model), []
    for _ in range(12):
        model(tokens(300), cache=cache)
        (seen,) = cache[0].visible
        capacities.append(seen.keys.shape[2])
    assert len(set(capacities)) < 8
    held = seen.stop - seen.start
    assert held <= capacities[-1] <= held + 2 * CAPACITY + 4


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_a_decode_step_copies_no_window(kv_heads):
    """Peak memory of any decode step stays far below the cache: it is changed in place."""
    model = build(
        summary_sliding_chunk_num=600,
        summary_chunk_size=4,
        head_dim=64,
        num_key_value_heads=kv_heads,
        num_hidden_layers=1,
        max_position_embeddings=200000,
    )
    dtype = mx.float32
    cache = [filled(c, model.args, 40000 - 6, dtype) for c in model.make_cache()]
    held, peaks = cache[0].nbytes, {}
    for _ in range(4 * 17):
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(model(tokens(1), cache=cache))
        peaks[cache[0].offset] = mx.get_peak_memory() - base
    # Attention's scores and the summary rows' text are small beside keys and values.
    late = {at: p for at, p in peaks.items() if at > 40000 - 6 + 5}
    assert max(late.values()) < held / 4, (held, late)


def test_rollback_is_for_ever():
    model = build()
    cache = ksa_mlx.make_cache(model, rollback=5)
    for _n in range(60):
        assert all(c.is_trimmable() for c in cache)
        model(tokens(1), cache=cache)
    windowed = cache[0]
    assert windowed.trim(5) == 5 and windowed.offset == 55
    with pytest.raises(ValueError, match=r"cannot take back 30 of 55 tokens.*rollback=5"):
        windowed.trim(30)
    assert windowed.offset == 55
    assert windowed.trim(1000) == 55 and windowed.empty() is False and windowed.offset == 0


def test_default_is_never_trimmable():
    model = build()
    cache = ksa_mlx.make_cache(model)
    assert not cache[0].is_trimmable()
    model(tokens(3), cache=cache)
    assert not cache[0].is_trimmable()
    with pytest.raises(ValueError, match="rollback=0"):
        cache[0].trim(1)
    model.rollback = 4
    assert model.make_cache()[0].is_trimmable()
    with pytest.raises(ValueError, match="rollback: found -1"):
        ksa_mlx.make_cache(model, rollback=-1)


def test_trimming_all_starts_anew():
    model = build()
    cache = fed(model, 50, rollback=50)
    assert [c.trim(50) for c in cache] == [50] * 3
    text = tokens(40, seed=3)
    assert worst(model(text, cache=cache), model(text)) < 1e-4


def test_rollback_costs_little():
    """Only the chunks that may come back are held twice, 16 tokens', and there is room for two
    chunks behind the open one."""
    model = build(summary_sliding_chunk_num=128, summary_chunk_size=8)
    held = [fed(model, 2047, r, step=512)[0].nbytes for r in (0, 16)]
    per_token = 2 * 2 * 8 * 4  # keys and values, KV heads, head_dim, bytes
    # Whole pages may have room for some of it already.
    assert 0 < held[1] - held[0] <= (2 + 2) * 8 * per_token


def test_the_reach_of_rollback():
    """It counts from the furthest token read, and a negative number is no trim."""
    cache = fed(build(), 100, rollback=5)[0]
    assert cache.trim(5) == 5
    with pytest.raises(ValueError, match="held from token"):
        cache.trim(8)
    with pytest.raises(ValueError, match="trim: found -1"):
        cache.trim(-1)
    assert cache.offset == 95


def test_save_and_load(tmp_path):
    model = build(summary_sliding_chunk_num=[1, 2000, 2])
    cache = fed(model, 45, rollback=6)
    path = str(tmp_path / "cache.safetensors")
    save_prompt_cache(path, cache, {"model": "x"})
    loaded, metadata = load_prompt_cache(path, return_metadata=True)
    assert metadata == {"model": "x"} and [c.offset for c in loaded] == [45] * 3
    clone = copy.deepcopy(cache)
    more = tokens(9, seed=4)
    expected = model(more, cache=cache)
    assert worst(model(more, cache=loaded), expected) == 0
    assert worst(model(more, cache=clone), expected) == 0
    # An empty cache too (mlx-lm's own KVCache cannot in all of its releases).
    save_prompt_cache(path, ksa_mlx.make_cache(build()))
    assert load_prompt_cache(path)[0].empty()


def test_text_without_its_summaries_is_refused():
    cache = RollingSummaryCache(4, 1, 2)
    x = mx.zeros((1, 1, 4, 8))
    for _ in range(3):
        moves = cache.place.advance(4, 0, 0)
        cache.begin(moves, (x, x), None)
    with pytest.raises(ValueError, match="0 chunks are summarised, 1 must be"):
        cache.place.advance(4, 0, 0)


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_large_planes_fill_whole_pages(bits):
    """Else MLX's pool may hand out a buffer that is too large to be changed in place."""
    form = PLAIN if bits == 16 else Affine(bits, 64)
    assert copy.deepcopy(form) is form and form is (Affine(bits, 64) if form.bits else PLAIN)
    storage = Joined(form)
    one = mx.zeros((1, 8, 1, 128), mx.bfloat16)
    for summaries in (0, 1, 300, 2000, 16384):
        storage.reserve(summaries, 1032, one, one)
        for plane in storage.text.planes:
            assert plane.nbytes < 65536 or plane.nbytes % 16384 == 0
        assert storage.text.slots == storage.left + storage.right
        assert 0 <= storage.left - summaries <= 256 + 512
