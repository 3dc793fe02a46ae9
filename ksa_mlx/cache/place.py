"""Where a windowed layer's text and summaries lie: pure arithmetic, without an array of keys.

Text slots count from 0, summaries in the order of the text; `storage.py` says where either is in
memory. Text lies in order until the window is full. From then on::

    | ring: the last W closed chunks | open chunk |

Each chunk is written in the open slots; when the next one begins, it moves into the ring, where
the chunk lies that leaves the window: k entries copied every k tokens. So what a query sees is
always all text slots up to its own, in no matter which order: RoPE is applied before caching and
softmax does not care.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Capacity grows by at least this many entries, as in mlx-lm's KVCache.
CAPACITY = 256


class Reading(NamedTuple):
    """Slots of some text in order: first those in the undo ring, then those of the window.

    Index arrays (slots,) int32, None where there are none.
    """

    undo: np.ndarray | None
    text: np.ndarray | None


class Ahead(NamedTuple):
    """What is read once a chunk is full, before the next one begins and overwrites it.

    closed: the slots of the full chunk. left: those of the chunk that will leave the window, None
    if nobody needs its text. undo: where the latter goes in the undo ring, None without one.
    """

    closed: np.ndarray
    left: np.ndarray | None
    undo: int | None


class Piece(NamedTuple):
    """Tokens start .. stop - 1 of a call, which all see the same summaries.

    slot: where the first of them is written. rolls: whether a chunk begins with it, and the full
    one before moves into the ring, to slot `ring` (None without a window). summaries, text: how
    many of each the last token sees. ahead: what is read behind it. after: where the cache stands
    then.
    """

    start: int
    stop: int
    slot: int
    rolls: bool
    ring: int | None
    summaries: int
    text: int
    ahead: Ahead | None
    after: "Place"


class Moves(NamedTuple):
    """What one call of few tokens does to a cache; the same in all layers of one window.

    summaries, text: how many of each there must be room for. pieces: the tokens, in order. The
    text of the chunks that the call summarises, in order: `before` is read before anything is
    written, from what was read ahead where `is_ahead`; `new` are tokens of the call; `behind` is
    read at the end.
    """

    summaries: int
    text: int
    pieces: list[Piece]
    before: Reading | None
    is_ahead: bool
    new: slice | None
    behind: Reading | None


class Place(NamedTuple):
    """Where a windowed layer's cache stands.

    chunk: k. summary_tokens: s. window: W, in chunks. rollback: tokens before the furthest one
    read that can be taken back. offset: text tokens read. summarised: chunks whose summaries are
    stored. oldest: the oldest chunk whose text is still held.
    """

    chunk: int
    summary_tokens: int
    window: int
    rollback: int = 0
    offset: int = 0
    summarised: int = 0
    oldest: int = 0

    @property
    def undo(self) -> int:
        """Chunks in the undo ring: N tokens back cross at most so many chunk edges, and one more
        chunk is there already when it is about to leave the window."""
        return -(-self.rollback // self.chunk) + 1 if self.rollback else 0

    @property
    def open(self) -> int:
        """The chunk in the open slots. A full one stays there until the next one begins."""
        return max(self.offset - 1, 0) // self.chunk

    @property
    def stored(self) -> int:
        """How many summaries are stored."""
        return self.summarised * self.summary_tokens

    @property
    def seen(self) -> tuple[int, int]:
        """How many summaries and how many text slots the last token sees."""
        moved = max(0, self.open - self.window)
        return self.summary_tokens * moved, self.offset - moved * self.chunk

    def room(self, length: int) -> int:
        """Text slots that there must be to read so many more tokens."""
        room, read = (self.window + 1) * self.chunk, self.offset + length
        return min(room, -(-read // CAPACITY) * CAPACITY)

    def slot(self, chunk: int) -> int:
        """Where a chunk of the window starts."""
        place = min(chunk, self.window) if chunk == self.open else chunk % self.window
        return place * self.chunk

    def read(self, start: int, stop: int) -> Reading:
        """Where the text tokens start .. stop - 1 lie; start opens a chunk."""
        k, entered, length = self.chunk, self.open - self.window, stop - start
        chunks, parts = range(start // k, -(-stop // k)), []
        gone = [c % self.undo * k for c in chunks if c < entered]
        held = [self.slot(c) for c in chunks if c >= entered]
        for slots in (gone, held):
            index = (np.array(slots, np.int32)[:, None] + np.arange(k, dtype=np.int32)).ravel()
            index = index[:length]
            length -= index.size
            parts.append(index if index.size else None)
        return Reading(*parts)

    def check_summarised(self, needed: int):
        if self.summarised < needed:
            raise ValueError(
                f"RollingSummaryCache: {self.summarised} chunks are summarised, {needed} must be "
                "before the text goes on; a KSA model stores them"
            )

    def ahead(self) -> Ahead:
        """What to read now that the open chunk is full."""
        leaving = self.open - self.window
        closed = self.read(self.open * self.chunk, self.offset).text
        assert closed is not None
        if not self.undo and leaving < self.summarised:
            return Ahead(closed, None, None)
        left = self.read(leaving * self.chunk, (leaving + 1) * self.chunk).text
        return Ahead(closed, left, leaving % self.undo * self.chunk if self.undo else None)

    def is_one_piece(self, length: int) -> bool:
        """Whether a call of so many tokens sees the same summaries throughout."""
        within = self.offset % self.chunk + length <= self.chunk
        return within or self.offset + length <= (self.window + 1) * self.chunk

    @lru_cache(256)  # noqa: B019 a tuple of numbers, shared by all layers of one window
    def advance(self, length: int, first: int, last: int) -> Moves | None:
        """What reading `length` tokens does, and summarising the chunks first .. last - 1 then.

        None for many tokens, of which some leave the window: those are not read in pieces. Raises
        ValueError where a summary is missing that the text needs.
        """
        k, W = self.chunk, self.window
        edges = [0, *range(k - self.offset % k, length, k), length]
        if self.offset + length <= (W + 1) * k:
            # All text stays in the window: its tokens see the same summaries, none.
            edges = [0, length]
        elif length > 2 * k:
            return None
        at = self._replace(summarised=max(self.summarised, last))
        # Reading on overwrites the chunks that leave the window.
        before, is_ahead, new = None, False, None
        leaving = min(last, (self.offset + length - 1) // k - W)
        if first < leaving:
            if first * k < self.offset:
                before = self.read(first * k, min(leaving * k, self.offset))
                is_ahead = first == leaving - 1 == self.open - W
            new = slice(max(first * k - self.offset, 0), max(leaving * k - self.offset, 0))
            new = new if new.start < new.stop else None
        pieces = []
        for start, stop in pairwise(edges):
            chunk = at.offset // k
            rolls = at.offset % k == 0 and chunk > W
            slot = min(chunk, W) * k + at.offset % k
            if rolls:
                at.check_summarised(chunk - W)
                at = at._replace(oldest=max(at.oldest, chunk - W - at.undo))
            at = at._replace(offset=at.offset + stop - start)
            ahead = at.ahead() if at.offset % k == 0 and at.offset > W * k else None
            ring = (chunk - 1) % W * k if rolls and W else None
            if ahead and ahead.undo is not None:
                at = at._replace(oldest=max(at.oldest, at.open - W + 1 - at.undo))
            pieces.append(Piece(start, stop, slot, rolls, ring, *at.seen, ahead, at))
        behind = None
        if max(first, leaving) < last:
            behind = at.read(max(first, leaving) * k, min(last * k, at.offset))
        return Moves(at.stored, self.room(length), pieces, before, is_ahead, new, behind)

    def runs(self, size: int, first: int, length: int) -> Iterator[tuple[int, slice]]:
        """Where `length` tokens from chunk `first` on lie in a ring of `size` chunks."""
        k, done = self.chunk, 0
        while done < length:
            at = (first + done // k) % size
            n = min(length - done, (size - at) * k)
            yield at * k, slice(done, done + n)
            done += n
