"""A KSA language model: a Qwen3, or a base much like it, whose windowed layers read old text
through summary tokens.

Text rows and summary rows are carried as two blocks of one array, text first: they share the
projections, norms and the MLP, and meet only in attention (see `naive.py` for the definition).
"""

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask
from mlx_lm.models.qwen3 import MLP
from mlx_lm.models.rope_utils import initialize_rope

from .attention.full import full_attention, full_rows, full_text
from .attention.plan import Call
from .attention.summaries import summary_attention
from .attention.windowed import windowed_attention
from .cache.batch import BatchRollingSummaryCache, Rows
from .cache.make import make_cache
from .cache.rollback import wanted_rollback
from .cache.rolling import RollingSummaryCache
from .config import ModelArgs
from .distributed import Pipeline, shard
from .naive import predicted
from .weights import sanitize


class Attention(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.args = args
        self.window = args.windows[layer]
        # Summary rows end in the last windowed layer: there they leave only keys and values.
        self.last = layer == args.last_windowed
        self.n_heads, self.n_kv_heads = args.num_attention_heads, args.num_key_value_heads
        self.head_dim = dim = args.head_dim
        hidden, bias, eps = args.hidden_size, args.attention_bias, args.rms_norm_eps

        self.q_proj = nn.Linear(hidden, self.n_heads * dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.n_kv_heads * dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.n_kv_heads * dim, bias=bias)
        self.o_proj = nn.Linear(self.n_heads * dim, hidden, bias=args.attention_output_bias)
        if args.use_qk_norm:
            self.q_norm = nn.RMSNorm(dim, eps=eps)
            self.k_norm = nn.RMSNorm(dim, eps=eps)
        if args.own_kv(layer):
            self.k_proj_summary = nn.Linear(hidden, self.n_kv_heads * dim, bias=bias)
            self.v_proj_summary = nn.Linear(hidden, self.n_kv_heads * dim, bias=bias)
            if args.summary_independent_qk_norm:
                self.k_norm_summary = nn.RMSNorm(dim, eps=eps)
        if args.own_q(layer):
            self.q_proj_summary = nn.Linear(hidden, self.n_heads * dim, bias=bias)
            if args.summary_independent_qk_norm:
                self.q_norm_summary = nn.RMSNorm(dim, eps=eps)

        self.rope = initialize_rope(
            dim,
            base=args.rope_theta,
            traditional=False,
            scaling_config=args.rope_scaling,
            max_position_embeddings=args.max_position_embeddings,
        )

    def _heads(self, name: str, x: mx.array, own: str = "") -> mx.array:
        """Project rows (B, rows, hidden) to heads (B, rows, heads, head_dim), normed where
        the base norms them."""
        y = self[f"{name}_proj{own}"](x)
        y = y.reshape(*x.shape[:2], -1, self.head_dim)
        for norm in (f"{name}_norm{own}", f"{name}_norm"):
            if norm in self:
                return self[norm](y)
        return y

    def _project(self, name: str, x: mx.array, L: int) -> tuple[mx.array, mx.array | None]:
        """Heads of the L text rows, (B, heads, L, head_dim), and of the summary rows, before RoPE.

        Summary rows blend their own projection with the base one: mix * own + (1 - mix) * base.
        """
        if x.shape[1] == L:
            return self._heads(name, x).swapaxes(1, 2), None
        if f"{name}_proj_summary" not in self:
            y = self._heads(name, x)
            return y[:, :L].swapaxes(1, 2), y[:, L:]
        mix = self.args.mix_coeff
        own = self._heads(name, x[:, L:], "_summary")
        if mix == 1:
            return self._heads(name, x[:, :L]).swapaxes(1, 2), own
        y = self._heads(name, x)
        return y[:, :L].swapaxes(1, 2), mix * own + (1 - mix) * y[:, L:]

    def text_queries(self, x: mx.array, offset: Any) -> mx.array:
        """Queries (B, heads, L, head_dim) of text rows x (B, L, hidden), normed, after RoPE."""
        return self._rotate_text(self._heads("q", x).swapaxes(1, 2), offset)

    def text_pair(self, x: mx.array, offset: Any) -> tuple[mx.array, mx.array]:
        """Keys and values of text rows, likewise."""
        keys, values = (self._heads(name, x).swapaxes(1, 2) for name in "kv")
        return self._rotate_text(keys, offset), values

    def summary_queries(self, x: mx.array, positions: mx.array) -> mx.array:
        """Queries (B, heads, rows, head_dim) of summary rows x (B, rows, hidden) at positions
        (rows,)."""
        return self.rotate_at(self._own("q", x), positions)

    def summary_pair(self, x: mx.array, positions: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values of summary rows, likewise."""
        return self.rotate_at(self._own("k", x), positions), self._own("v", x).swapaxes(1, 2)

    def _own(self, name: str, x: mx.array) -> mx.array:
        """Project summary rows to (B, rows, heads, head_dim), blended as in `_project`."""
        if f"{name}_proj_summary" not in self:
            return self._heads(name, x)
        mix, own = self.args.mix_coeff, self._heads(name, x, "_summary")
        return own if mix == 1 else mix * own + (1 - mix) * self._heads(name, x)

    def _rotate_text(self, x: mx.array, offset: Any) -> mx.array:
        """Rotate text heads (B, heads, L, head_dim) at positions offset, offset + 1, ..."""
        if self.args.summary_chunk_position_ids_type == "origin":
            return self.rope(x, offset=offset)
        positions = mx.array(offset).reshape(-1, 1) + mx.arange(x.shape[2])
        positions = mx.broadcast_to(
            positions % self.args.summary_chunk_size, (x.shape[0], x.shape[2])
        )
        return self.rotate_at(x.swapaxes(1, 2), positions)

    def rotate_at(self, x: mx.array, positions: mx.array) -> mx.array:
        """Rotate row r of (B, rows, heads, head_dim) at positions[..., r]; heads go before rows."""
        B, rows, heads, dim = x.shape
        positions = mx.broadcast_to(positions, (B, rows)).reshape(-1).astype(mx.int32)
        # One position a batch entry is the one layout that RoPE takes freely.
        y = self.rope(x.reshape(B * rows, heads, 1, dim), offset=positions)
        return y.reshape(B, rows, heads, dim).swapaxes(1, 2)

    def __call__(self, x: mx.array, call: Call, mask: Any, cache: Any) -> mx.array:
        """Args: x (B, text rows + summary rows, hidden), normed. Returns the same shape, or the
        text rows only where summary rows end."""
        B, L = x.shape[0], call.length
        has_summaries = x.shape[1] > L

        k, sk = self._project("k", x, L)
        v, sv = self._project("v", x, L)
        q, sq = self._project("q", x[:, :L] if self.last and has_summaries else x, L)
        if len(call.steps) > 1:
            q, k, v = call.by_row(q), call.by_row(k), call.by_row(v)
        q, k = self._rotate_text(q, call.offset), self._rotate_text(k, call.offset)
        summaries = text = None
        if sk is not None and sv is not None:
            summaries = self.rotate_at(sk, call.summary_positions), sv.swapaxes(1, 2)

        if self.window is None:
            if getattr(cache, "ragged", False):
                out, text = full_rows(q, k, v, cache, call)
            else:
                # On whichever cache mlx-lm uses for it.
                if cache is not None:
                    k, v = cache.update_and_fetch(k, v)
                out = full_attention(q, k, v, cache, mask, call)
                if has_summaries:
                    text = full_text(k, v, cache, call)
        else:
            out, text = windowed_attention(q, k, v, summaries, cache, call, self.window)
        out = out.swapaxes(1, 2).reshape(B, L, -1)
        if sq is not None and summaries and text:
            sq, (sk, sv), (tk, tv) = self.rotate_at(sq, call.summary_positions), summaries, text
            rows = summary_attention(sq, sk, sv, tk, tv, call.chunks).swapaxes(1, 2)
            out = mx.concatenate([out, rows.reshape(B, call.rows, -1)], axis=1)
        return self.o_proj(out)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.bypass = args.bypass[layer]
        self.self_attn = Attention(args, layer)
        self.mlp = MLP(args.hidden_size, args.intermediate_size)
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        if args.own_norm(layer):
            self.input_layernorm_summary = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(
        self, h: mx.array, call: Call, mask: Any | None = None, cache: Any | None = None
    ) -> mx.array:
        """Args: h (B, text rows + summary rows, hidden). Returns the same shape, or the text rows
        only where summary rows end."""
        L = call.length
        summaries = None
        if self.bypass and h.shape[1] > L:
            h, summaries = h[:, :L], h[:, L:]
        x = self.input_layernorm(h)
        if "input_layernorm_summary" in self and h.shape[1] > L:
            x = mx.concatenate([x[:, :L], self.input_layernorm_summary(h[:, L:])], axis=1)
        r = self.self_attn(x, call, mask, cache)
        h = (h if h.shape == r.shape else h[:, : r.shape[1]]) + r
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h if summaries is None else mx.concatenate([h, summaries], axis=1)


class KSAModel(Pipeline, nn.Module):
    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.embed_tokens = nn.Embedding(args.summary_token_begin, args.hidden_size)
        self.summary_embedding = mx.zeros((args.summary_token_num, args.hidden_size))
        self.layers = [DecoderLayer(args, i) for i in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.take_layers(0, None)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        """Args: inputs (B, L) text ids, or input_embeddings (B, L, hidden). Returns the last
        hidden states of the text, (B, L, hidden)."""
        h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
        shape, cache = h.shape, cache or [None] * len(self.pipeline_layers)
        self._check(cache)
        # Full layers share one mask; their caches all hold the same text.
        mask = None if self.full is None else create_attention_mask(h, cache[self.full])
        # All windowed layers, also those of other machines, have summarised the same chunks.
        summarises = self.windowed is not None
        call = Call(self.args, shape[1], cache[self.windowed or 0], summarises, self.training)
        if len(call.steps) > 1:
            h = h.reshape(1, call.length, -1)
        if call.rows:
            h = self.with_summaries(h, call)
        h = self.receive(h, call.length)
        for layer, c in zip(self.pipeline_layers, cache, strict=True):
            h = layer(h, call, mask, c)
        h = self.send(h, call.length, shape, cache)
        return self.norm(h)

    def with_summaries(self, h: mx.array, call: Call) -> mx.array:
        """Text rows (B, L, hidden), and behind them the first input of a call's summary rows."""
        rows = mx.tile(self.summary_embedding, (call.chunks, 1)).astype(h.dtype)
        return mx.concatenate([h, mx.broadcast_to(rows, (h.shape[0], *rows.shape))], axis=1)

    def _check(self, cache: list[Any]):
        """Refuse caches that are not this model's, or of which some hold more text than others."""
        advice = "make them with ksa_mlx.make_cache(model)"
        if len(cache) != len(self.windows):
            raise ValueError(f"caches: found {len(cache)}, expected {len(self.windows)}; {advice}")
        ours = (RollingSummaryCache, BatchRollingSummaryCache)
        for i, (c, window) in enumerate(zip(cache, self.windows, strict=True)):
            if c is not None and isinstance(c, ours) != (window is not None):
                expected = "KVCache" if window is None else "RollingSummaryCache"
                raise ValueError(
                    f"cache of layer {i}: found {type(c).__name__}, expected {expected}; {advice}"
                )
        # Those of a batch are arrays, which are not made only to be passed over.
        offsets = {
            c.offset
            for c in cache
            if not isinstance(c, Rows) and type(getattr(c, "offset", None)) is int
        }
        if len(offsets) > 1:
            raise ValueError(
                f"caches: found layers of {sorted(offsets)} tokens, expected the same in all; "
                "a trim that raised leaves them so"
            )


class Model(nn.Module):
    """A KSA model as mlx-lm calls it.

    `model(inputs, cache=None, input_embeddings=None)`: inputs (B, L) text ids or
    input_embeddings (B, L, hidden). Returns logits (B, L, text ids), in the weights' dtype.
    Without a cache it is differentiable. `rollback`, `text_bits` and `value_bits` are what
    `make_cache()` takes.
    """

    text_bits: int | None = None
    value_bits: int | None = None

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.rollback = wanted_rollback(args.rollback)
        # Whether some text ids are never predicted.
        self.cuts = args.num_predicted < args.summary_token_begin
        self.model = KSAModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.summary_token_begin, bias=False)

    def __call__(
        self,
        inputs: mx.array,
        cache: list[Any] | None = None,
        input_embeddings: mx.array | None = None,
    ) -> mx.array:
        return self.head(self.model(inputs, cache, input_embeddings))

    def head(self, h: mx.array) -> mx.array:
        """Logits (..., text ids) of last hidden states (..., hidden)."""
        tied = self.args.tie_word_embeddings
        logits = self.model.embed_tokens.as_linear(h) if tied else self.lm_head(h)
        return predicted(self.args, logits) if self.cuts else logits

    def make_cache(self) -> list[Any]:
        return make_cache(self)

    def sanitize(self, weights):
        return sanitize(self.args, weights)

    def shard(self, group: mx.distributed.Group | None = None):
        shard(self, group)

    @property
    def layers(self):
        return self.model.pipeline_layers
