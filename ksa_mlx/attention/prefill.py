"""Many query rows over summaries and window: MLX's operations, the kernel, and the one that
chooses."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.rolling import Pair, RollingSummaryCache
from ..naive import visibility
from . import metal
from .decode import attend
from .plan import Step


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
    if kernels and _kernel_runs(kernels, queries, keys):
        # Plain buffers are passed whole, as a view of them would be copied.
        own_keys, own_values, end = cache.summaries_for_kernel()
        k, s, B = cache.place.chunk, cache.place.summary_tokens, queries.shape[0]
        where = layout([step.length] * B, [step.offset] * B, [start] * B, [end] * B, k, s, window)
        return prefill_kernel(queries, keys, values, own_keys, own_values, where)
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


def _kernel_runs(choice: str, queries: mx.array, keys: mx.array) -> bool:
    heads, kv_heads, dim = queries.shape[1], keys.shape[1], queries.shape[3]
    if not metal.takes(queries, kv_heads, keys.dtype):
        return False
    if choice == "metal":
        return True
    return metal.agrees("prefill", queries.dtype, _difference, dim, heads // kv_heads)


def _difference(dtype: mx.Dtype, dim: int, group: int) -> float:
    """Of the kernel from MLX's operations, on a short random text."""
    chunk, window, n = 8, 2, 61
    sees = mx.array(visibility(n, chunk, 1, window)[:n])
    left = sees.shape[1] - n
    queries, *text = metal.random(dtype, (1, group, n, dim), *[(1, 1, n, dim)] * 2)
    held = metal.random(dtype, *[(1, 1, left, dim)] * 2)
    where = layout([n], [0], [0], [left], chunk, 1, window)
    got = prefill_kernel(queries, text[0], text[1], held[0], held[1], where)
    keys, values = (
        mx.concatenate([t, x[:, :, ::-1]], axis=2) for t, x in zip(text, held, strict=True)
    )
    return metal.distance(queries, keys, values, sees, got)
