"""The models that are measured, and the ways in which each is: plain, quantised, hidden."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_lm
from mlx_lm.models.cache import make_prompt_cache

from ..checkpoint.load import load
from ..checkpoint.source import fetch_config
from ..config import is_ksa
from ..errors import KSAError, MemoryLimitError, one_line
from ..memory.caches import Quantised
from ..memory.room import Room, gb
from .score import quantise
from .text_only import TextOnly


@dataclass(frozen=True)
class Way:
    """How a model is measured: kv_bits of its caches, None: plain; hidden: the control."""

    kv_bits: int | None = None
    hidden: bool = False

    def quantised(self, group_size: int) -> Quantised | None:
        """What becomes of the caches, after the first step of reading."""
        return Quantised(self.kv_bits, group_size, 0) if self.kv_bits else None

    def __str__(self) -> str:
        if self.hidden:
            return "summaries hidden"
        return f"KV {self.kv_bits} bits" if self.kv_bits else "plain"


def labels(names: list[str]) -> dict[str, str]:
    """Short names of models; the names as given where two would be the same."""
    short = {name: Path(name.rstrip("/")).name or name for name in names}
    twice = len(set(short.values())) < len(short)
    return {name: name for name in names} if twice else short


def open_model(name: str) -> tuple[Any, Any]:
    """A KSA model or any of mlx-lm's, its weights still on disk, and its tokenizer. Raises KSAError
    of one line."""
    try:
        opened = load if is_ksa(fetch_config(name)) else mlx_lm.load
        return opened(name, lazy=True)[:2]
    except Exception as e:  # the many ways in which no model loads
        raise KSAError(f"--model: {name}: {one_line(e)}") from None


def has_summaries(model: Any) -> bool:
    """Whether there is something to hide."""
    return any(w is not None for w in getattr(getattr(model, "args", None), "windows", ()))


def check_fits(
    name: str, model: Any, way: Way, length: int, group_size: int, limit: int | None, step: int
):
    """Refuse lengths that the model, its caches or the machine do not take. Raises KSAError."""
    context = getattr(model.args, "max_position_embeddings", None)
    if context is not None and length > context:
        raise KSAError(
            f"--lengths: found {length:,}, expected at most the context of {name}, {context:,}"
        )
    quantised = way.quantised(group_size)
    if quantised:
        try:
            quantise(make_prompt_cache(model), quantised)
        except (AttributeError, NotImplementedError):
            raise KSAError(f"--kv-bits: the caches of {name} cannot be quantised") from None
    room = Room([TextOnly(model) if way.hidden else model], limit, quantised, step)
    if quantised:
        for dim in {x.shape[-1] for x in room.sizes[0].read_once if x.ndim == 4}:
            if dim % group_size:
                raise KSAError(
                    f"--kv-group-size: found {group_size}, expected a divisor of {name}'s "
                    f"head_dim, {dim}"
                )
    # Each question goes on from a copy of the text's caches.
    need = room.need((length, 0), [(length, 0)])
    if need.total > room.limit:
        need = need._replace(caches=need.caches + need.others, others=0)
        raise MemoryLimitError(
            f"--lengths: {length:,} tokens of {name} ({way}) need {need}, and there are "
            f"{gb(room.limit)} ({room.source})"
        )
