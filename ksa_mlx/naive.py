"""Who sees whom in a KSA model: the definition (paper section 3; official prefill).

Everything else in the package is tested against this page. It is written to be read, not to be
fast: every summary of every complete chunk is computed, and attention is dense.
"""

import mlx.core as mx
import numpy as np


def visibility(n: int, chunk: int, s: int, window: int) -> np.ndarray:
    """Which rows see which, for `n` text tokens and the summaries of their complete chunks.

    Rows are the text tokens in order, then `s` summary tokens for each complete chunk.
    Returns a boolean matrix, True where the row (query) sees the column (key).
    """
    m = n // chunk * s
    index = np.concatenate([np.arange(n), np.arange(m)])  # within text, within summaries
    chunk_of = np.concatenate([np.arange(n) // chunk, np.arange(m) // s])
    summary = np.arange(n + m) >= n

    (qi, qc, qs), (ki, kc, ks) = (
        (index[:, None], chunk_of[:, None], summary[:, None]),
        (index[None], chunk_of[None], summary[None]),
    )
    text_to_text = ~qs & ~ks & (kc >= qc - window) & (ki <= qi)
    text_to_summary = ~qs & ks & (kc < qc - window)
    summary_to_text = qs & ~ks & (kc == qc)
    summary_to_summary = qs & ks & (kc == qc) & (ki <= qi)
    return text_to_text | text_to_summary | summary_to_text | summary_to_summary


def text_positions(args, start: int, stop: int) -> np.ndarray:
    """RoPE positions of the text tokens start .. stop - 1."""
    p = np.arange(start, stop)
    return (
        p % args.summary_chunk_size if args.summary_chunk_position_ids_type == "inner_chunk" else p
    )


def summary_positions(args, first: int, last: int) -> np.ndarray:
    """RoPE positions of the summary tokens of chunks first .. last - 1, in order."""
    k, s = args.summary_chunk_size, args.summary_token_num
    kind = args.summary_token_position_ids_type
    c, i = np.divmod(np.arange(first * s, last * s), s)
    if kind == "zeros":
        return np.zeros_like(c)
    i = i + 1 if kind == "last_chunk_slice_right" else i
    return np.maximum(c * k, c * k + i * k // s - 1)


def forward(model, inputs: mx.array) -> mx.array:
    """Logits of a `ksa_mlx.Model` over a whole text, by the definition.

    Args: inputs (B, n) text ids. Returns (B, n, text ids).
    """
    args, text = model.args, model.model
    (B, n), k, s = inputs.shape, args.summary_chunk_size, args.summary_token_num
    chunks = n // k
    positions = np.concatenate([text_positions(args, 0, n), summary_positions(args, 0, chunks)])
    summaries = mx.broadcast_to(
        mx.tile(text.summary_embedding, (chunks, 1)), (B, chunks * s, args.hidden_size)
    )
    h = mx.concatenate([text.embed_tokens(inputs), summaries.astype(text.norm.weight.dtype)], 1)

    for i, layer in enumerate(text.layers):
        window = chunks if args.windows[i] is None else args.windows[i]
        sees = mx.array(visibility(n, k, s, window))
        out = layer_forward(layer, h, n, positions, sees, args)
        # Summary rows skip a layer without summary attention.
        h = mx.concatenate([out[:, :n], h[:, n:]], 1) if args.bypass[i] else out

    h = text.norm(h[:, :n])
    logits = text.embed_tokens.as_linear(h) if args.tie_word_embeddings else model.lm_head(h)
    return predicted(args, logits)


def predicted(args, logits: mx.array) -> mx.array:
    """Logits (..., text ids) with -inf where an id is never predicted."""
    if args.num_predicted >= logits.shape[-1]:
        return logits
    return mx.where(mx.arange(logits.shape[-1]) < args.num_predicted, logits, -mx.inf)


def layer_forward(layer, h, n, positions, sees, args):
    """One decoder layer over text rows (the first n) and summary rows, (B, rows, hidden)."""
    x = layer.input_layernorm(h)
    if "input_layernorm_summary" in layer:
        x = mx.concatenate([x[:, :n], layer.input_layernorm_summary(h[:, n:])], 1)
    attn = layer.self_attn
    B, rows, _ = x.shape

    def heads(name):
        """Project to (B, rows, heads, head_dim); blend the summary rows' own projection in."""

        def project(proj, rows, norm):
            y = attn[proj](rows).reshape(B, rows.shape[1], -1, args.head_dim)
            return attn[norm](y) if norm in attn else y

        norm = f"{name}_norm"  # of queries and keys, in bases that have it
        base, own = project(f"{name}_proj", x, norm), f"{name}_proj_summary"
        if own not in attn or x.shape[1] == n:
            return base
        own_norm = f"{norm}_summary" if f"{norm}_summary" in attn else norm
        own = project(own, x[:, n:], own_norm)
        mix = args.mix_coeff
        return mx.concatenate([base[:, :n], mix * own + (1 - mix) * base[:, n:]], 1)

    def rope(y):
        """Rotate row r of (B, rows, heads, head_dim) by positions[r]."""
        flat = y.swapaxes(0, 1).reshape(rows, -1, 1, args.head_dim)
        flat = attn.rope(flat, offset=mx.array(positions.astype(np.int32)))
        return flat.reshape(rows, B, -1, args.head_dim).swapaxes(0, 1)

    q, k, v = rope(heads("q")), rope(heads("k")), heads("v")
    repeat = q.shape[2] // k.shape[2]
    k, v = mx.repeat(k, repeat, axis=2), mx.repeat(v, repeat, axis=2)
    scores = mx.einsum("bqhd,bkhd->bhqk", q, k) * args.head_dim**-0.5
    weights = mx.softmax(mx.where(sees, scores, -mx.inf), axis=-1, precise=True)
    out = mx.einsum("bhqk,bkhd->bqhd", weights, v).reshape(B, rows, -1)

    h = h + attn.o_proj(out)
    return h + layer.mlp(layer.post_attention_layernorm(h))
