"""The caches of a model, one a layer."""

from typing import Any

from mlx_lm.models.cache import KVCache

from .rolling import RollingSummaryCache


def make_cache(model: Any, rollback: int | None = None, text_bits: int | None = None) -> list[Any]:
    """One cache a layer: rolling summaries for windowed layers, mlx-lm's KVCache for the others.

    `rollback` is how many tokens before the furthest one read can always be taken back (default:
    the model's);
    `text_bits` what the windows' text is quantised to when mlx-lm quantises the caches, if not
    to the same bits as everything else.
    """
    args = model.args
    rollback = model.rollback if rollback is None else rollback
    if rollback < 0:
        raise ValueError(f"rollback: found {rollback}, expected at least 0 tokens")
    shape = args.summary_chunk_size, args.summary_token_num
    return [
        KVCache() if window is None else RollingSummaryCache(*shape, window, rollback, text_bits)
        for window in model.model.windows
    ]
