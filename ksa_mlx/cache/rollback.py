"""Taking back tokens: who asks for it, and what mlx-lm's speculative decoding leaves behind."""

import os
from collections.abc import Iterable
from typing import Any

from ..errors import ConfigError

# Overrides the config's `rollback`, for commands that have no flag of their own for it.
ROLLBACK = "KSA_MLX_ROLLBACK"

# What our commands take for a draft model: rejected drafts are far fewer, and it costs little.
ENOUGH = 64


def wanted_rollback(configured: int) -> int:
    """How many tokens a model's caches must be able to take back.

    The environment variable KSA_MLX_ROLLBACK overrides the configured number. Raises
    `ConfigError` if it is no number of tokens.
    """
    value = os.environ.get(ROLLBACK)
    if value is None:
        return configured
    if not value.isdecimal():
        raise ConfigError(ROLLBACK, value, "an integer of at least 0")
    return int(value)


def settle(cache: list[Any]) -> int:
    """Make all layers' caches, of a model and of its draft, hold the same text. Returns its tokens.

    `speculative_generate_step` ends with the model's cache one token behind what it has yielded
    if the last token was the model's own, and with the draft model's cache one more behind if all
    drafts were accepted. Returns 0 where the caches cannot be brought together.
    """
    offsets: list[Any] = [getattr(c, "offset", None) for c in cache]
    if not all(type(offset) is int for offset in offsets):
        return 0
    shortest = min(offsets)
    ahead = [
        (c, offset - shortest)
        for c, offset in zip(cache, offsets, strict=True)
        if offset > shortest
    ]
    return shortest if take_back(ahead) else 0


def take_back(ends: Iterable[tuple[Any, int]]) -> bool:
    """Take back the last tokens of each cache, so many. Returns False, and leaves caches that
    disagree, where one does not hold the text for that."""
    try:
        for c, n in ends:
            if not c.is_trimmable():
                return False
            c.trim(n)
    except ValueError:  # beyond the reach of its rollback
        return False
    return True
