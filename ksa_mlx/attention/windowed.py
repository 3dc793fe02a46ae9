"""The compressed attention: text queries over summaries and window, summary queries over chunks.

`text_attention` is the door for everything that a windowed layer's text queries do. Shapes are
(B, heads, rows, head_dim) throughout; softmax scale is head_dim^-0.5.
"""

from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention

from ..attention import kernels
from ..cache.quantized import MixedRollingSummaryCache, mixed_attention
from ..cache.rolling import join
from ..naive import summary_positions

# Query rows a block in prefill: bounds the workspace at block x keys.
BLOCK = 256

# Chunks summarised at once in decode. More mean fewer, larger steps; all must be in the window.
BATCH = 16


@dataclass
class Step:
    """What one call of the model does: which text it reads, which chunks it summarises.

    The call reads the text tokens offset .. offset + length - 1 and computes the summaries of
    the chunks first .. last - 1 (none if equal): none before a text query will read one, and then
    several at once, so that a decode step mostly has one row.
    """

    args: object
    offset: int
    length: int
    first: int = 0
    last: int = 0
    summary_positions: mx.array | None = None
    masks: dict[int, list] = field(default_factory=dict)
    training: bool = False

    @classmethod
    def plan(cls, args, offset: int, length: int, summarised: int, cached: bool = True) -> "Step":
        """Plan a call after `offset` tokens, of whose chunks the first `summarised` are done.

        `summary_positions` (rows,) int32 and, by window, the blocks of the layers that go block
        by block, are shared by all layers.
        """
        k = args.summary_chunk_size
        windows = {w for w in args.windows if w is not None}
        step = cls(args, offset, length, summarised, summarised)
        if not windows:
            return step
        needed = (offset + length - 1) // k - min(windows)
        if needed > summarised:
            step.last = needed
            if cached:
                closed = (offset + length) // k
                step.last = max(needed, min(summarised + min(BATCH, min(windows) + 1), closed))
            positions = summary_positions(args, step.first, step.last)
            step.summary_positions = mx.array(positions.astype(np.int32))
        step.masks = {w: step.blocks(w) for w in windows if not (cached and step.in_pieces(w))}
        return step

    # What a batch of several lengths does its own way (`batch.BatchStep`)

    @property
    def steps(self) -> list["Step"]:
        return [self]

    def flat(self, h: mx.array) -> mx.array:
        """Text (B, L, hidden) as the rows that the layers carry."""
        return h

    def by_row(self, x: mx.array) -> mx.array:
        """Text heads of those rows as (B, heads, L, head_dim)."""
        return x

    def text_attention(self, queries, keys, values, summaries, cache, window):
        """`text_attention` with this step."""
        return text_attention(queries, keys, values, summaries, cache, self, window)

    def full_text(self, keys, values, cache) -> list[mx.array]:
        """The text of this step's chunks in a full layer, (B, KV heads, chunks * k, head_dim), from
        keys and values as mlx-lm's cache hands them out, quantised or not."""
        part = slice(self.first * self.chunk, self.last * self.chunk)

        def read(x):
            if isinstance(x, mx.array):
                return x[:, :, part]
            planes = (y[:, :, part] for y in x)
            return mx.dequantize(*planes, group_size=cache.group_size, bits=cache.bits)

        return [read(keys), read(values)]

    @property
    def chunk(self) -> int:
        return self.args.summary_chunk_size

    @property
    def chunks(self) -> int:
        """Chunks that this call summarises."""
        return self.last - self.first

    @property
    def rows(self) -> int:
        """Summary rows of this call."""
        return self.chunks * self.args.summary_token_num

    def use_kernel(self, name: str, queries: mx.array, *keys) -> bool:
        """Whether a Metal kernel computes cached attention; it has no gradient."""
        return not self.training and kernels.use(name, queries, *keys)

    def in_pieces(self, window: int) -> bool:
        """Whether a cached call goes piece by piece: few rows, or all text within the window."""
        k = self.chunk
        return self.length <= 2 * k or self.offset + self.length <= (window + 1) * k

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Row ranges whose queries see the same chunks; one range while the window is not full."""
        k = self.chunk
        stop = self.offset + self.length
        if stop <= (window + 1) * k:
            return [(0, self.length)]
        edges = range((self.offset // k + 1) * k, stop, k)
        edges = [self.offset, *edges, stop]
        return [(a - self.offset, b - self.offset) for a, b in zip(edges, edges[1:])]

    def blocks(self, window: int) -> list[tuple[int, int, int, int, object]]:
        """Blocks of query positions a .. b - 1: (a, b, first text key, summaries, mask)."""
        k, s = self.args.summary_chunk_size, self.args.summary_token_num
        a, stop, blocks = self.offset, self.offset + self.length, []
        while a < stop:
            # Up to the window's end the text is plain causal: one block.
            b = min(stop, max((window + 1) * k, (a // BLOCK + 1) * BLOCK))
            text = max(0, a // k - window) * k
            count = max(0, (b - 1) // k - window)
            mask = "causal" if not count else _block_mask(a, b, text, count, k, s, window)
            blocks.append((a, b, text, count, mask))
            a = b
        return blocks


def _block_mask(a, b, text, count, k, s, window) -> mx.array:
    """Who sees whom for queries a .. b - 1 over [summaries, newest first | text .. b - 1]."""
    query = mx.arange(a, b)[:, None]
    oldest = query // k - window  # the first chunk read as text
    chunk = (count * s - 1 - mx.arange(count * s)) // s
    key = mx.arange(text, b)
    return mx.concatenate([chunk < oldest, (key // k >= oldest) & (key <= query)], axis=1)


def text_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    summaries: tuple[mx.array, mx.array] | None,
    cache,
    step: Step,
    window: int,
) -> tuple[mx.array, tuple[mx.array, mx.array] | None]:
    """Attention of new text tokens in a windowed layer, and the update of its cache.

    Args:
        queries (B, heads, L, head_dim), keys and values (B, KV heads, L, head_dim): the new text,
            after RoPE.
        summaries: keys and values (B, KV heads, rows, head_dim) of this step's summaries, after
            RoPE; None without rows.
        cache: the layer's RollingSummaryCache, or None (differentiable).
        step: the plan of the call. window: the layer's W.

    Returns the outputs (B, heads, L, head_dim), and the text that this step's summaries read:
    keys and values (B, KV heads, chunks * k, head_dim), None without rows.
    """
    if cache is not None:
        cache.reserve(step.last, step.length, keys, values)
        if summaries is not None:
            cache.store_summaries(*summaries)
        if step.in_pieces(window):
            return _pieces(queries, keys, values, summaries is not None, cache, step, window)
        keys, values, start = cache.extend(keys, values, step.first)
        visible = cache.summaries(cache.summarised)
    else:
        start, visible = 0, None
        if summaries is not None:
            visible = tuple(x[:, :, ::-1] for x in summaries)

    text = None
    if summaries is not None:
        part = slice(step.first * step.chunk - start, step.last * step.chunk - start)
        text = keys[:, :, part], values[:, :, part]
    if cache is not None and step.use_kernel("prefill", queries, keys):
        # Plain buffers are passed whole, as a view of them would be copied.
        whole = isinstance(cache.keys, mx.array)
        held = (cache.keys, cache.values) if whole else visible
        left = cache.summaries_end if whole else visible[0].shape[2]
        where = step.length, step.offset, start, left
        k, s = step.chunk, step.args.summary_token_num
        where = kernels.layout(*([x] * queries.shape[0] for x in where), k, s, window)
        return kernels.prefill(queries, keys, values, *held, where), text
    return _blocks(queries, keys, values, start, visible, step, window), text


def _pieces(queries, keys, values, has_rows, cache, step, window):
    """Few rows: each chunk's rows see one contiguous range of the cache, without a mask."""
    k, parts = step.chunk, []
    if has_rows:
        # Reading on overwrites the chunks that leave the window; the others are read after it,
        # so that the cache is changed in place.
        leaving = min(step.last, (step.offset + step.length - 1) // k - window)
        if step.first < leaving:
            if step.first * k < step.offset:
                parts.append(cache.text(step.first, leaving))
            new = slice(max(step.first * k - step.offset, 0), max(leaving * k - step.offset, 0))
            if new.start < new.stop:
                parts.append(cache.as_held(keys[:, :, new], values[:, :, new]))

    outputs = []
    for a, b in step.pieces(window):
        *buffers, (start, stop) = cache.append(keys[:, :, a:b], values[:, :, a:b])
        rows = queries[:, :, a:b]
        mixed, own = isinstance(cache, MixedRollingSummaryCache), ()
        if mixed and cache.visible_summaries:
            own = cache.summary_keys, cache.summary_values, cache.visible_summaries
        if b - a <= kernels.ROWS and step.use_kernel("decode", rows, buffers[0], *own[:1]):
            outputs.append(kernels.decode_last(rows, *buffers, start, stop, *own))
            continue
        views = tree_map(lambda x: x[:, :, start:stop], tuple(buffers))
        if mixed:
            outputs.append(mixed_attention(rows, *views, cache))
            continue
        outputs.append(full_attention(rows, *views, cache, "causal" if b - a > 1 else None))
    if has_rows and max(step.first, leaving) < step.last:
        parts.append(cache.text(max(step.first, leaving), step.last))
    out = outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)
    return out, join(*parts) if parts else None


def _blocks(queries, keys, values, start, summaries, step, window):
    """Many rows: block by block over [summaries, newest first | text], masked at the edges.

    keys, values: the text in order from position `start` on.
    """
    outputs = []
    for a, b, text, count, mask in step.masks[window]:
        block = keys[:, :, text - start : b - start], values[:, :, text - start : b - start]
        if count:
            unseen = summaries[0].shape[2] - count * step.args.summary_token_num
            block = join([x[:, :, unseen:] for x in summaries], block)
        rows = queries[:, :, a - step.offset : b - step.offset]
        outputs.append(_attend(rows, *block, mask, outputs[-1:]))
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=2)


def _attend(queries, keys, values, mask, after: list[mx.array]) -> mx.array:
    """MLX's attention, after the block before: else MLX holds the scores of several at once.

    On the CPU, where it is not fused, many causal queries go block by block.
    """
    L, outputs = queries.shape[2], []
    if L > BLOCK and isinstance(mask, str) and mx.default_device() == mx.cpu:
        before = keys.shape[2] - L
        for a in range(0, L, BLOCK):
            b = min(a + BLOCK, L)
            seen = keys[:, :, : before + b], values[:, :, : before + b]
            outputs.append(_attend(queries[:, :, a:b], *seen, mask, outputs[-1:] or after))
        return mx.concatenate(outputs, axis=2)
    if after:
        queries = mx.depends([queries], after)[0]
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


def full_attention(queries, keys, values, cache, mask) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over all of keys and values, which are as
    `cache` hands them out; mask: None, "causal" or an array."""
    if not hasattr(cache, "bits"):
        return _attend(queries, keys, values, mask, [])
    # mlx-lm's function reads a quantised cache as it is.
    return scaled_dot_product_attention(
        queries, keys, values, cache=cache, scale=queries.shape[-1] ** -0.5, mask=mask
    )


def summary_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    text_keys: mx.array,
    text_values: mx.array,
    chunks: int,
) -> mx.array:
    """Attention of summary tokens: each sees its chunk's text and its chunk's summaries so far.

    Args:
        queries (B, heads, chunks * s, head_dim), keys and values (B, KV heads, chunks * s,
            head_dim): the summary rows, after RoPE.
        text_keys, text_values (B, KV heads, chunks * k, head_dim): the same chunks' text.

    Returns (B, heads, chunks * s, head_dim). One launch over all chunks.
    """
    B, _, rows, dim = queries.shape

    def by_chunk(x):
        """(B, H, chunks * n, dim) to (B, chunks, H, n, dim)."""
        return x.reshape(B, x.shape[1], chunks, -1, dim).swapaxes(1, 2)

    def block(text, summary):
        x = mx.concatenate([by_chunk(text), by_chunk(summary)], axis=3)
        return x.reshape(B * chunks, *x.shape[2:])

    q = by_chunk(queries)
    out = mx.fast.scaled_dot_product_attention(
        q.reshape(B * chunks, *q.shape[2:]),
        block(text_keys, keys),
        block(text_values, values),
        scale=dim**-0.5,
        # The last s of k + s keys: summary i sees the text and summaries 0 .. i.
        mask="causal" if rows > chunks else None,
    )
    return out.reshape(q.shape).swapaxes(1, 2).reshape(queries.shape)
