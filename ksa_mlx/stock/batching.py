"""mlx-lm's continuous batching on caches that stay a row each, in full layers too, and quantised.

mlx-lm pads the full layers' keys and values to the longest sequence and copies them whenever one
joins or leaves, and has no quantised form of that (mlx-lm#1043): with `--kv-bits` it serves one
request after the other. Here a sequence's keys and values are quantised at the same token whoever
runs beside it, and in whichever pieces its text is read: all text behind `quantized_kv_start` is
read as it is held.
"""

from typing import Any, NamedTuple

import mlx.core as mx
from mlx_lm.generate import PromptProcessingBatch
from mlx_lm.models.cache import make_prompt_cache

from ..cache.batch import BatchRollingSummaryCache, Rows
from ..cache.full import BatchFullCache
from ..cache.rolling import RollingSummaryCache
from ..model import Model
from .pacing import PacedGenerator


class Quantize(NamedTuple):
    """From which token on sequences are quantised, and the arguments of `to_quantized`."""

    start: int
    bits: int
    group_size: int

    def __call__(self, caches: list[Any]):
        """Quantise the sequences of batches that have come so far."""
        bits = {"bits": self.bits, "group_size": self.group_size}
        if new := [c.quantize(self.start, **bits) for c in caches]:
            mx.eval(new)


def wanted(flags: Any) -> Quantize | None:
    """What a server's flags say of that."""
    if flags.kv_bits is None:
        return None
    return Quantize(flags.quantized_kv_start, flags.kv_bits, flags.kv_group_size)


class BatchGenerator(PacedGenerator):
    """Paced as in `pacing.py`, with a cache a sequence in every layer of a KSA model.

    Args: model and all keywords as mlx-lm has them; quantize: None for plain keys and values.
    """

    def __init__(self, model: Any, *, quantize: Quantize | None = None, **kwargs: Any):
        super().__init__(model, **kwargs)
        self.ours, self.quantize = isinstance(model, Model), quantize
        if quantize and self.ours:
            self._prompt_batch = _Prompts.empty(model, self.sampler, self.prefill_step_size)
            self._prompt_batch.quantize = quantize

    def insert_segments(self, segments, max_tokens=None, caches=None, *args, **kwargs):
        """mlx-lm's; caches: of single sequences."""
        if self.ours:
            caches = caches or [None] * len(segments)
            caches = [[_row(c) for c in own or make_prompt_cache(self.model)] for own in caches]
            if self.quantize:
                for own in caches:
                    self.quantize(own)
        return super().insert_segments(segments, max_tokens, caches, *args, **kwargs)

    def _next(self):
        found = super()._next()
        if self.quantize and self.ours:
            self.quantize(self._generation_batch.prompt_cache)
        return found


def _row(cache: Any) -> Rows:
    """A batch of one."""
    kind = BatchRollingSummaryCache if isinstance(cache, RollingSummaryCache) else BatchFullCache
    return kind.merge([cache])


class _Prompts(PromptProcessingBatch):
    """mlx-lm's prompts, none of which is read across the token from which on it is quantised."""

    quantize: Quantize

    def prompt(self, tokens: list[list[int]]):
        rows = self.prompt_cache[0].rows if tokens else []
        to_go = [self.quantize.start - row.offset for row in rows]
        heads = [new[:n] if n > 0 else new for new, n in zip(tokens, to_go, strict=True)]
        rest = [new[len(head) :] for new, head in zip(tokens, heads, strict=True)]
        super().prompt(heads)
        self.quantize(self.prompt_cache)
        if any(rest):
            super().prompt(rest)
