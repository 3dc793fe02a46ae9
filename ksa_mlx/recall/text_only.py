"""The control: a KSA model whose summaries nobody sees.

What is hidden: in windowed layers, all summaries. What is left there: the text of the window, and
that of the first chunk, where the attention sink lies; without it a model loses far more than what
it had to remember. Layers with full attention see all of the text, as they always do. No weight
changes, and summary rows are not computed.
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.models.base import scaled_dot_product_attention
from mlx_lm.models.cache import KVCache

from ..attention.plan import BLOCK

# Query positions start, stop; how many first keys they see, the first key of the window; the mask.
Block = tuple[int, int, int, int, Any]


def blocks(offset: int, length: int, chunk: int, window: int | None) -> list[Block]:
    """Blocks of queries offset .. offset + length - 1 in a layer with that window; None: all."""
    found: list[Block] = []
    for a in range(offset, offset + length, BLOCK):
        b = min(a + BLOCK, offset + length)
        start = 0 if window is None else max(0, a // chunk - window) * chunk
        sink = min(chunk, start)
        query = mx.arange(a, b)[:, None]
        key = mx.concatenate([mx.arange(sink), mx.arange(start, b)])
        sees = key <= query
        if window is not None:
            sees = sees & ((key // chunk >= query // chunk - window) | (key < chunk))
        found.append((a, b, sink, start, sees))
    return found


class TextOnly(nn.Module):
    """A KSA model, of the same weights, without its summaries; it is called as the model is.

    Args: model: a `ksa_mlx.Model`. Its caches are mlx-lm's and hold all of the text.
    """

    def __init__(self, model: Any):
        super().__init__()
        self.args, self.whole = model.args, model

    @property
    def layers(self):
        return self.whole.layers

    def make_cache(self) -> list[Any]:
        return [KVCache() for _ in self.layers]

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """Args: inputs (B, L) text ids. Returns logits (B, L, text ids)."""
        text, cache = self.whole.model, cache or self.make_cache()
        h, offset = text.embed_tokens(inputs), cache[0].offset
        shape = offset, inputs.shape[1], self.args.summary_chunk_size
        seen = {window: blocks(*shape, window) for window in set(text.windows)}
        for layer, window, c in zip(self.layers, text.windows, cache, strict=True):
            attn, x = layer.self_attn, layer.input_layernorm(h)
            k, v = c.update_and_fetch(*attn.text_pair(x, offset))
            out = attend(attn.text_queries(x, offset), k, v, c, offset, seen[window])
            h = h + attn.o_proj(out.swapaxes(1, 2).reshape(*h.shape[:2], -1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        return self.whole.head(text.norm(h))


def attend(
    queries: mx.array, keys: Any, values: Any, cache: Any, offset: int, seen: list[Block]
) -> mx.array:
    """Attention of queries (B, heads, L, head_dim), block by block, each after the one before.

    Args: keys, values: of all text, as `cache` hands them out, quantised or not. offset: the
    position of the first query. seen: of `blocks`. Returns (B, heads, L, head_dim).
    """
    outputs: list[mx.array] = []
    for a, b, sink, start, sees in seen:
        part = lambda x, sink=sink, start=start, b=b: mx.concatenate(
            [x[:, :, :sink], x[:, :, start:b]], axis=2
        )
        some = queries[:, :, a - offset : b - offset]
        if outputs:
            some = mx.depends([some], outputs[-1:])[0]
        k, v = tree_map(part, (keys, values))
        scale = queries.shape[-1] ** -0.5
        outputs.append(scaled_dot_product_attention(some, k, v, cache, scale=scale, mask=sees))
    return mx.concatenate(outputs, axis=2)
