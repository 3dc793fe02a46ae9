"""Quantised keys and values in batches: each row is as it is alone, whenever it comes."""

import functools
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import ksa_mlx
from ksa_mlx.cache.batch import BatchRollingSummaryCache
from ksa_mlx.cache.full import BatchFullCache, FullCache, SplitKVCache
from ksa_mlx.chat import reading
from ksa_mlx.stock.batching import BatchGenerator, Quantize

from ._models import build, tokens, worst
from ._server import OURS, serving
from .soak import KV_GROUP, make_requests, solo_answers
from .test_splits import roundtrip

SHAPE = {"head_dim": 32, "hidden_size": 64, "summary_sliding_chunk_num": [1, 2000, 3]}

model_of = functools.lru_cache(None)(lambda name: build(**CASES[name]))
CASES = {
    "full layer inside": SHAPE,
    "windowed layers": {**SHAPE, "summary_sliding_chunk_num": 2},
    "full layers": {**SHAPE, "summary_sliding_chunk_num": 2000},
}


def caches(model, quantize, **bits):
    """One sequence's caches, quantised as soon as they are to be."""
    made = ksa_mlx.make_cache(model, **bits)
    if quantize.start == 0:
        made = [c.to_quantized(quantize.group_size, quantize.bits) for c in made]
    return made


def alone(model, prompt, n, quantize, **bits):
    """Greedy ids, and the row's caches, read token by token behind the start by plain calls."""
    cache = caches(model, quantize, **bits)
    given = {
        "kv_bits": quantize.bits,
        "kv_group_size": quantize.group_size,
        "quantized_kv_start": quantize.start,
    }
    for _ in reading.read([(model, cache)], prompt[:-1], 16, given):
        pass
    token, out = prompt[-1], []
    while len(out) < n:
        logits = model(mx.array([[token]]), cache=cache)[0, -1]
        if cache[0].offset >= quantize.start:
            cache = [
                c.to_quantized(quantize.group_size, quantize.bits)
                if hasattr(c, "to_quantized")
                else c
                for c in cache
            ]
        token = int(logits.argmax())
        out.append(token)
    return out, cache


def batched(model, prompts, counts, quantize, late=2):
    """Of each prompt: greedy ids and the caches that are handed out with the last."""
    generator = BatchGenerator(
        model,
        quantize=quantize,
        completion_batch_size=4,
        prefill_batch_size=2,
        prefill_step_size=16,
    )
    answers, order, left = {}, {}, {}
    waiting = list(enumerate(prompts))
    for step in range(500):
        if waiting and step % late == 0:
            i, prompt = waiting.pop(0)
            order[generator.insert([prompt], max_tokens=[counts[i]])[0]] = i
        for r in generator.next_generated():
            answers.setdefault(r.uid, []).append(r.token)
            if r.finish_reason:
                left[order[r.uid]] = r.prompt_cache
        if len(left) == len(prompts):
            break
    generator.close()
    return {order[uid]: got for uid, got in answers.items()}, left


@pytest.mark.feature(
    "Quantised KV cache, concurrent clients", "`python -m ksa_mlx server --kv-bits`",
    "works with our command: batched, each row as alone; `mlx_lm.server` serves one after the other",
)  # fmt: skip
@pytest.mark.quick(2)
@pytest.mark.parametrize(("start", "bits"), [(0, 4), (30, 8)])
@pytest.mark.parametrize("name", CASES)
def test_rows_are_as_alone(name, start, bits):
    """Rows that come before and after quantisation starts, and that reach it in the middle of
    their prompt and of their answer."""
    model, quantize = model_of(name), Quantize(start, bits, 32)
    prompts = [tokens(n, seed=n)[0].tolist() for n in (1, 12, 25, 29, 30, 31, 64)]
    counts = [10 + i for i in range(len(prompts))]
    answers, left = batched(model, prompts, counts, quantize)
    for i, prompt in enumerate(prompts):
        ids, _ = alone(model, prompt, counts[i], quantize)
        assert answers[i] == ids, i
        if len(prompt) + counts[i] > start:
            for c in left[i]:
                held = c.visible[-1].form.bits if hasattr(c, "visible") else c.bits
                assert held == bits


@pytest.mark.slow
@pytest.mark.parametrize("start", [0, 20])
def test_a_rows_numbers_are_those_alone(start):
    """What a row's caches hold, beside others and alone: attention is row by row, and all else
    differs by what projections over other numbers of rows round otherwise."""
    model, quantize = model_of("full layer inside"), Quantize(start, 4, 32)
    prompts = [tokens(n, seed=n)[0].tolist() for n in (37, 37, 37)]
    _, together = batched(model, prompts, [9] * 3, quantize, late=1)
    _, single = batched(model, prompts[:1], [9], quantize)
    for c, d in zip(together[0], single[0], strict=True):
        assert type(c) is type(d)
        for (_, x), (_, y) in zip(tree_flatten(c.state), tree_flatten(d.state), strict=True):
            if isinstance(x, mx.array) and x.dtype != mx.uint32:
                assert worst(x, y) < 1e-4


@pytest.mark.slow
def test_clients_at_once(notebook_models, tmp_path):
    """The real server batches them, and each gets the answer of its request alone."""
    asked = [r for r in make_requests(12, 3) if r["max_tokens"] < 40][:6]
    expected = solo_answers(notebook_models[0], asked, 4)
    bits = ("--kv-bits", "4", "--kv-group-size", str(KV_GROUP), "--quantized-kv-start", "0")
    with (
        serving(OURS, notebook_models[0], tmp_path / "log", *bits) as server,
        ThreadPoolExecutor(len(asked)) as pool,
    ):
        got = list(pool.map(lambda body: server.ask(body, "messages" in body)["text"], asked))
    assert got == expected


def test_nothing_is_padded_or_copied():
    """Joining and leaving moves no key: the batch holds the very arrays of its rows."""
    model = model_of("full layer inside")
    rows = []
    for n in (50, 9):
        cache = caches(model, Quantize(0, 8, 32))
        mx.eval(model(tokens(n), cache=cache), [c.state for c in cache])
        rows.append(cache)
    held = [sum(c.nbytes for c in cache) for cache in rows]
    batch = [
        kind.merge([cache[i] for cache in rows])
        for i, kind in ((0, BatchRollingSummaryCache), (1, BatchFullCache))
    ]
    before = mx.get_active_memory()
    batch[0].extend(BatchRollingSummaryCache.merge([rows[0][0]]))
    batch[1].extend(BatchFullCache.merge([rows[0][1]]))
    batch[1].filter([2, 1])
    mx.eval([c.state for c in batch])
    assert mx.get_active_memory() - before < 1000
    assert batch[1].nbytes == rows[0][1].nbytes + rows[1][1].nbytes < sum(held)
    assert batch[1].offset.tolist() == [50, 9]


def test_bits_of_the_values():
    """Keys and values in bits of their own, in every layer, also through a file."""
    model, text = model_of("full layer inside"), tokens(90)
    exact, error, held = model(text), {}, {}
    for bits, value_bits in ((8, None), (8, 4), (4, 8), (4, None)):
        cache = ksa_mlx.make_cache(model, value_bits=value_bits)
        assert isinstance(cache[1], FullCache) == (value_bits is not None)
        cache = roundtrip([c.to_quantized(32, bits) for c in roundtrip(cache)])
        outs = [model(text[:, a : a + 30], cache=cache) for a in (0, 30)]
        cache = roundtrip(cache)
        outs += [model(text[:, a : a + 1], cache=cache) for a in range(60, 90)]
        error[bits, value_bits] = mx.abs(mx.concatenate(outs, axis=1) - exact).mean().item()
        held[bits, value_bits] = sum(c.nbytes for c in cache)
        kinds = {(one.form.bits, one.form.value_bits) for one in cache[0].visible}
        assert kinds == {(bits, value_bits or bits)}
        if value_bits:
            assert isinstance(cache[1], SplitKVCache)
            assert (cache[1].bits, cache[1].value_bits) == (bits, value_bits)
    assert held[4, None] < held[8, 4] == held[4, 8] < held[8, None]
    assert error[8, None] < min(error[8, 4], error[4, 8]) < error[4, None]


def test_a_split_cache_grows_and_takes_back():
    """Over the edge of its room, against mlx-lm's own where keys and values have the same bits."""
    theirs = FullCache(8).to_quantized(32, 8)
    plain = [theirs, ksa_mlx.make_cache(model_of("full layers"))[0].to_quantized(32, 8)]
    for n in (200, 100, 1, 300):
        pair = [mx.random.normal((1, 2, n, 32), key=mx.random.key(n + i)) for i in (0, 1)]
        got, expected = (c.update_and_fetch(*pair) for c in plain)
        for x, y in zip(tree_flatten(got), tree_flatten(expected), strict=True):
            assert mx.array_equal(x[1], y[1])
        for c in plain:
            c.trim(30)
    assert type(plain[0]) is SplitKVCache and type(plain[1]) is not SplitKVCache
