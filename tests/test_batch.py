"""Batches of sequences that join, leave, and are padded: each row is as if it ran alone."""

import functools
import os

import mlx.core as mx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.generate import BatchGenerator, generate_step

from ksa_mlx.cache.batch import BatchRollingSummaryCache

from ._models import VARIANTS, build, tokens, worst
from .test_splits import roundtrip

TOLERANCE = 1e-3
# The long run: KSA_MLX_EXAMPLES=2000 pytest tests/test_batch.py
EXAMPLES = int(os.environ.get("KSA_MLX_EXAMPLES", 4))

CASES = {**VARIANTS, "full layers only": {"summary_sliding_chunk_num": 2000}}

model_of = functools.lru_cache(None)(lambda name: build(**CASES[name]))


@functools.lru_cache(None)
def reference(name, which):
    """Text number `which` and its logits, run alone without a cache."""
    text = tokens(140, seed=100 + which)
    return text, model_of(name)(text)


class Row:
    """A sequence of the schedule: which text, and how far it is read."""

    def __init__(self, which, at=0):
        self.which, self.at = which, at


def check(name, rows, lengths, out):
    for b, (row, n) in enumerate(zip(rows, lengths, strict=True)):
        expected = reference(name, row.which)[1][:, row.at : row.at + n]
        assert worst(out[b : b + 1, :n], expected) <= TOLERANCE, (row.which, row.at, n)
        row.at += n


def feed(name, rows, lengths, cache):
    """One model call with right padding, as PromptProcessingBatch does it, in two halves."""
    longest = max(lengths)
    padding = [longest - n for n in lengths]
    texts = [
        reference(name, r.which)[0][:, r.at : r.at + n] for r, n in zip(rows, lengths, strict=True)
    ]
    padded = mx.concatenate(
        [mx.pad(t, [(0, 0), (0, p)]) for t, p in zip(texts, padding, strict=True)]
    )
    if max(padding):
        for c in cache:
            c.prepare(lengths=lengths, right_padding=padding)
    half = longest // 2
    parts = [padded[:, :half], padded[:, half:]] if half else [padded]
    out = mx.concatenate([model_of(name)(p, cache=cache) for p in parts], axis=1)
    mx.eval(out, [c.state for c in cache])
    if max(padding):
        for c in cache:
            c.finalize()
    check(name, rows, lengths, out)


@pytest.mark.feature(
    "Batches: rows of any length that join, leave, merge and part",
    "`ksa_mlx.make_cache`: merge, extend, filter, extract, prepare, finalize",
    "works; each row's logits are those of the row alone",
)
@pytest.mark.parametrize("name", CASES)
@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_schedule(name, data):
    model, fresh = model_of(name), iter(range(10**6))

    def single():
        """A sequence that ran alone for a while: wrapped, unwrapped or empty."""
        row, cache = Row(next(fresh) % 12), model.make_cache()
        n = data.draw(st.sampled_from([0, 1, 5, 13, 40, 70]), "history")
        if n:
            out = model(reference(name, row.which)[0][:, :n], cache=cache)
            mx.eval(out, [c.state for c in cache])
            row.at = n
        return row, cache

    def merged(n):
        rows, caches = zip(*[single() for _ in range(n)], strict=True)
        return list(rows), [cs[0].merge(list(cs)) for cs in zip(*caches, strict=True)]

    rows, cache = merged(data.draw(st.integers(1, 3), "rows"))
    for _ in range(data.draw(st.integers(1, 8), "steps")):
        room = min(140 - r.at for r in rows)
        action = data.draw(st.sampled_from("step step prompt join leave extract".split()), "action")
        if action == "join" and len(rows) < 5:
            more, other = merged(data.draw(st.integers(1, 2), "joining"))
            for a, b in zip(cache, other, strict=True):
                a.extend(b)
            rows += more
        elif action == "leave" and len(rows) > 1:
            keep = data.draw(
                st.lists(st.integers(0, len(rows) - 1), min_size=1, unique=True).map(sorted), "keep"
            )
            for c in cache:
                c.filter(keep)
            rows = [rows[i] for i in keep]
        elif action == "extract":
            # One sequence goes on alone, through a file; the batch does not notice.
            i = data.draw(st.integers(0, len(rows) - 1), "row")
            if not 0 < rows[i].at < 130:
                continue
            alone, row = roundtrip([c.extract(i) for c in cache]), Row(rows[i].which, rows[i].at)
            feed_alone = reference(name, row.which)[0][:, row.at : row.at + 7]
            check(name, [row], [7], model(feed_alone, cache=alone))
        elif action == "prompt" and room >= 3:
            lengths = [data.draw(st.integers(1, min(room, 30)), "prompt") for _ in rows]
            feed(name, rows, lengths, cache)
        elif room >= 1:
            feed(name, rows, [1] * len(rows), cache)


def alone(model, prompt, n):
    """Greedy ids of a prompt run alone by mlx-lm."""
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n)]


@pytest.mark.feature(
    "Continuous batching", "`mlx_lm.generate.BatchGenerator`, `mlx_lm.batch_generate`", "works"
)
@pytest.mark.parametrize("name", ["released layout", "full layer inside", "two summaries"])
def test_batch_generator_with_late_comers(name):
    """mlx-lm's continuous batching: prompts of all lengths, some joining while others decode."""
    model = model_of(name)
    prompts = [tokens(n, seed=n)[0].tolist() for n in (1, 3, 12, 13, 37, 64, 90)]
    answers, order = {}, {}
    generator = BatchGenerator(
        model, max_tokens=40, completion_batch_size=4, prefill_batch_size=2, prefill_step_size=16
    )
    waiting = list(enumerate(prompts))
    for _ in range(2000):
        if waiting and len(answers) % 2 == 0:
            i, prompt = waiting.pop(0)
            order[generator.insert([prompt], max_tokens=[20 + i])[0]] = i
        for r in generator.next_generated():
            answers.setdefault(r.uid, []).append(r.token)
        if (
            not waiting
            and len(answers) == 7
            and all(len(a) >= 20 + order[u] for u, a in answers.items())
        ):
            break
    generator.close()
    for uid, i in order.items():
        assert answers[uid] == alone(model, prompts[i], 20 + i), i


def test_merging_leaves_the_parts_alone():
    model = build()
    caches = [model.make_cache() for _ in range(2)]
    for n, cache in zip((30, 9), caches, strict=True):
        mx.eval(model(tokens(n), cache=cache))
    batch = [a.merge([a, b]) for a, b in zip(*caches, strict=True)]
    assert isinstance(batch[0], BatchRollingSummaryCache)
    assert batch[0].offset.tolist() == [30, 9] and batch[0].size() == 30
    assert batch[0].nbytes == sum(c[0].nbytes for c in caches)
    model(tokens(8, 2), cache=batch)
    assert [c[0].offset for c in caches] == [30, 9]
    more = tokens(5, seed=8)
    expected = model(mx.concatenate([tokens(30), more], axis=1))[:, 30:]
    assert worst(model(more, cache=caches[0]), expected) < 1e-4


def test_left_padding_is_refused():
    batch = BatchRollingSummaryCache.merge([build().make_cache()[0]])
    with pytest.raises(ValueError, match="left_padding: found 2"):
        batch.prepare(left_padding=[2])
