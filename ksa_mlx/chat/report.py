"""What a session's last answer cost, and what its cache holds."""

import mlx.core as mx

from ..cache.storage import Affine, Segment, segments_of
from ..memory.room import gb
from ..stock.prompt_lookup import PromptLookup
from .session import Session


def cache_bytes(session: Session) -> int:
    """Bytes of the keys and values that the next token attends to, as the cache holds them.

    Exactly these: neither the room that buffers have to grow, nor what is kept to take text back.
    """
    return round(sum(one.nbytes for one in _held(session)))


def _held(session: Session) -> list[Segment]:
    return [one for c in session.own_cache if not c.empty() for one in segments_of(c)]


def _format(session: Session) -> Affine | None:
    """The coarsest format in which keys and values are held; None if they are not quantised."""
    forms = [one.form for one in _held(session) if isinstance(one.form, Affine)]
    return min(forms, key=lambda form: form.bits, default=None)


def full_bytes(session: Session) -> int:
    """Bytes that full attention would hold: keys and values of every token in every layer.

    Of a quantised cache, in its format, that of the summaries.
    """
    args, bits = session.model.args, 8.0 * session.model.model.norm.weight.dtype.size
    if form := _format(session):
        # A group has a scale and a bias besides, in the model's type.
        bits = form.bits + 2 * bits / form.group_size
    row = args.num_key_value_heads * args.head_dim * bits / 8
    return round(2 * args.num_hidden_layers * row * session.offset)


def cache_line(session: Session) -> str:
    """What the KV cache holds, and what full attention would."""
    held, full = cache_bytes(session), full_bytes(session)
    ratio = f", {full / held:.2f} times as much" if full > held else ""
    form = _format(session)
    at = f" at {form.bits} bits" if form else ""
    start = session.options.get("quantized_kv_start", 5000)
    later = "kv_bits" in session.options and session.offset < start
    return (
        f"KV cache: {gb(held)} for {session.offset:,} tokens; "
        f"full attention would hold {gb(full)}{at}{ratio}"
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
            who = (
                "Prompt lookup" if isinstance(session.draft_model, PromptLookup) else "Draft model"
            )
            lines.append(f"{who}: proposed {u.drafted:,} of them ({share:.0%})")
    lines.append(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
    lines.append(cache_line(session))
    return "\n".join(lines)
