"""Whether there is room for a prompt before it is read: what it needs, what there is, what fits."""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

import mlx.core as mx

from ..attention.plan import BLOCK
from ..errors import MemoryLimitError
from .caches import Held, Quantised, Sizes, arrays

# Head sizes for which MLX's attention on a GPU holds no scores.
FUSED = (64, 80, 128)

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

Length = tuple[int, int]  # tokens of a prompt, and of its answer


def parse_size(text: str) -> int:
    """An argparse type: bytes of a size such as 20GB, 500M or 1000000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip().upper())
    if found is None:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a size such as 20GB")
    return int(Decimal(found[1]) * UNITS[found[2]])


def gb(n: int) -> str:
    """Bytes for people."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


def device_limit() -> tuple[int, str]:
    """How many bytes MLX should hold on its device at most, and where the number comes from."""
    info = mx.device_info()
    if size := info.get("max_recommended_working_set_size"):
        return size, "the GPU's recommended working set"
    if mx.default_device() == mx.gpu and (size := info.get("total_memory")):
        return size, "the GPU's memory"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "the machine's memory"


class Need(NamedTuple):
    """Bytes: of the weights, of a sequence's caches, of other sequences', of a step of reading."""

    weights: int
    caches: int
    others: int
    step: int

    @property
    def total(self) -> int:
        return sum(self)

    def __str__(self) -> str:
        others = f", other requests {gb(self.others)}" if self.others else ""
        return (
            f"{gb(self.total)} (weights {gb(self.weights)}, its caches {gb(self.caches)}{others}, "
            f"a step of reading {gb(self.step)})"
        )


class Room:
    """The memory that there is, and what sequences of a model, or with a draft model, need of it.

    Args:
        models: the model, and a draft model if there is one.
        limit: bytes, None for the device's own limit.
        quantised: what becomes of the caches, None: nothing.
        step: tokens of a prompt that are read at once.
        makers: one a model: makes its caches, None: it does so itself.
    """

    def __init__(
        self,
        models: Sequence[Any],
        limit: int | None = None,
        quantised: Quantised | None = None,
        step: int = 2048,
        makers: Sequence[Callable[[], list[Any]] | None] = (None, None),
    ):
        self.models, self.quantised, self.step, self.makers = models, quantised, step, makers
        self.limit, self.source = (limit, "--memory-limit") if limit else device_limit()
        self.sizes = [
            Sizes(m, quantised, step, make) for m, make in zip(models, makers, strict=False)
        ]
        self.weights = sum(x.nbytes for m in models for x in arrays(m.parameters()))

    def held(self, prompt: int, answer: int) -> Held:
        """Of a sequence, in all models."""
        parts = [sizes.held(prompt, answer) for sizes in self.sizes]
        return Held(*map(sum, zip(*parts, strict=True)))

    def need(self, length: Length, others: Sequence[Length] = (), reading: int = 1) -> Need:
        """Of a sequence beside others.

        Args: reading: how many of them all read their prompts at once.
        """
        every = [self.held(*one) for one in (length, *others)]
        own = every[0].most
        # A batch pads some layers to its longest sequence.
        caches = sum(h.most - h.padded for h in every) + len(every) * max(h.padded for h in every)
        rows = reading * min(self.step, max(p for p, _ in (length, *others)))
        step = self.workspace(max(map(sum, (length, *others))), rows)
        step += 2 * max(h.largest for h in every)  # a layer's buffers are copied as they grow
        return Need(self.weights, own, caches - own, step)

    def workspace(self, n: int, rows: int) -> int:
        """Bytes that reading `rows` tokens behind n others holds for a while, about."""
        found = []
        for model, sizes in zip(self.models, self.sizes, strict=True):
            matrices = [w for w in arrays(model.layers[0].parameters()) if w.ndim >= 2]
            size = max((x.dtype.size for x in sizes.read_once if x.ndim == 4), default=2)
            # What a layer's projections give, and what is between them.
            outputs = 3 * sum(w.shape[-2] for w in matrices) * rows
            found.append(size * (outputs + self._scores(sizes, n, rows)))
        return max(found)

    def _scores(self, sizes: Sizes, n: int, rows: int) -> int:
        """How many of attention's scores MLX holds, about: measured on the CPU, with what is made
        of them."""
        args = sizes.args
        heads = getattr(args, "num_attention_heads", 1)
        fused = mx.default_device() == mx.gpu and getattr(args, "head_dim", None) in FUSED
        if fused and not (self.quantised and n > self.quantised.start):
            return 0
        return heads * min(rows, BLOCK) * n * 2 if sizes.ours else heads * rows * n * 5 // 4

    # The judgement

    def check(
        self, what: str, length: Length, others: Sequence[Length] = (), reading: int = 1
    ) -> Need:
        """Raises MemoryLimitError where a sequence does not fit: how much it needs, how much there
        is, what would fit."""
        need = self.need(length, others, reading)
        if need.total <= self.limit:
            return need
        prompt, answer = length
        ways = "; ".join(self._ways(length, others, reading)) or "nothing does with this model"
        raise MemoryLimitError(
            f"{what}: {prompt:,} tokens and {answer:,} of an answer need {need}, and there are "
            f"{gb(self.limit)} ({self.source}); what fits: {ways}"
        )

    def _ways(self, length: Length, others: Sequence[Length], reading: int) -> list[str]:
        """What would fit."""
        ways = []
        if others and self.need(length).total <= self.limit:
            ways.append(f"the same without {len(others)} other request{'s' * (len(others) > 1)}")
        now = self.quantised or Quantised(16)
        for bits in (8, 4):
            if bits < now.bits:
                other = now._replace(bits=bits)
                room = Room(self.models, self.limit, other, self.step, self.makers)
                if room.need(length, others, reading).total <= self.limit:
                    ways.append(f"--kv-bits {bits}")
                    break
        low, high = 0, length[0]
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.need((middle, length[1]), others, reading).total <= self.limit
            low, high = (middle, high) if fits else (low, middle)
        if low:
            ways.append(f"a prompt of at most {low:,} tokens")
        return ways
