"""Losses of the tokens of a text, by their positions in it."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from ..memory.caches import Quantised
from .intervals import blocks
from .score import judged, quantise

# Where buckets of positions begin; from the last on they double.
EDGES = (0, 64, 256, 1024, 2048)
# Tokens whose logits are held at once.
ROWS = 256


def losses(
    model: Any,
    ids: list[int],
    quantised: Quantised | None = None,
    tick: Callable[[int], Any] = lambda tokens: None,
) -> np.ndarray:
    """Losses in nats of all ids but the first, read through caches: (n - 1,) float64.

    quantised: to what the caches are quantised after each ROWS tokens, None: not. tick: called
    with how many tokens have been read since.
    """
    cache, found = make_prompt_cache(model), []
    for at in range(0, len(ids) - 1, ROWS):
        some = ids[at : min(at + ROWS, len(ids) - 1)]
        logits = model(mx.array([some]), cache=cache)
        quantise(cache, quantised)
        found.append(judged(logits[0], ids[at + 1 : at + 1 + len(some)])[1])
        tick(len(some))
    return np.concatenate(found)


def buckets(length: int) -> list[tuple[int, int]]:
    """Buckets of positions, start and stop, of a text of so many tokens."""
    edges = [e for e in EDGES if e < length]
    while edges[-1] >= EDGES[-1] and 2 * edges[-1] < length:
        edges.append(2 * edges[-1])
    return list(zip(edges, [*edges[1:], length], strict=True))


def by_position(of: np.ndarray) -> dict[int, list[float]]:
    """Means of blocks of losses, by the beginning of their bucket. The first loss is that of the
    token at position 1."""
    return {
        start: [round(x, 5) for x in blocks(of[max(0, start - 1) : stop - 1]).tolist()]
        for start, stop in buckets(len(of) + 1)
        if stop > 1
    }
