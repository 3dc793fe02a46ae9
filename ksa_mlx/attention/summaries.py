"""Summary queries: each sees its chunk's text and its chunk's summaries so far."""

import mlx.core as mx


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
        queries: (B, heads, chunks * s, head_dim), the summary rows, after RoPE.
        keys: (B, KV heads, chunks * s, head_dim), theirs.
        values: likewise.
        text_keys: (B, KV heads, chunks * k, head_dim), the same chunks' text.
        text_values: likewise.
        chunks: how many there are.

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
