"""How many functions of ours one decode step of one windowed layer calls: a step is mostly MLX's."""

import sys
from pathlib import Path

import pytest

import ksa_mlx
from ksa_mlx.cache.batch import BatchRollingSummaryCache

from ._models import build, tokens

PACKAGE = str(Path(ksa_mlx.__file__).parent)
SHAPE = {"num_hidden_layers": 1, "summary_chunk_size": 8, "summary_sliding_chunk_num": 16}
SHAPE |= {"head_dim": 32}


def fed(model, n, **bits):
    cache = ksa_mlx.make_cache(model)
    if bits:
        cache = [c.to_quantized(group_size=32, **bits) for c in cache]
    model(tokens(n), cache=cache)
    return cache


def calls(model, cache, batch: int = 1) -> int:
    """Python calls into the package, of one decode step."""
    count = 0

    def note(frame, event, _):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    text = tokens(1, batch)
    model(text, cache=cache)
    sys.setprofile(note)
    try:
        model(text, cache=cache)
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize(
    "bits, most", [({}, 45), ({"bits": 4}, 60), ({"bits": 4, "text_bits": 8}, 60)], ids=str
)
def test_one_sequence(bits, most):
    model = build(**SHAPE)

    assert calls(model, fed(model, 301, **bits)) <= most


def test_a_batch_in_three_phases():
    model = build(**SHAPE)

    def step():
        rows = [fed(model, n)[0] for n in (297, 299, 301)]
        return calls(model, [BatchRollingSummaryCache.merge(rows)], 3)

    step()  # what is remembered between batches is made by the first
    assert step() <= 90
