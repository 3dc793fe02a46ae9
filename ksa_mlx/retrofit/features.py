"""What the base computes on a batch of texts, as far as the windowed layers' lessons need it."""

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .streams import Pair, attend_all, merged, sees_near, text_stream


@dataclass
class Lesson:
    """One windowed layer at P sampled positions of each text.

    queries, near: (B, heads, P, head_dim), after RoPE; near is the attention to what the window
    and the sink leave. log_mass (B, heads, P): the log of its softmax denominator. target (B, P,
    hidden): the attention to everything, projected. gap (B,): the mean square, after
    projection, of what near lacks.
    """

    queries: mx.array
    near: mx.array
    log_mass: mx.array
    target: mx.array
    gap: mx.array


@dataclass
class Features:
    """texts: keys and values of each layer, (B, KV heads, n, head_dim). lessons: by layer.
    visible (B, P, chunks): which chunks a sampled position reads through their summaries."""

    texts: list[Pair]
    lessons: dict[int, Lesson]
    visible: mx.array

    @property
    def chunks(self) -> int:
        return self.visible.shape[-1]


def sampled(
    n: int, count: int, first: int, wanted: Sequence[int], rng: np.random.Generator
) -> np.ndarray:
    """`count` positions of first .. n - 1, in order, among them as many as fit of `wanted`."""
    must = [p for p in dict.fromkeys(wanted) if first <= p < n][:count]
    rest = np.setdiff1d(np.arange(first, n), must)
    return np.sort([*must, *rng.permutation(rest)[: count - len(must)]]).astype(np.int32)


def collect(model, windows: Sequence[int | None], ids: mx.array, positions: np.ndarray) -> Features:
    """Run the text of a model under full attention, and keep what `Features` says.

    Args: windows: of the layers, in chunks, None where a layer stays full. ids (B, n). positions
    (B, P): where queries are sampled, all beyond the window and the first chunk.
    """
    args = model.args
    chunk = args.summary_chunk_size
    texts: list[Pair] = []
    lessons: dict[int, Lesson] = {}
    at = mx.array(positions)[:, None, :, None]

    def attend(i, queries, keys, values):
        texts.append((keys, values))
        out = attend_all(i, queries, keys, values)
        if windows[i] is not None:
            seen = sees_near(positions, np.arange(ids.shape[1]), windows[i], chunk, chunk)
            some, full = (mx.take_along_axis(x, at, axis=2) for x in (queries, out))
            attn = model.model.layers[i].self_attn
            lesson = _lesson(attn, some, full, keys, values, mx.array(seen))
            mx.eval(lesson.near, lesson.gap, lesson.target)
            lessons[i] = lesson
        mx.eval(out)
        return out

    mx.eval(text_stream(model, ids, attend))
    smallest = min(w for w in windows if w is not None)
    count = ids.shape[1] // chunk
    oldest = positions[..., None] // chunk - smallest
    # The first chunk is the sink: it is read as text here, and through its summary by the edit.
    visible = (np.arange(count) < oldest) & (np.arange(count) >= 1)
    return Features(texts, lessons, mx.array(visible))


def grouped(queries: mx.array, keys: mx.array) -> mx.array:
    """Scaled scores (B, heads, rows, keys) of queries against fewer KV heads, in float32."""
    B, heads, rows, dim = queries.shape
    q = (queries * dim**-0.5).reshape(B, keys.shape[1], -1, dim)
    return (q @ keys.swapaxes(-1, -2)).reshape(B, heads, rows, -1).astype(mx.float32)


def weighed(weights: mx.array, values: mx.array) -> mx.array:
    """Sums (B, heads, rows, head_dim) of values (B, KV heads, keys, head_dim) by weights."""
    B, heads, rows, count = weights.shape
    w = weights.astype(values.dtype).reshape(B, values.shape[1], -1, count)
    return (w @ values).reshape(B, heads, rows, -1)


def _lesson(attn, queries, full, keys, values, seen) -> Lesson:
    scores = mx.where(seen[:, None], grouped(queries, keys), -mx.inf)
    log_mass = mx.logsumexp(scores, axis=-1)
    near = weighed(mx.exp(scores - log_mass[..., None]), values)
    target = attn.o_proj(merged(full)).astype(mx.float32)
    lacks = attn.o_proj(merged(near)).astype(mx.float32) - target
    return Lesson(queries, near, log_mass, target, lacks.square().mean(axis=(1, 2)))
