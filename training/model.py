"""The model of the notebook assistant in PyTorch: Kwai Summary Attention in every layer, two
streams.

This is the reference that the weights are trained with, written for short texts on a CPU. The
model is the one of the KSA report (arXiv 2604.24432) with one summary token a chunk, the same
window in all layers, ``mix_coeff`` 1 (the summary projections replace the base ones) and
``origin`` positions. Parameter names are those of the released checkpoints, so a state dict is
already a checkpoint in Hub layout.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class NotebookConfig:
    """Sizes of the model. ``window`` counts chunks, ``vocab_size`` counts text tokens only."""

    vocab_size: int = 1280
    hidden_size: int = 160
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 448
    chunk: int = 8
    window: int = 4
    rope_theta: float = 1e7
    norm_eps: float = 1e-6

    @property
    def block(self) -> int:
        """Text tokens in a window: the attention is computed in blocks of this many queries."""
        return self.chunk * self.window

    def to_dict(self) -> dict:
        return asdict(self)


class Normed(torch.autograd.Function):
    """x over its root mean square, times a weight; in half of autograd's passes over memory."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = scale.add_(eps).rsqrt_()
        normed = x * scale
        ctx.save_for_backward(normed, scale, weight)
        return normed * weight

    @staticmethod
    def backward(ctx, gradient):
        normed, scale, weight = ctx.saved_tensors
        product = gradient * normed
        mean = (product @ weight)[..., None] / normed.shape[-1]
        out = (gradient * weight).addcmul_(normed, mean, value=-1).mul_(scale)
        return out, product.flatten(0, -2).sum(0), None


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        return Normed.apply(x, self.weight, self.eps)


def rope_table(positions, config: NotebookConfig):
    """cos and sin of the half-split rotary embedding, each (batch or 1, length, 1, head_dim / 2).

    Frequencies and angles are rounded to float32 where MLX rounds them: at thousands of tokens the
    last bit of an angle is the largest difference between two implementations.
    """
    half = config.head_dim // 2
    frequency = torch.exp(-torch.arange(half).float() * (math.log(config.rope_theta) / half))
    angle = positions.float()[..., None, None] * frequency
    return angle.cos(), angle.sin()


def turn(x, cos, sin):
    out = torch.empty(x.shape, dtype=x.dtype)
    (a, b), (c, d) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=c).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=d).addcmul_(a, sin)
    return out


class Rotation(torch.autograd.Function):
    """In half of the passes over memory that autograd would make: the gradient turns back."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, gradient):
        cos, sin = ctx.saved_tensors
        return turn(gradient, cos, -sin), None, None


def rotate(x, table):
    """Apply RoPE to x (batch, length, heads, head_dim)."""
    return Rotation.apply(x, *table)


def attention_mask(length: int, config: NotebookConfig, hide_summaries: bool = False):
    """What each block of text queries sees: (blocks, 1, block, 2 * block + chunks), True = visible.

    The keys of a block are the text of the block before it, its own text, and the summaries of all
    chunks.
    """
    block, chunk, window = config.block, config.chunk, config.window
    blocks, chunks = length // block, length // chunk
    start = torch.arange(blocks)[:, None, None] * block
    query = start + torch.arange(block)[None, :, None]
    key = start - block + torch.arange(2 * block)[None, None]
    near = (key >= 0) & (key <= query) & (query // chunk - key // chunk <= window)
    far = torch.arange(chunks)[None, None] < query // chunk - window
    if hide_summaries:
        far = torch.zeros_like(far)
    return torch.cat([near, far], -1)[:, None]


class Attention(nn.Module):
    def __init__(self, config: NotebookConfig):
        super().__init__()
        self.config = config
        d, q, kv = (
            config.hidden_size,
            config.num_heads * config.head_dim,
            config.num_kv_heads * config.head_dim,
        )
        for name, (i, o) in {
            "q_proj": (d, q),
            "k_proj": (d, kv),
            "v_proj": (d, kv),
            "o_proj": (q, d),
            "q_proj_summary": (d, q),
            "k_proj_summary": (d, kv),
            "v_proj_summary": (d, kv),
        }.items():
            setattr(self, name, nn.Linear(i, o, bias=False))
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def project(self, x, table, suffix: str):
        """q (batch, length, heads, head_dim), k and v (batch, length, kv_heads, head_dim), after
        norm and RoPE."""
        weights = [getattr(self, f"{n}_proj{suffix}").weight for n in "qkv"]
        q, k, v = F.linear(x, torch.cat(weights)).split([w.shape[0] for w in weights], dim=-1)
        q, k, v = (t.unflatten(-1, (-1, self.config.head_dim)) for t in (q, k, v))
        return rotate(self.q_norm(q), table), rotate(self.k_norm(k), table), v

    def forward(self, x, length, tables, mask, select=None):
        """x: (batch, length + chunks, hidden), the text rows first.

        With ``select`` = (rows, positions), two index vectors, also returns the attention of these
        text
        tokens to the summaries, (n, heads, chunks); it is a share of all they see; and what the
        summaries hold, (batch, chunks, kv_heads * head_dim).
        """
        c = self.config
        batch, chunks, block = x.shape[0], length // c.chunk, c.block
        blocks, groups = length // block, c.num_heads // c.num_kv_heads
        q, k, v = self.project(x[:, :length], tables[0], "")
        qs, ks, vs = self.project(x[:, length:], tables[1], "_summary")

        # A summary sees the text of its own chunk and itself.
        def own_chunk(text, summary):
            text = text.reshape(batch * chunks, c.chunk, c.num_kv_heads, c.head_dim)
            return torch.cat(
                [text, summary.reshape(batch * chunks, 1, c.num_kv_heads, c.head_dim)], 1
            ).transpose(1, 2)

        qc = qs.reshape(batch * chunks, c.num_kv_heads, groups, c.head_dim)
        scores = qc @ own_chunk(k, ks).transpose(-1, -2) * c.head_dim**-0.5
        out_summary = (scores.softmax(-1) @ own_chunk(v, vs)).reshape(batch, chunks, -1)

        # Text: for every block of queries, the keys of two blocks of text and all summaries.
        def keys(text, summary):
            text = text.reshape(batch, blocks, block, c.num_kv_heads, c.head_dim)
            before = F.pad(text[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
            summary = summary[:, None].expand(batch, blocks, chunks, c.num_kv_heads, c.head_dim)
            return torch.cat([before, text, summary], 2).flatten(0, 1).transpose(1, 2)

        kb, vb = keys(k, ks), keys(v, vs)
        # The query heads of one key head are rows of one product.
        qb = q.reshape(batch * blocks, block, c.num_kv_heads, groups, c.head_dim)
        qb = qb.permute(0, 2, 3, 1, 4).reshape(
            batch * blocks, c.num_kv_heads, groups * block, c.head_dim
        )
        out = F.scaled_dot_product_attention(qb, kb, vb, attn_mask=mask)
        out = out.reshape(batch * blocks, c.num_kv_heads, groups, block, c.head_dim).permute(
            0, 3, 1, 2, 4
        )
        out = self.o_proj(torch.cat([out.reshape(batch, length, -1), out_summary], 1))
        if select is None:
            return out, None
        row, position = select
        at = row * blocks + position // block
        qsel = q[row, position].reshape(-1, c.num_kv_heads, groups, c.head_dim)
        scores = qsel @ kb[at].transpose(-1, -2) * c.head_dim**-0.5
        scores = scores + mask[at, :, position % block][:, :, None]
        return out, (scores.flatten(1, 2).log_softmax(-1)[..., 2 * block :], vs.flatten(2))


class MLP(nn.Module):
    def __init__(self, config: NotebookConfig):
        super().__init__()
        d, i = config.hidden_size, config.intermediate_size
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(a, b, bias=False) for a, b in ((d, i), (d, i), (i, d))
        )

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: NotebookConfig):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x, *args, keep=None):
        """``keep``: the rows that go on; the last layer needs no others."""
        out, attended = self.self_attn(self.input_layernorm(x), *args)
        x = x + out
        if keep is not None:
            x = x[:, : keep.shape[1]][keep]
        return x + self.mlp(self.post_attention_layernorm(x)), attended


class Body(nn.Module):
    def __init__(self, config: NotebookConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size + 1, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)


class NotebookModel(nn.Module):
    """Token ids (batch, length) to logits over the text vocabulary."""

    def __init__(self, config: NotebookConfig):
        super().__init__()
        self.config = config
        self.model = Body(config)
        self._masks: dict = {}
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Random weights that already look up equal content: W_q near W_k, W_o near the transpose
        of W_v.

        After Trockman and Kolter, "Mimetic initialization of self-attention layers" (arXiv
        2305.09828). The
        summary projections start as copies of the base ones.
        """
        c = self.config
        groups = c.num_heads // c.num_kv_heads
        nn.init.normal_(self.model.embed_tokens.weight, std=0.05)
        for layer in self.model.layers:
            for name, p in layer.named_parameters():
                if p.dim() == 2:
                    gain = 0.5 if "o_proj" in name or "down_proj" in name else 1.0
                    nn.init.normal_(p, std=gain * p.shape[1] ** -0.5)
            a = layer.self_attn

            def per_query_head(weight):
                w = weight.view(c.num_kv_heads, 1, c.head_dim, c.hidden_size)
                return w.expand(-1, groups, -1, -1).reshape(-1, c.hidden_size)

            a.q_proj.weight.mul_(0.7).add_(0.7 * per_query_head(a.k_proj.weight))
            a.o_proj.weight.mul_(0.7).add_(0.35 / groups * per_query_head(a.v_proj.weight).T)
            for n in "qkv":
                getattr(a, f"{n}_proj_summary").weight.copy_(getattr(a, f"{n}_proj").weight)

    def mask(self, batch: int, length: int, hide_summaries: bool):
        """The mask of ``attention_mask`` as an additive one, repeated for the batch and the query
        groups."""
        key = (batch, length, hide_summaries)
        if key not in self._masks:
            if len(self._masks) > 8:
                self._masks.clear()
            c = self.config
            m = attention_mask(length, c, hide_summaries)
            m = (
                torch.zeros(m.shape)
                .masked_fill(~m, -1e9)
                .repeat(batch, 1, c.num_heads // c.num_kv_heads, 1)
            )
            self._masks[key] = m
        return self._masks[key]

    def forward(
        self,
        ids,
        positions=None,
        keep=None,
        hide_summaries=False,
        select=None,
        select_layer=None,
        copies=1.0,
    ):
        """Logits (batch, length, vocab), or (n, vocab) of the tokens where the mask ``keep`` is
        True.

        length must be a multiple of ``config.block``: pad on the right, nothing looks ahead.
        ``select`` and
        ``select_layer`` also return the log attention of some tokens in one layer, and the
        values of its summaries, see ``Attention.forward``.

        ``copies``: attention as if every summary were there so many times, the share that summaries
        have in a longer text.
        """
        c = self.config
        batch, length = ids.shape
        if length % c.block:
            raise ValueError(f"length {length} is not a multiple of the window of {c.block} tokens")
        if positions is None:
            positions = torch.arange(length)[None]
        tables = rope_table(positions, c), rope_table(positions[:, c.chunk - 1 :: c.chunk], c)
        mask = self.mask(batch, length, hide_summaries)
        if copies != 1:
            mask = mask + F.pad(
                torch.zeros(2 * c.block), (0, length // c.chunk), value=math.log(copies)
            )
        embedding = self.model.embed_tokens.weight
        summary = embedding[c.vocab_size].expand(batch, length // c.chunk, -1)
        x = torch.cat([self.model.embed_tokens(ids), summary], 1)
        attended = None
        for i, layer in enumerate(self.model.layers):
            last = i == c.num_layers - 1
            x, a = layer(
                x, length, tables, mask, select if i == select_layer else None,
                keep=keep if last else None,
            )  # fmt: skip
            attended = a if a is not None else attended
        if keep is None:
            x = x[:, :length]
        logits = self.model.norm(x) @ embedding[: c.vocab_size].T
        return logits if select is None else (logits, *attended)
