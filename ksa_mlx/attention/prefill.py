"""Many query rows over summaries and window: MLX's operations, the kernel, and the one that
chooses."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.rolling import Pair, RollingSummaryCache
from ..cache.storage import PLAIN
from . import metal
from .choice import OPERATIONS, Key, chosen
from .decode import attend
from .plan import Step
from .trial import PREFILL, PrefillInputs

# The one size that is timed: what wins there wins at others, as prefill is bound by arithmetic.
ROWS, KEYS = 512, 4096


def prefill(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    start: int,
    cache: RollingSummaryCache,
    step: Step,
    window: int,
    kernels: str | None,
) -> mx.array:
    """Attention of a step's text over its summaries and windows, by a kernel where one runs.

    Args:
        queries: (B, heads, L, head_dim), the new text.
        keys: (B, KV heads, N, head_dim), the text in order.
        values: likewise.
        start: the position of the first key.
        cache: the layer's, which holds the summaries.
        step: the plan.
        window: the layer's W.
        kernels: what `metal.wanted` says; a kernel has no gradient.
    """
    name = arm(kernels, queries, keys) if kernels else OPERATIONS
    if name != OPERATIONS:
        # Plain buffers are passed whole, as a view of them would be copied.
        own_keys, own_values, end = cache.summaries_for_kernel()
        inputs = PrefillInputs(keys, values, start, own_keys, own_values, end, step, window)
        return ARMS[name](queries, inputs)
    return prefill_ops(queries, keys, values, start, cache.summaries(), step, window)


def prefill_ops(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    start: int,
    summaries: Pair | None,
    step: Step,
    window: int,
) -> mx.array:
    """By MLX's attention, block by block over [summaries, newest first | text], masked at edges.

    Args as in `prefill`; summaries: keys and values, newest first.
    """
    outputs: list[mx.array] = []
    for a, b, text, count, mask in step.blocks(window):
        block = [x[:, :, text - start : b - start] for x in (keys, values)]
        if count:
            assert summaries is not None
            unseen = summaries[0].shape[2] - count * step.args.summary_token_num
            block = [
                mx.concatenate([x[:, :, unseen:], y], axis=2)
                for x, y in zip(summaries, block, strict=True)
            ]
        rows, (some, of_some) = queries[:, :, a - step.offset : b - step.offset], block
        outputs.append(attend(rows, some, of_some, mask, outputs[-1:]))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def layout(
    rows: Sequence[int],
    offsets: Sequence[int],
    starts: Sequence[int],
    ends: Sequence[int],
    chunk: int,
    summary_tokens: int,
    window: int,
) -> mx.array:
    """Where things are in a `prefill_kernel`, for each sequence: (B, 8) int32.

    Args: new text rows that are not padding; the position of the first of them; the position of
    the text's first key; the slot behind the summaries. chunk k, summary_tokens s and window W are
    the layer's.
    """
    same = (chunk, summary_tokens, window, 0)
    each = zip(rows, offsets, starts, ends, strict=True)
    return mx.array(np.array([(*one, *same) for one in each], dtype=np.int32))


def prefill_kernel(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    summary_keys: mx.array,
    summary_values: mx.array,
    layout: mx.array,
) -> mx.array:
    """Attention of new text over summaries and window, without a mask in memory. One launch.

    Args:
        queries: (B, heads, L, head_dim), the new text, padded on the right where sequences differ.
        keys: (B, KV heads, N, head_dim), the text in order, from the first row's window to the
            last row.
        values: likewise.
        summary_keys: (B, KV heads, capacity, head_dim), a whole buffer, where the summaries lie
            newest first.
        summary_values: likewise.
        layout: (B, 8) int32, from `layout`.

    Returns (B, heads, L, head_dim), zeros for padding.
    """
    B, heads, length, dim = queries.shape
    return metal.kernel("prefill", "queries keys values summary_keys summary_values layout")(
        inputs=[queries, keys, values, summary_keys, summary_values, layout],
        template=[("T", queries.dtype), ("D", dim), ("K", 32 if dim <= 128 else 16)],
        grid=(-(-length // 32) * 128, heads, B),
        threadgroup=(128, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]


# Choosing


def _operations(queries: mx.array, x: PrefillInputs) -> mx.array:
    newest_first = x.summary_keys[:, :, : x.end], x.summary_values[:, :, : x.end]
    return prefill_ops(queries, x.keys, x.values, x.start, newest_first, x.step, x.window)


def _kernel(queries: mx.array, x: PrefillInputs) -> mx.array:
    step, B = x.step, queries.shape[0]
    k, s = step.args.summary_chunk_size, step.args.summary_token_num
    where = layout([step.length] * B, [step.offset] * B, [x.start] * B, [x.end] * B, k, s, x.window)
    return prefill_kernel(queries, x.keys, x.values, x.summary_keys, x.summary_values, where)


ARMS = {OPERATIONS: _operations, "kernel": _kernel}


def arm(choice: str, queries: mx.array, keys: mx.array) -> str:
    """The name of the arm that computes this; choice: what `metal.wanted` says."""
    heads, kv_heads, dim = queries.shape[1], keys.shape[1], queries.shape[3]
    same = keys.dtype == queries.dtype
    if not same or not metal.takes(queries.dtype, heads, kv_heads, dim):
        return OPERATIONS
    if choice == "metal":
        return "kernel"
    key = Key("prefill", queries.dtype, dim, kv_heads, heads // kv_heads, ROWS, (PLAIN,), KEYS)
    return chosen(key, ARMS, PREFILL, OPERATIONS, choice == "retune")
