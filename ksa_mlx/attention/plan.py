"""What one call of the model reads and computes: a step a sequence."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.place import Moves, Place
from ..naive import summary_positions
from . import metal

# Query rows a block in prefill: bounds the workspace at block x keys.
BLOCK = 256

# Query rows from which on a backward computes its blocks again, which takes longer.
LONG = 1024

# Chunks summarised at once in decode. More mean fewer, larger steps; all must be in the window.
CHUNKS = 16

# Query positions start .. stop - 1, the first text key they see, how many chunks' summaries, mask.
Block = tuple[int, int, int, int, Any]


@dataclass
class Step:
    """What a call does with one sequence, or with several of the same text length.

    It reads the text tokens offset .. offset + length - 1 and computes the summaries of the chunks
    first .. last - 1 (none if equal): none before a text query will read one, and then several at
    once, so that a decode step mostly has one row.
    """

    args: Any
    offset: int
    length: int
    first: int = 0
    last: int = 0
    _blocks: dict[int, list[Block]] = field(default_factory=dict)

    @classmethod
    def plan(cls, args, offset: int, length: int, summarised: int, cached: bool = True) -> "Step":
        """Plan `length` tokens after `offset`, of whose chunks `summarised` are done."""
        step = cls(args, offset, length, summarised, summarised)
        k, smallest = args.summary_chunk_size, args.smallest_window
        if not length or smallest is None:
            return step
        needed = (offset + length - 1) // k - smallest
        if needed > summarised:
            step.last = needed
            if cached:
                closed = (offset + length) // k
                step.last = max(needed, min(summarised + min(CHUNKS, smallest + 1), closed))
        return step

    @property
    def chunks(self) -> int:
        """Chunks that the step summarises."""
        return self.last - self.first

    @property
    def span(self) -> tuple[int, int]:
        """Where the text of these chunks begins and ends, in tokens."""
        k = self.args.summary_chunk_size
        return self.first * k, self.last * k

    def text(self, keys: mx.array, values: mx.array, start: int = 0) -> list[mx.array]:
        """Of text (B, KV heads, tokens, head_dim) from position `start` on: the chunks' that the
        step summarises."""
        first, last = self.span
        part = slice(first - start, last - start)
        return [keys[:, :, part], values[:, :, part]]

    def blocks(self, window: int) -> list[Block]:
        """Blocks of queries, each of which sees some summaries and a range of text; the same for
        all layers of one window."""
        if window not in self._blocks:
            self._blocks[window] = list(self.in_blocks(window))
        return self._blocks[window]

    def in_blocks(self, window: int) -> Iterator[Block]:
        """The same, one after the other: their masks are made anew."""
        k, s = self.args.summary_chunk_size, self.args.summary_token_num
        a, stop = self.offset, self.offset + self.length
        while a < stop:
            # Up to the window's end the text is plain causal: one block.
            b = min(stop, max((window + 1) * k, (a // BLOCK + 1) * BLOCK))
            text = max(0, a // k - window) * k
            count = max(0, (b - 1) // k - window)
            yield (
                a,
                b,
                text,
                count,
                block_mask(a, b, text, count, k, s, window) if count else "causal",
            )
            a = b


def block_mask(a, b, text, count, k, s, window) -> mx.array:
    """Who sees whom for queries a .. b - 1 over [summaries, newest first | text .. b - 1]."""
    query = mx.arange(a, b)[:, None]
    oldest = query // k - window  # the first chunk read as text
    chunk = (count * s - 1 - mx.arange(count * s)) // s
    key = mx.arange(text, b)
    return mx.concatenate([chunk < oldest, (key // k >= oldest) & (key <= query)], axis=1)


class Call:
    """The steps of one call of the model, and the rows that its layers carry.

    One step for a sequence, or for several of one length; one a sequence where lengths differ:
    then the text (B, columns, hidden) is carried as (1, B * columns, hidden), some of it padding,
    so that all summary rows lie behind it in one block.

    length: text rows that are carried. rows, chunks: of summaries, of all steps. offset: of the
    first column, an int, or (B,) where lengths differ. kernels: what `metal.wanted` says.
    blockwise: whether a gradient is wanted of so many rows that no layer may hold all scores.
    """

    def __init__(self, args, length: int, cache: Any, summarises: bool, training: bool):
        """cache: of one windowed layer if there is one, else of any layer; None without.
        summarises: whether a layer here is windowed."""
        # Kernels have no gradient.
        self.blockwise = training and cache is None and length > LONG
        self.kernels = None if training else metal.wanted()
        self.columns = length
        self.offset = 0 if cache is None else cache.offset
        self.steps = []
        if cache is None and summarises:
            self.steps.append(Step.plan(args, 0, length, 0, cached=False))
        elif summarises:
            for progress in cache.progress(length):
                self.steps.append(Step.plan(args, *progress))
        else:
            self.steps.append(Step(args, 0, length))
        self.length, self.chunks = length * len(self.steps), 0
        for step in self.steps:
            self.chunks += step.last - step.first
        self.rows = self.chunks * args.summary_token_num
        self._places: list[Place] = []
        self._moves: list[Moves | None] = []
        self._together = False
        self.summary_positions = None
        if self.rows:
            parts = [summary_positions(args, s.first, s.last) for s in self.steps]
            self.summary_positions = mx.array(np.concatenate(parts).astype(np.int32))

    def moves(self, places: list[Place]) -> tuple[list[Moves | None], bool]:
        """What the steps do to the caches of a layer; the same in all layers of one window.

        Returns it for each, and whether all columns are tokens that see the same summaries.
        """
        if places != self._places:
            self._places, self._moves, self._together = places, [], True
            for place, step in zip(places, self.steps, strict=True):
                n = step.length
                moves = place.advance(n, step.first, step.last) if n else None
                self._moves.append(moves)
                if n < self.columns or moves is None or len(moves.pieces) > 1:
                    self._together = False
        return self._moves, self._together

    def padded(self, x: mx.array) -> mx.array:
        """Rows of one sequence (1, heads, tokens, head_dim), with zeros for columns of padding."""
        missing = self.columns - x.shape[2]
        return mx.pad(x, [(0, 0), (0, 0), (0, missing), (0, 0)]) if missing else x

    def by_row(self, x: mx.array) -> mx.array:
        """Text heads of those rows, (1, heads, rows, head_dim), as (B, heads, columns, ...)."""
        return x.reshape(x.shape[1], len(self.steps), self.columns, -1).swapaxes(0, 1)
