"""Which layers must stay full: measured, by what the window takes from each layer's attention."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .streams import attend_all, attend_near, merged, text_stream


@dataclass
class Probe:
    """lost: for each kind of text, by layer, how much of the residual stream's square a window
    with the sink takes from the layer's attention. full: the layers that stay full."""

    lost: dict[str, list[float]]
    full: list[int]

    def table(self) -> str:
        """A line a layer, for people."""
        kinds = list(self.lost)
        lines = ["layer  " + "  ".join(f"{kind:>8}" for kind in kinds)]
        for i, values in enumerate(zip(*self.lost.values(), strict=True)):
            cells = "  ".join(f"{1000 * v:8.2f}" for v in values)
            lines.append(f"{i:5}  {cells}" + ("  full" if i in self.full else ""))
        lines.append("(thousandths of the residual's square that a window with the sink loses)")
        return "\n".join(lines)


def lost(model, window: int, batches: Iterable[tuple[mx.array, np.ndarray]]) -> np.ndarray:
    """By layer, the mean over batches of ids (B, n) and of their positions (B, P) that count."""
    found = []
    for ids, positions in batches:
        found.append(_lost(model, window, ids, mx.array(positions)))
    return np.mean(found, axis=0)


def _lost(model, window: int, ids: mx.array, at: mx.array) -> list[float]:
    chunk, layers = model.args.summary_chunk_size, model.model.layers
    near = attend_near([window] * len(layers), chunk)
    changes, found = [], []

    def attend(i, queries, keys, values):
        out = attend_all(i, queries, keys, values)
        change = merged(near(i, queries, keys, values) - out)
        change = mx.take_along_axis(change, at[..., None], axis=1)
        # A bias of the projection cancels out.
        change = layers[i].self_attn.o_proj(change) - layers[i].self_attn.o_proj(0 * change)
        changes.append(change.astype(mx.float32).square().sum(axis=-1))
        return out

    def each(i, h):
        size = mx.take_along_axis(h, at[..., None], axis=1).astype(mx.float32)
        found.append((changes[i] / size.square().sum(axis=-1)).mean().item())

    mx.eval(text_stream(model, ids, attend, each))
    return found


def choose(by_kind: dict[str, Sequence[float]], count: int) -> list[int]:
    """The `count` layers that lose most: in the mean over kinds of their share in each kind."""
    shares = [np.array(v) / np.sum(v) for v in by_kind.values()]
    return sorted(int(i) for i in np.argsort(-np.mean(shares, axis=0), kind="stable")[:count])
