"""The caches of a model, one a layer."""

from typing import Any

from mlx_lm.models.cache import KVCache

from .full import FullCache
from .rolling import RollingSummaryCache


def make_cache(
    model: Any,
    rollback: int | None = None,
    text_bits: int | None = None,
    value_bits: int | None = None,
) -> list[Any]:
    """One cache a layer: rolling summaries for windowed layers, mlx-lm's KVCache for the others.

    `rollback` is how many tokens before the furthest one read can always be taken back.
    `text_bits` is what the windows' text is quantised to when mlx-lm quantises the caches, if not
    to the same bits as everything else, and `value_bits` likewise the values of everything else.
    Whatever is not given is the model's.
    """
    args = model.args
    rollback = model.rollback if rollback is None else rollback
    if rollback < 0:
        raise ValueError(f"rollback: found {rollback}, expected at least 0 tokens")
    shape = args.summary_chunk_size, args.summary_token_num
    text_bits, value_bits = text_bits or model.text_bits, value_bits or model.value_bits

    def of(window: int | None) -> Any:
        if window is not None:
            return RollingSummaryCache(*shape, window, rollback, text_bits, value_bits)
        return FullCache(value_bits) if value_bits else KVCache()

    return [of(window) for window in model.model.windows]
