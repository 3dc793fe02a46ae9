"""Several sequences of different lengths in one batch, as mlx-lm's BatchGenerator runs them."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache


class Rows(_BaseCache):
    """One layer's caches of a batch: one a sequence.

    The buffers stay apart: a sequence joins or leaves without a copy, and none is padded to the
    longest. The projections, norms and MLPs run over all sequences at once; attention runs
    sequence by sequence. A batch is evaluated by its state but never restored from it: `extract`
    its sequences to save them.
    """

    ragged = True

    def __init__(self, rows: list[Any]):
        self.rows = rows
        # Tokens of each row that a right-padded prompt still holds; None: no padding.
        self._left: list[int] | None = None

    @classmethod
    def merge(cls, caches: Sequence[Any]) -> Self:
        """A batch of the caches of single sequences, which stay as they are, or of batches."""
        rows = [r for c in caches for r in (c.rows if isinstance(c, Rows) else [c])]
        return cls([copy.deepcopy(r) for r in rows])

    def extend(self, other: Self):
        """Append the sequences of another batch."""
        self.rows = self.rows + other.rows

    def filter(self, batch_indices):
        """Keep only these sequences, in this order."""
        if isinstance(batch_indices, mx.array):
            batch_indices = batch_indices.tolist()
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> Any:
        """The cache of one sequence, on its own."""
        return copy.deepcopy(self.rows[idx])

    def prepare(self, *, left_padding=None, lengths=None, right_padding=None):
        """Announce a prompt whose row b has lengths[b] tokens and then padding."""
        if left_padding is not None and max(left_padding) > 0:
            raise ValueError(
                f"left_padding: found {max(left_padding)}, expected none; pad on the right"
            )
        if right_padding is not None and max(right_padding) > 0:
            self._left = list(lengths)

    def finalize(self):
        self._left = None

    def lengths(self, columns: int) -> list[int]:
        """How many of the next columns are tokens of each sequence."""
        if self._left is None:
            return [columns] * len(self.rows)
        return [min(columns, left) for left in self._left]

    def advance(self, columns: int):
        """Note that so many columns are read."""
        if self._left is not None:
            self._left = [max(left - columns, 0) for left in self._left]

    def quantize(self, start: int, **form: Any) -> list[Any]:
        """Quantise the sequences of at least `start` tokens, by `to_quantized(**form)`.

        Returns the arrays of those that were not yet, for who wants to evaluate them.
        """
        new = []
        for b, row in enumerate(self.rows):
            if row.offset >= start and hasattr(row, "to_quantized"):
                self.rows[b] = row.to_quantized(**form)
                if self.rows[b] is not row:
                    new.append(self.rows[b].state)
        return new

    @property
    def offset(self) -> mx.array:
        """Text tokens of each sequence, (B,)."""
        return mx.array([row.offset for row in self.rows], dtype=mx.int32)

    @property  # type: ignore[misc]
    def state(self):
        return [row.state for row in self.rows], self._left

    def size(self) -> int:
        return max((row.offset for row in self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        return [row.trim(n) for row in self.rows].pop()

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows if not row.empty())


class BatchRollingSummaryCache(Rows):
    """One windowed layer's caches of a batch: a RollingSummaryCache a sequence.

    Each has its own phase within chunk, window and summaries.
    """

    def progress(self, length: int) -> list[tuple[int, int, int]]:
        """Of each sequence: tokens read, how many of the next `length` columns are tokens, and
        chunks summarised."""
        each = zip(self.rows, self.lengths(length), strict=True)
        return [(row.place.offset, n, row.place.summarised) for row, n in each]

    def depend_on(self, h: mx.array):
        """Make whoever evaluates the cache evaluate h too."""
        for row in self.rows:
            row.depend_on(h)
