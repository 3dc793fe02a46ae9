"""Where a windowed layer's text and summaries lie: pure arithmetic, without an array of keys.

Text slots count from 0, summaries in the order of the text; `storage.py` says where either is in
memory. Text lies in order until the window is full. From then on::

    | ring: the last W closed chunks | open chunk | the next ones

Each chunk is written in the open slots; when a call begins behind it, it moves into the ring, where
the chunk lies that leaves the window: k entries copied every k tokens. So what a query sees is
mostly all text slots up to its own, in no matter which order: RoPE is applied before caching and
softmax does not care.

A call that begins in the open chunk and ends in another moves nothing, as its first tokens see what
its last do not: it writes on behind the open slots, and its last tokens leave out the chunks that
have left their window. The next call moves them.
"""

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# Capacity grows by at least this many entries, as in mlx-lm's KVCache.
CAPACITY = 256


Ranges = tuple[tuple[int, int], ...]  # of text slots: start, stop


class Reading(NamedTuple):
    """Slots of some text in order: first those in the undo ring, then those of the window.

    Index arrays (slots,) int32, None where there are none.
    """

    undo: np.ndarray | None
    text: np.ndarray | None


class Ahead(NamedTuple):
    """What is read once chunks are full, before the next call moves them and overwrites others.

    text: the slots of the text from the open chunk on. left: those of the chunks that will leave
    the window, None if nobody needs their text.
    """

    text: np.ndarray
    left: np.ndarray | None


class Piece(NamedTuple):
    """Tokens start .. stop - 1 of a call, which all see the same summaries.

    summaries: how many they see. ranges: the text that the last one sees, which comes last.
    """

    start: int
    stop: int
    summaries: int
    ranges: Ranges


class Moves(NamedTuple):
    """What one call of few tokens does to a cache; the same in all layers of one window.

    summaries, text: how many of each there must be room for. rolls: whether full chunks move into
    the ring first. slot: where the first token is written. pieces: the tokens, in order. The text
    of the chunks that the call summarises: `before` is what of those that leave the window is read
    before anything moves, in tokens; `behind` is read at the end. ahead: what is read then for the
    next call. after: where the cache stands then.
    """

    summaries: int
    text: int
    rolls: bool
    slot: int
    pieces: list[Piece]
    before: slice | None
    behind: Reading | None
    ahead: Ahead | None
    after: "Place"


class Place(NamedTuple):
    """Where a windowed layer's cache stands.

    chunk: k. summary_tokens: s. window: W, in chunks. rollback: tokens before the furthest one
    read that can be taken back. offset: text tokens read. summarised: chunks whose summaries are
    stored. oldest: the oldest chunk whose text is still held. rolled: chunks that have left the
    ring.
    """

    chunk: int
    summary_tokens: int
    window: int
    rollback: int = 0
    offset: int = 0
    summarised: int = 0
    oldest: int = 0
    rolled: int = 0

    @property
    def undo(self) -> int:
        """Chunks in the undo ring: N tokens back cross at most so many chunk edges."""
        return -(-self.rollback // self.chunk)

    @property
    def open(self) -> int:
        """The last token's chunk."""
        return max(self.offset - 1, 0) // self.chunk

    @property
    def base(self) -> int:
        """The chunk in the open slots; a later one lies behind them."""
        return self.window + self.rolled

    @property
    def full(self) -> int:
        """How many chunks move into the ring when the next call begins."""
        return max(0, self.offset // self.chunk - self.base)

    @property
    def stored(self) -> int:
        """How many summaries are stored."""
        return self.summarised * self.summary_tokens

    def room(self, length: int) -> int:
        """Text slots that there must be to read so many more tokens."""
        k, W = self.chunk, self.window
        last = self.offset + length - max(self.rolled, self.offset // k - W) * k
        on = self.rollback or (last > (W + 1) * k and length <= 2 * k)
        return min((W + 3 if on else W + 1) * k, -(-last // CAPACITY) * CAPACITY)

    def slot(self, chunk: int) -> int:
        """Where a chunk of the window starts."""
        ahead = chunk - self.window - self.rolled
        return (self.window + ahead if ahead >= 0 else chunk % self.window) * self.chunk

    def seen(self, offset: int) -> tuple[int, Ranges]:
        """How many summaries, and which text slots, the last of `offset` tokens sees."""
        k, chunks = self.chunk, max(0, max(offset - 1, 0) // self.chunk - self.window)
        found, at = [], 0
        if chunks > self.rolled:
            for slot in sorted([self.slot(c) for c in range(self.rolled, chunks)]):
                if slot > at:
                    found.append((at, slot))
                at = slot + k
        found.append((at, offset - self.rolled * k))
        return chunks * self.summary_tokens, tuple(found)

    def read(self, start: int, stop: int) -> Reading:
        """Where the text tokens start .. stop - 1 lie; start opens a chunk."""
        k, entered, length = self.chunk, self.rolled, stop - start
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
        """What to read now that chunks are full."""
        k, gone = self.chunk, self.rolled + self.full
        text = self.read(self.base * k, self.offset).text
        assert text is not None
        if not self.undo and gone <= self.summarised:
            return Ahead(text, None)
        return Ahead(text, self.read(self.rolled * k, gone * k).text)

    @lru_cache(256)  # noqa: B019 a tuple of numbers, shared by all layers of one window
    def advance(self, length: int, first: int, last: int) -> Moves | None:
        """What reading `length` tokens does, and summarising the chunks first .. last - 1 then.

        None for many tokens, of which some leave the window: those are not read in pieces. Raises
        ValueError where a summary is missing that the text needs.
        """
        k, W, end = self.chunk, self.window, self.offset + length
        whole = end <= (W + 1) * k  # in the window: its tokens see the same summaries, none
        if not whole and length > 2 * k:
            return None
        full = self.full
        at = self._replace(summarised=max(self.summarised, last), offset=end)
        at.check_summarised((end - 1) // k - W)
        rolled = self.rolled + full
        if full:
            at = at._replace(rolled=rolled, oldest=max(at.oldest, rolled - self.undo))
        leaving = max(first, min(last, rolled))
        before = slice((first - self.rolled) * k, (leaving - self.rolled) * k)
        edges = [0, length] if whole else [0, *range(k - self.offset % k, length, k), length]
        return Moves(
            at.summarised * self.summary_tokens,
            self.room(length),
            full > 0,
            self.offset - rolled * k,
            [Piece(a, b, *at.seen(self.offset + b)) for a, b in pairwise(edges)],
            before if first < leaving else None,
            at.read(leaving * k, last * k) if leaving < last else None,
            at.ahead() if end // k > W + rolled else None,
            at,
        )

    def runs(self, size: int, first: int, length: int) -> Iterator[tuple[int, slice]]:
        """Where `length` tokens from chunk `first` on lie in a ring of `size` chunks."""
        k, done = self.chunk, 0
        while done < length:
            at = (first + done // k) % size
            n = min(length - done, (size - at) * k)
            yield at * k, slice(done, done + n)
            done += n
