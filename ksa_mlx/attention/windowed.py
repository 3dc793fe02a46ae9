"""Text queries of a windowed layer: over summaries and window, with the update of its cache.

Shapes are (B, heads, rows, head_dim) throughout; softmax scale is head_dim^-0.5.
"""

from functools import partial
from typing import Any

import mlx.core as mx

from ..cache.place import Moves
from ..cache.rolling import Pair, RollingSummaryCache
from ..cache.storage import join
from .blockwise import blockwise, windowed
from .decode import decode, decode_rows
from .plan import Call, Step
from .prefill import prefill, prefill_ops

Attended = tuple[mx.array, list[Pair]]


def windowed_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    summaries: Pair | None,
    cache: Any,
    call: Call,
    window: int,
) -> tuple[mx.array, Pair | None]:
    """Attention of new text tokens in a windowed layer, and the update of its cache.

    Args:
        queries: (B, heads, L, head_dim), the new text, after RoPE.
        keys: (B, KV heads, L, head_dim), likewise.
        values: likewise.
        summaries: keys and values (B, KV heads, rows, head_dim) of this call's summaries, after
            RoPE, all sequences' in one block if their lengths differ; None without rows.
        cache: the layer's RollingSummaryCache or a batch of them, or None (differentiable).
        call: the plan of the call.
        window: the layer's W.

    Returns the outputs (B, heads, L, head_dim), and the text that this call's summaries read:
    keys and values (B, KV heads, chunks * k, head_dim), None without rows.
    """
    if cache is None:
        out, texts = _without_cache(queries, keys, values, summaries, call, window)
    elif cache.ragged:
        out, texts = _rows(queries, keys, values, summaries, cache, call)
    else:
        text = queries, keys, values
        (moves,), _ = call.moves([cache.place])
        out, texts = _step(text, summaries, cache, call.steps[0], moves, call.kernels)
    return out, tuple(join(texts)) if texts else None


def _rows(queries, keys, values, summaries, cache, call) -> Attended:
    """Sequences of different lengths: none shares a buffer with another."""
    outputs, segments, texts, done = [], [], [], 0
    moves, together = call.moves([row.place for row in cache.rows])
    keys, values = mx.split(keys, len(moves)), mx.split(values, len(moves))
    for b, (row, step, moved) in enumerate(zip(cache.rows, call.steps, moves, strict=True)):
        pair, n, own = (keys[b], values[b]), step.length, None
        if step.chunks:
            count = step.chunks * step.args.summary_token_num
            own = tuple(x[:, :, done : done + count] for x in summaries)
            done += count
        if together:
            texts += row.begin(moved, pair, own)
            segments.append(row.seen(*moved.pieces[0][2:]))
            continue
        out = queries[b : b + 1, :, :n]
        if n < call.columns:
            pair = tuple(x[:, :, :n] for x in pair)
        if n:
            out, some = _step((out, *pair), own, row, step, moved, call.kernels)
            texts += some
        outputs.append(call.padded(out))
    cache.advance(call.columns)
    if together:
        return decode_rows(queries, segments, call.kernels), texts
    return mx.concatenate(outputs, axis=0), texts


def _step(
    text: Any,
    summaries: Pair | None,
    cache: RollingSummaryCache,
    step: Step,
    moves: Moves | None,
    kernels: str | None,
) -> Attended:
    """One sequence, or several of one length in one cache."""
    queries, *pair = text
    if moves is None:
        return _many(queries, pair, summaries, cache, step, kernels)
    texts, outputs = cache.begin(moves, pair, summaries), []
    for start, stop, count, ranges in moves.pieces:
        part = queries if len(moves.pieces) == 1 else queries[:, :, start:stop]
        outputs.append(decode(part, cache.seen(count, ranges), kernels))
    out = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return out, texts


def _many(queries, pair, summaries, cache, step, kernels) -> Attended:
    """Many rows: block by block over [summaries, newest first | text], masked at the edges."""
    window = cache.place.window
    keys, values, start = cache.extend(*pair, step.first, step.last, summaries)
    texts = [tuple(step.text(keys, values, start))] if step.chunks else []
    return prefill(queries, keys, values, start, cache, step, window, kernels), texts


def _without_cache(queries, keys, values, summaries, call, window) -> Attended:
    step = call.steps[0]
    newest_first = None if summaries is None else tuple(x[:, :, ::-1] for x in summaries)
    if call.blockwise:
        pair, count = (keys, values), 0
        if newest_first is not None:
            count = newest_first[0].shape[2]
            both = zip(newest_first, pair, strict=True)
            pair = tuple(mx.concatenate(two, axis=2) for two in both)
        out = blockwise(queries, *pair, partial(windowed, step, window, count))
    else:
        out = prefill_ops(queries, keys, values, 0, newest_first, step, window)
    return out, [tuple(step.text(keys, values))] if step.chunks else []
