"""How long Python takes to build the graph of one decode step, nothing evaluated.

A step that is built while the last one runs costs nothing, one that takes longer does. Measured in
turns with mlx-lm's Qwen3 of as many layers, on mlx-lm's own caches.
"""

import copy
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from .models import build, dims, make_args
from .timing import Table, bar, in_turns, ratio, spread

LAYERS, WINDOW = 36, 4
SHAPE = dims(64, 64, LAYERS, 4, 2, 32, 100)
CONTEXT = 100  # tokens, beyond the windows of 4 chunks: longer ones build no other graph
WARMUP = 5

# Tokens that each sequence has read. Chunks have 8: a row in another phase closes them elsewhere.
BATCHES = {
    "1 row": [CONTEXT],
    "8 rows, same phase": [CONTEXT] * 8,
    "8 rows, 8 phases": [CONTEXT + i for i in range(8)],
}


def table() -> Table:
    return Table(
        f"Building the graph of one decode step, {LAYERS} layers, nothing evaluated: Python's time "
        "alone.",
        [("batch", 20), ("Qwen3, ms", 12), ("KSA, ms", 12), ("KSA / Qwen3", 20)],
    )


class Builder:
    """A model and caches of sequences that have read CONTEXT, CONTEXT + 1, ... tokens."""

    def __init__(self, model, make_cache):
        self.model, self.read = model, {}
        for n in sorted({n for lengths in BATCHES.values() for n in lengths}):
            self.read[n] = make_cache()
            model(mx.zeros((1, n), mx.int32), cache=self.read[n])
            mx.eval([c.state for c in self.read[n]])

    def caches(self, lengths: list[int]) -> list[Any]:
        """One cache a layer, of one sequence or of a batch, that share nothing with others."""
        rows = [copy.deepcopy(self.read[n]) for n in lengths]
        if len(rows) == 1:
            return rows[0]
        return [layer[0].merge(list(layer)) for layer in zip(*rows, strict=True)]


def builders() -> dict[str, Builder]:
    """KSA and Qwen3, by name."""
    with bar("building steps: reading"):
        windows = [WINDOW, WINDOW, WINDOW, 17408] * (LAYERS // 4)
        ksa, full = build(make_args(SHAPE, windows), mx.float32)
        plain = Builder(full, lambda: [KVCache() for _ in full.layers])
        return {"ksa": Builder(ksa, ksa.make_cache), "qwen3": plain}


def measure(both: dict[str, Builder], batch: str, turns: int) -> dict[str, Any]:
    """Time the building of decode steps of a batch, one of BATCHES."""
    lengths = BATCHES[batch]
    token = mx.zeros((len(lengths), 1), mx.int32)

    def step(builder):
        cache = builder.caches(lengths)
        return lambda: (builder.model(token, cache=cache), cache)

    with bar(f"building steps: {batch}", WARMUP + turns) as tick:
        seconds = in_turns(
            {name: step(builder) for name, builder in both.items()},
            turns,
            WARMUP,
            tick,
            after=lambda built: mx.eval(built[0], [c.state for c in built[1]]),
        )
    return {
        "batch": batch,
        "layers": LAYERS,
        "median_ms": {k: float(np.median(s)) * 1e3 for k, s in seconds.items()},
        "ratio": ratio(seconds["ksa"], seconds["qwen3"]),
    }


def cells(r: dict[str, Any]) -> list[str]:
    times = (f"{r['median_ms'][k]:.2f}" for k in ("qwen3", "ksa"))
    return [r["batch"], *times, spread(r["ratio"])]
