"""What a session's last answer cost, and what its cache holds."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .session import Session


def cache_bytes(session: Session) -> int:
    """Bytes of the keys and values that the next token attends to, as the cache holds them.

    Exactly these: neither the room that buffers have to grow, nor what is kept to take text back.
    """
    args, n, total = session.model.args, session.offset, 0.0
    k, s = args.summary_chunk_size, args.summary_token_num
    for cache, window in zip(session.own_cache, args.windows, strict=True):
        text, summaries = n, 0
        if window is not None and n:
            gone = max(0, (n - 1) // k - window)
            text, summaries = n - gone * k, gone * s
        text_bytes, summary_bytes = _row_bytes(session, cache)
        total += text * text_bytes + summaries * summary_bytes
    return round(total)


def _row_bytes(session: Session, cache: Any) -> tuple[float, float]:
    """Bytes of the keys and values of one text token, and of one summary."""
    args = session.model.args
    dim, heads = args.head_dim, args.num_key_value_heads
    size = session.model.model.norm.weight.dtype.size
    state: Any = tree_flatten(cache.state)
    planes = [x for _, x in state if x.ndim == 4]
    packed = {x.shape[-1] * 32 // dim for x in planes if x.dtype == mx.uint32}
    if not packed:
        row = 2.0 * heads * dim * size
        return row, row
    text_bits = session.text_bits if session.text_bits in packed else min(packed)
    bits = max(packed - {text_bits}, default=text_bits)
    # A scale and a bias a group.
    groups = min(x.shape[-1] for x in planes if x.dtype != mx.uint32)
    of_text, of_summaries = (
        2 * heads * (dim * b / 8 + 2 * size * groups) for b in (text_bits, bits)
    )
    return of_text, of_summaries


def full_bytes(session: Session) -> int:
    """Bytes that full attention would hold: keys and values of every token in every layer."""
    args = session.model.args
    size = session.model.model.norm.weight.dtype.size
    row = args.num_key_value_heads * args.head_dim * size
    return 2 * args.num_hidden_layers * row * session.offset


def cache_line(session: Session) -> str:
    """What the KV cache holds, and what full attention would."""
    held, full = cache_bytes(session), full_bytes(session)
    ratio = f", {full / held:.2f} times as much" if held else ""
    start = session.options.get("quantized_kv_start", 5000)
    later = "kv_bits" in session.options and session.offset < start
    return (
        f"KV cache: {mb(held)} for {session.offset:,} tokens; "
        f"full attention would hold {mb(full)}{ratio}"
        + (f"; quantised from {start:,} tokens on (--quantized-kv-start)" if later else "")
    )


def report(session: Session) -> str:
    """What mlx_lm.generate reports, and the KV cache."""
    lines, u = [], session.usage
    if u is not None:
        lines += [
            f"Prompt: {u.prompt_tokens:,} tokens, {u.prompt_tps:,.1f} tokens-per-sec",
            f"Generation: {u.generation_tokens:,} tokens, {u.generation_tps:,.1f} tokens-per-sec",
        ]
        if session.draft_model:
            share = u.drafted / max(u.generation_tokens, 1)
            lines.append(f"Draft model: proposed {u.drafted:,} of them ({share:.0%})")
    lines.append(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
    lines.append(cache_line(session))
    return "\n".join(lines)


def mb(nbytes: int) -> str:
    """Bytes for people."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
