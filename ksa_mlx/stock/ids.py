"""The ids of a prompt are checked before the model reads one.

MLX looks ids up in a table without a bound: one beyond it reads other memory, and gives another
text at each run. A prompt comes from the host, so looking at it costs no step its overlap; ids
that are sampled cannot be wrong, since logits are as wide as the table. mlx-lm checks nothing.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from ..errors import SessionError

generate: Any = importlib.import_module("mlx_lm.generate")  # mlx_lm has a function of that name


def table_of(model: Any) -> int | None:
    """How many ids a model knows; None where its configuration does not say."""
    args = getattr(model, "args", None)
    known = getattr(args, "summary_token_begin", None) or getattr(args, "vocab_size", None)
    return known if isinstance(known, int) else None


def unknown(ids: Sequence[int], known: int) -> int | None:
    """The first of some ids that is none of 0 .. known - 1; None if there is none."""
    if not ids or (max(ids) < known and min(ids) >= 0):
        return None
    return next(i for i in ids if not 0 <= i < known)


def check_ids(prompt: Any, *models: Any):
    """Refuse ids (n,), an array or a list, that one of the models does not know.

    Raises SessionError that names the first one.
    """
    ids = prompt.reshape(-1).tolist() if isinstance(prompt, mx.array) else prompt
    for model in models:
        known = table_of(model)
        if known is not None and (wrong := unknown(ids, known)) is not None:
            raise SessionError(f"prompt: found token id {wrong}, expected 0 to {known - 1}")


def install():
    """Make mlx-lm's generation, by one sequence, with a draft and in batches, check first."""
    generate.generate_step = _checked(generate.generate_step, 1)
    generate.speculative_generate_step = _checked(generate.speculative_generate_step, 2)
    insert = generate.BatchGenerator.insert_segments

    @functools.wraps(insert)
    def insert_segments(self, segments, *args, **kwargs):
        for parts in segments:
            for part in parts:
                check_ids(part, self.model)
        return insert(self, segments, *args, **kwargs)

    generate.BatchGenerator.insert_segments = insert_segments


def _checked(step: Callable, models: int) -> Callable:
    @functools.wraps(step)
    def checked(prompt, *args, **kwargs):
        check_ids(prompt, *args[:models], *(kwargs.get(k) for k in ("model", "draft_model")))
        return step(prompt, *args, **kwargs)

    return checked
