"""Any split of a text, with trims, saves and loads, gives what one uncached forward gives."""

import functools
import os
import tempfile

import mlx.core as mx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import (
    can_trim_prompt_cache,
    load_prompt_cache,
    save_prompt_cache,
    trim_prompt_cache,
)

import ksa_mlx
from ksa_mlx import naive

from ._models import VARIANTS, build, tokens, worst

TOLERANCE = 1e-3
# The long run: KSA_MLX_EXAMPLES=2000 pytest tests/test_splits.py
EXAMPLES = int(os.environ.get("KSA_MLX_EXAMPLES", 6))

model_of = functools.lru_cache(None)(lambda name: build(**VARIANTS[name]))


@functools.lru_cache(None)
def reference(name: str, batch: int):
    """A text of 150 tokens and its logits by the definition."""
    text = tokens(150, batch, seed=batch)
    return text, naive.forward(model_of(name), text)


def roundtrip(cache):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "cache.safetensors")
        save_prompt_cache(path, cache)
        loaded = load_prompt_cache(path)
        mx.eval([c.state for c in loaded])
        return loaded


@pytest.mark.quick(6)
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_uncached(name, batch):
    model = model_of(name)
    text, logits = reference(name, batch)
    for n in (1, 3, 4, 5, 11, 12, 13, 16, 17, 64, 149, 150):
        assert worst(model(text[:, :n]), logits[:, :n]) <= TOLERANCE, n


@pytest.mark.quick(5)
@pytest.mark.parametrize("name", VARIANTS)
@settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_split(name, data):
    model = model_of(name)
    batch = data.draw(st.sampled_from([1, 1, 2]), "batch")
    text, logits = reference(name, batch)
    rollback = data.draw(st.sampled_from([0, 1, 4, 9, 40]), "rollback")
    cache = ksa_mlx.make_cache(model, rollback=rollback)
    trimmable = can_trim_prompt_cache(cache)
    assert trimmable == (rollback > 0)

    at, highest = 0, 0
    for _ in range(data.draw(st.integers(1, 25), "steps")):
        action = data.draw(st.sampled_from("one one few few many trim save".split()), "action")
        if action == "trim":
            n = data.draw(st.integers(0, max(0, rollback - (highest - at))), "trim")
            if n == 0:
                continue
            n = min(n, at)
            assert trim_prompt_cache(cache, n) == n
            at -= n
        elif action == "save":
            cache = roundtrip(cache) if at else cache
        else:
            top = {"one": 1, "few": 12, "many": 90}[action]
            n = min(data.draw(st.integers(1, top), "tokens"), text.shape[1] - at)
            if n == 0:
                continue
            out = model(text[:, at : at + n], cache=cache)
            mx.eval(out, [c.state for c in cache])
            assert worst(out, logits[:, at : at + n]) <= TOLERANCE, (at, n)
            at += n
            highest = max(highest, at)
        assert all(c.offset == at for c in cache)
        assert can_trim_prompt_cache(cache) == trimmable


@pytest.mark.parametrize("name", ["different windows", "two summaries", "chunk of one"])
def test_taken_back_then_another_text(name):
    """What was taken back leaves no trace, also not in summaries computed ahead."""
    model = model_of(name)
    rollback = 17
    first = tokens(120, seed=5)
    # Every place in chunks of 4 and of 5.
    for keep in (*range(60, 117, 7), 119):
        n = min(rollback, 120 - keep)
        cache = ksa_mlx.make_cache(model, rollback=rollback)
        for at in range(0, keep + n, 7):
            model(first[:, at : min(at + 7, keep + n)], cache=cache)
        trim_prompt_cache(cache, n)
        other = tokens(40, seed=keep)
        got = mx.concatenate([model(other[:, i : i + 4], cache=cache) for i in range(0, 40, 4)], 1)
        text = mx.concatenate([first[:, :keep], other], axis=1)
        assert worst(got, naive.forward(model, text)[:, keep:]) <= TOLERANCE, keep
