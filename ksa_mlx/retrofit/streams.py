"""The two streams of a KSA model in training, each by itself: text under any attention, and
summaries on a given text.

A teacher is the base's text under full attention. What forgetting costs, and how a layer's
attention changes, is the same text under windows. Shapes are (B, heads, rows, head_dim); positions
count from the text's start.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..attention.summaries import summary_attention
from ..naive import summary_positions
from ..recall.text_only import attend as attend_blocks
from ..recall.text_only import blocks

Attend = Callable[[int, mx.array, mx.array, mx.array], mx.array]
Each = Callable[[int, mx.array], Any]
Pair = tuple[mx.array, mx.array]

# Query rows at once: what they do not see in the text behind them is not computed.
BLOCK = 256


def merged(heads: mx.array) -> mx.array:
    """Heads (B, heads, rows, head_dim) side by side: (B, rows, heads * head_dim)."""
    return heads.swapaxes(1, 2).reshape(heads.shape[0], heads.shape[2], -1)


def text_stream(model, ids: mx.array, attend: Attend, each: Each | None = None) -> mx.array:
    """The text rows of a model whose layer i attends by attend(i, queries, keys, values).

    Args: ids (B, n). each: called with every layer's index and output (B, n, hidden). Returns the
    last hidden states, normed, (B, n, hidden).
    """
    text = model.model
    h = text.embed_tokens(ids)
    for i, layer in enumerate(text.layers):
        attn, x = layer.self_attn, layer.input_layernorm(h)
        out = attend(i, attn.text_queries(x, 0), *attn.text_pair(x, 0))
        h = h + attn.o_proj(merged(out))
        h = h + layer.mlp(layer.post_attention_layernorm(h))
        if each:
            each(i, h)
    return text.norm(h)


def attend_all(layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
    """Plain causal attention."""
    scale, outputs = queries.shape[-1] ** -0.5, []
    for a in range(0, queries.shape[2], BLOCK):
        some = queries[:, :, a : a + BLOCK], keys[:, :, : a + BLOCK], values[:, :, : a + BLOCK]
        outputs.append(mx.fast.scaled_dot_product_attention(*some, scale=scale, mask="causal"))
    return mx.concatenate(outputs, axis=2)


def attend_near(windows: Sequence[int | None], chunk: int) -> Attend:
    """Attention that forgets: layer i sees `windows[i]` chunks, its own and the first, where the
    attention sink is (None: everything)."""

    def near(layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        seen = blocks(0, queries.shape[2], chunk, windows[layer])
        return attend_blocks(queries, keys, values, None, 0, seen)

    return near


def sees_near(rows: Any, columns: Any, window: int, chunk: int, sink: int) -> np.ndarray:
    """Who sees whom in text alone, under a window and with the first `sink` tokens kept.

    Args: rows, columns: positions, of leading shape (..., rows) and (columns,). Returns booleans
    (..., rows, columns).
    """
    row = np.asarray(rows)[..., None]
    near = (columns >= (row // chunk - window) * chunk) | (columns < sink)
    return near & (columns <= row)


def summary_stream(model, texts: Callable[[int], Pair], count: int) -> Iterator[tuple[int, "Rows"]]:
    """The summary rows of the first `count` chunks, of whose text layer i has keys and values
    texts(i), (B, KV heads, count * k or more, head_dim), after RoPE.

    Yields each layer's index and its `Rows`, up to the last layer with a window, after which no
    one reads summaries. Keys and values are computed when asked for, so that the caller may first
    set the layer's own projections by what comes in.
    """
    args, text = model.args, model.model
    positions = mx.array(summary_positions(args, 0, count).astype(np.int32))
    h = mx.tile(text.summary_embedding, (count, 1))[None]
    for i, layer in enumerate(text.layers[: args.last_windowed + 1]):
        keys, values = texts(i)
        h = mx.broadcast_to(h, (keys.shape[0], *h.shape[1:]))
        rows = Rows(layer, h, positions)
        yield i, rows
        if i < args.last_windowed and not args.bypass[i]:
            end = count * args.summary_chunk_size
            h = rows.after((keys[:, :, :end], values[:, :, :end]), count)


class Rows:
    """Summary rows on their way through one layer."""

    def __init__(self, layer, h: mx.array, positions: mx.array):
        self.layer, self.h, self.positions = layer, h, positions
        norm = "input_layernorm_summary"
        self.x = layer[norm if norm in layer else "input_layernorm"](h)
        self._pair: Pair | None = None

    def pair(self) -> Pair:
        """Keys, after RoPE, and values: (B, KV heads, rows, head_dim)."""
        if self._pair is None:
            self._pair = self.layer.self_attn.summary_pair(self.x, self.positions)
        return self._pair

    def after(self, texts: Pair, chunks: int) -> mx.array:
        """The rows behind the layer, (B, rows, hidden); texts: what their chunks' text left."""
        attn = self.layer.self_attn
        queries = attn.summary_queries(self.x, self.positions)
        out = attn.o_proj(merged(summary_attention(queries, *self.pair(), *texts, chunks)))
        h = self.h + out
        return h + self.layer.mlp(self.layer.post_attention_layernorm(h))
