"""Attention over all of the text: full layers, and MLX's attention block by block."""

from functools import partial
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import scaled_dot_product_attention

from ..cache.full import BatchFullCache
from ..cache.storage import Segment, join, part_of, segments_of
from .blockwise import blockwise, causal
from .decode import attend, decode, decode_rows
from .plan import BLOCK, Call, Step


def full_attention(
    queries: mx.array, keys: Any, values: Any, cache: Any, mask: Any, call: Call
) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over all of keys and values, which are as
    `cache`, one of mlx-lm's, hands them out; mask: None, "causal" or an array."""
    if call.blockwise:
        return blockwise(queries, keys, values, partial(causal, 0, queries.shape[2]))
    if isinstance(keys, mx.array):
        return attend(queries, keys, values, mask)
    if isinstance(mask, mx.array):
        # mlx-lm's function reads a quantised cache as it is.
        scale = queries.shape[-1] ** -0.5
        return scaled_dot_product_attention(queries, keys, values, cache, scale=scale, mask=mask)
    return _in_blocks(queries, segments_of(cache), call)


def _in_blocks(queries: mx.array, segments: list[Segment], call: Call) -> mx.array:
    """Many queries over quantised keys and values, of which MLX holds all scores: block by block,
    each after the one before."""
    length = queries.shape[2]
    outputs: list[mx.array] = []
    for a in range(0, length, BLOCK):
        b = min(a + BLOCK, length)
        some, last = queries[:, :, a:b], segments[-1]
        if outputs:
            some = mx.depends([some], outputs[-1:])[0]
        seen = last._replace(stop=last.stop - length + b)
        outputs.append(decode(some, [*segments[:-1], seen], call.kernels))
    return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]


def full_text(keys: Any, values: Any, cache: Any, call: Call) -> tuple[mx.array, mx.array]:
    """The text of the chunks that a call summarises, in a full layer.

    Args: keys, values: as `cache`, one of mlx-lm's or None, hands them out, quantised or not; in
    a batch the text of row b begins at slot left_padding[b]. Returns keys and values, (B or 1, KV
    heads, tokens, head_dim).
    """
    if len(call.steps) == 1 and not hasattr(cache, "left_padding"):
        return _text(keys, values, cache, call.steps[0])
    parts = []
    for b, step in enumerate(call.steps):
        if step.chunks:
            slots = mx.arange(*step.span) + cache.left_padding[b]
            parts.append([mx.take(x[b : b + 1], slots, axis=2) for x in (keys, values)])
    return tuple(join(parts))


def _text(keys: Any, values: Any, cache: Any, step: Step) -> tuple[mx.array, mx.array]:
    if isinstance(keys, mx.array):
        return tuple(step.text(keys, values))
    form = segments_of(cache)[0].form
    return form.decode([*part_of(keys, *step.span), *part_of(values, *step.span)])


def full_rows(
    queries: mx.array, keys: mx.array, values: mx.array, cache: BatchFullCache, call: Call
) -> tuple[mx.array, tuple[mx.array, mx.array] | None]:
    """Sequences of different lengths: each on the cache of its own, and none is padded.

    Args: queries, keys, values of the new columns, (B, heads, columns, head_dim). Returns outputs
    like the queries, zeros for padding, and the text of the chunks that the call summarises, of all
    sequences in one block, None without.
    """
    columns, held = queries.shape[2], cache.update(keys, values)
    if columns == 1 and all(n for n, _, _ in held):
        out = decode_rows(queries, [segments_of(row) for row in cache.rows], call.kernels)
    else:
        outputs = []
        for b, (row, (n, k, v)) in enumerate(zip(cache.rows, held, strict=True)):
            one = queries[b : b + 1, :, :n]
            if n:
                one = full_attention(one, k, v, row, "causal" if n > 1 else None, call)
            outputs.append(call.padded(one))
        out = mx.concatenate(outputs, axis=0)
    if not call.rows:
        return out, None
    each = zip(cache.rows, held, call.steps, strict=True)
    texts = [_text(k, v, row, step) for row, (_, k, v), step in each if step.chunks]
    return out, tuple(join(texts))
