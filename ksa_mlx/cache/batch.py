"""Several sequences of different lengths in one batch, as mlx-lm's BatchGenerator runs them."""

import copy

import mlx.core as mx
from mlx_lm.models.cache import BatchKVCache, _BaseCache

from ..attention.windowed import Step, text_attention
from .rolling import RollingSummaryCache, join


class BatchRollingSummaryCache(_BaseCache):
    """One windowed layer's caches of a batch: a RollingSummaryCache a sequence.

    Each sequence has its own phase within chunk, window and summaries, so the buffers stay apart:
    a sequence joins or leaves without a copy, and none is padded to the longest. The projections,
    norms and MLPs run over all sequences at once; attention runs sequence by sequence. A batch is
    evaluated by its state but never restored from it: `extract` its sequences to save them.
    """

    def __init__(self, rows: list[RollingSummaryCache]):
        self.rows = rows
        # Tokens of each row that a right-padded prompt still holds; None: no padding.
        self._left: list[int] | None = None

    @classmethod
    def merge(cls, caches: list[RollingSummaryCache]) -> "BatchRollingSummaryCache":
        """A batch of the caches of single sequences, which stay as they are."""
        return cls([copy.deepcopy(c) for c in caches])

    def extend(self, other: "BatchRollingSummaryCache"):
        """Append the sequences of another batch."""
        self.rows = self.rows + other.rows

    def filter(self, batch_indices):
        """Keep only these sequences, in this order."""
        if isinstance(batch_indices, mx.array):
            batch_indices = batch_indices.tolist()
        self.rows = [self.rows[i] for i in batch_indices]

    def extract(self, idx: int) -> RollingSummaryCache:
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

    def next_lengths(self, length: int) -> list[int]:
        """How many of the next `length` columns are tokens, row by row."""
        if self._left is None:
            return [length] * len(self.rows)
        return [min(length, left) for left in self._left]

    def advance(self, length: int):
        """Note that `length` columns are read."""
        if self._left is not None:
            self._left = [left - n for left, n in zip(self._left, self.next_lengths(length))]

    @property
    def offset(self) -> mx.array:
        """Text tokens of each sequence, (B,)."""
        return mx.array([row.offset for row in self.rows], dtype=mx.int32)

    @property
    def state(self):
        return [row.state for row in self.rows], self._left

    def size(self) -> int:
        return max((row.offset for row in self.rows), default=0)

    def empty(self) -> bool:
        return all(row.empty() for row in self.rows)

    def is_trimmable(self) -> bool:
        return all(row.is_trimmable() for row in self.rows)

    def trim(self, n: int) -> int:
        return [row.trim(n) for row in self.rows][0]

    @property
    def nbytes(self) -> int:
        return sum(row.nbytes for row in self.rows)


class BatchStep:
    """What one call does for a batch: a `Step` a row, and all summary rows in one block.

    `length` counts columns; row b reads lengths[b] of them, the rest are padding.
    """

    def __init__(self, args, cache: BatchRollingSummaryCache, length: int):
        self.lengths = cache.next_lengths(length)
        self.steps = [
            Step.plan(args, row.offset, n, row.summarised) if n else Step(args, row.offset, 0)
            for row, n in zip(cache.rows, self.lengths)
        ]
        self.columns = length
        self.offset = cache.offset
        self.rows = sum(step.rows for step in self.steps)
        self.chunks = sum(step.last - step.first for step in self.steps)
        parts = [s.summary_positions for s in self.steps if s.rows]
        self.summary_positions = mx.concatenate(parts) if parts else None

    @property
    def length(self) -> int:
        """Text rows of the flat block."""
        return len(self.steps) * self.columns

    def flat(self, h: mx.array) -> mx.array:
        """Text (B, columns, hidden) as rows of one sequence, (1, B * columns, hidden)."""
        return h.reshape(1, -1, h.shape[-1])

    def by_row(self, x: mx.array) -> mx.array:
        """Text heads (1, heads, B * columns, head_dim) as (B, heads, columns, head_dim)."""
        return x.reshape(x.shape[1], len(self.steps), self.columns, -1).swapaxes(0, 1)

    def text_attention(self, queries, keys, values, summaries, cache, window):
        """`attention.text_attention` row by row.

        Args: queries, keys, values (B, heads, columns, head_dim); summaries: keys and values
        (1, KV heads, all rows, head_dim) or None; cache: a BatchRollingSummaryCache or None.
        Returns outputs (B, heads, columns, head_dim), and the text of all summary rows' chunks.
        """
        outputs, texts, done = [], [], 0
        for b, (step, n) in enumerate(zip(self.steps, self.lengths)):
            row = tuple(x[b : b + 1, :, :n] for x in (queries, keys, values))
            if n:
                own = None
                if step.rows:
                    own = tuple(x[:, :, done : done + step.rows] for x in summaries)
                    done += step.rows
                out, text = text_attention(*row, own, cache.rows[b], step, window)
                if text is not None:
                    texts.append(text)
            else:
                out = row[0]
            if n < self.columns:
                out = mx.pad(out, [(0, 0), (0, 0), (0, self.columns - n), (0, 0)])
            outputs.append(out)
        cache.advance(self.columns)
        return mx.concatenate(outputs, axis=0), join(*texts) if texts else None

    def full_text(self, keys: mx.array, values: mx.array, cache: BatchKVCache):
        """The text of all summary rows' chunks in a full layer: (1, KV heads, tokens, head_dim).

        keys, values (B, KV heads, slots, head_dim): as mlx-lm's batched cache hands them out,
        row b's text from slot left_padding[b] on.
        """
        k, texts = self.steps[0].chunk, []
        for b, step in enumerate(self.steps):
            if step.rows:
                slots = mx.arange(step.first * k, step.last * k) + cache.left_padding[b]
                texts.append([mx.take(x[b : b + 1], slots, axis=2) for x in (keys, values)])
        return join(*texts)
