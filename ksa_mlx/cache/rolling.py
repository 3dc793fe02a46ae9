"""The rolling summary cache: what one windowed layer keeps of the text it has read."""

import copy
from collections.abc import Callable

import mlx.core as mx
from mlx_lm.models.cache import _BaseCache

from .batch import BatchRollingSummaryCache
from .place import Ahead, Moves, Place, Ranges, Reading
from .storage import PLAIN, Affine, Apart, Buffer, Joined, Planes, Segment, join

# The layout of `state`.
STATE = 3

Pair = tuple[mx.array, mx.array]  # keys and values, (B, KV heads, tokens, head_dim)


class RollingSummaryCache(_BaseCache):
    """Keys and values of one windowed layer: the text of the window, summaries of all before it.

    `place` says where things lie, `storage` in which form. MLX changes a buffer in place only if
    nothing else in flight reads it. So what a roll moves is read one call ahead (`_ahead`), and a
    call writes first and reads then.

    With `rollback=N` the chunks that left the window last are kept in a small ring of their own,
    so that the text can always be taken back exactly to N tokens before its furthest end so far.

    Args:
        chunk: k, text tokens a chunk.
        summary_tokens: s, summary tokens a chunk.
        window: W, closed chunks before the query's own that are read as text.
        rollback: N, tokens before the furthest one read that `trim` reaches; 0: never trimmable.
        text_bits: what the window's text is quantised to when mlx-lm quantises the cache, if not
            to the same bits as the summaries.
        value_bits: likewise for the values of whatever has the bits of the summaries.
    """

    ragged = False

    def __init__(
        self,
        chunk: int,
        summary_tokens: int,
        window: int,
        rollback: int = 0,
        text_bits: int | None = None,
        value_bits: int | None = None,
    ):
        self.place = Place(chunk, summary_tokens, window, rollback)
        self.text_bits, self.value_bits = text_bits, value_bits
        self.storage: Joined | Apart = Joined()
        self.undo = Buffer(PLAIN)
        # The text from the open chunk on, and what will leave the window, if somebody needs it.
        self._ahead: tuple[Planes, Planes | None] | None = None
        self._beside: Planes = []  # what must be evaluated with what the call sees

    @property
    def offset(self) -> int:
        """Text tokens read."""
        return self.place.offset

    def progress(self, length: int) -> list[tuple[int, int, int]]:
        """Of each sequence: tokens read, how many of the next `length` columns are tokens, and
        chunks summarised."""
        return [(self.place.offset, length, self.place.summarised)]

    # Reading on: `begin`, then `seen` for each piece; or `extend`

    def begin(self, moves: Moves, text: Pair, summaries: Pair | None) -> list[Pair]:
        """Append the tokens of a call, and store its summaries.

        Args: moves: `place.advance` of the call. text, summaries: its keys and values. Returns
        the text that the summaries need, in pieces.
        """
        storage, place, parts = self.storage, self.place, []
        storage.reserve(moves.summaries, moves.text, *text)
        if moves.rolls and self._ahead is None:
            # Taken back to here, or read from a file.
            self._ahead = self._taken(place.ahead())
        if summaries is not None:
            storage.put_summaries(place.stored, *summaries)
            if moves.before and self._ahead and self._ahead[1]:
                left = [x[:, :, moves.before] for x in self._ahead[1]]
                parts.append(storage.form.decode(left))
        new = self._roll(moves.after) if moves.rolls else []
        storage.text.put(storage.left + moves.slot, storage.form.encode(*text))
        self.place, self._ahead = moves.after, None
        if moves.ahead:
            self._ahead = self._taken(moves.ahead)
            new = [*new, *self._ahead[0], *(self._ahead[1] or [])]
        self._beside = new
        if moves.behind:
            parts.append(self.copy_of(moves.behind))
        return parts

    def seen(self, summaries: int, ranges: Ranges) -> list[Segment]:
        """Segments of the first summaries and of ranges of text slots, the last of them last."""
        storage, (start, stop), left = self.storage, ranges[0], self.storage.left
        found = storage.segments(summaries, 0 if start else stop)
        if start or len(ranges) > 1:
            found = [one for one in found if one.start < one.stop]
            more = ranges if start else ranges[1:]
            found += [storage.text.segment(left + a, left + b) for a, b in more]
        if self._beside:
            # Whoever reads the segments also reads ahead, before the next call writes.
            found, self._beside = [one.behind(self._beside) for one in found], []
        return found

    def copy_of(self, reading: Reading) -> Pair:
        """A copy of some text, in order: keys and values as they are read."""
        return self.storage.form.decode(self._read(reading))

    def _taken(self, ahead: Ahead) -> tuple[Planes, Planes | None]:
        left = None if ahead.left is None else self.storage.take(ahead.left)
        return self.storage.take(ahead.text), left

    def _roll(self, to: Place) -> Planes:
        """Full chunks enter the ring, where others leave it. Returns what the undo ring holds."""
        assert self._ahead
        place, k, W, U = self.place, self.place.chunk, self.place.window, self.place.undo
        text, left = self._ahead

        def part(planes: Planes, start: int, stop: int) -> Planes:
            return [x[:, :, start * k : stop * k] for x in planes]

        first = max(place.base, to.rolled)
        if first < to.base:
            entering = part(text, first - place.base, to.base - place.base)
            self._put_ring(self._put, W, first, entering)
        if to.base * k < place.offset:
            rest = slice((to.base - place.base) * k, place.offset - place.base * k)
            self._put(W * k, [x[:, :, rest] for x in text])
        if not U or left is None:
            return []
        first = max(place.rolled, to.rolled - U)
        leaving = part(left, first - place.rolled, to.rolled - place.rolled)
        self._put_ring(self._put_undo, U, first, leaving)
        return self.undo.planes

    def _read(self, reading: Reading) -> Planes:
        """A copy of some text, in order, as it is held."""
        parts = []
        if reading.undo is not None:
            parts.append(self.undo.take(reading.undo))
        if reading.text is not None:
            parts.append(self.storage.take(reading.text))
        return join(parts)

    def _put(self, slot: int, held: Planes):
        """Write text as it is held, from a text slot on."""
        self.storage.text.put(self.storage.left + slot, held)

    def _put_ring(self, put: Callable[[int, Planes], None], size: int, first: int, held: Planes):
        """Write whole chunks, `first` and following, into a ring of `size` chunks."""
        for slot, part in self.place.runs(size, first, held[0].shape[2]):
            put(slot, [x[:, :, part] for x in held])

    def _put_undo(self, slot: int, held: Planes):
        if not self.undo.planes:
            one = [x[:, :, :1] for x in held]
            self.undo.grow(one, self.place.undo * self.place.chunk)
        self.undo.put(slot, held)

    def extend(
        self, keys: mx.array, values: mx.array, first: int, last: int, summaries: Pair | None
    ) -> tuple[mx.array, mx.array, int]:
        """Append many tokens at once, and the summaries of the chunks first .. last - 1.

        Args: keys, values (B, KV heads, L, head_dim). Returns keys and values of the text, in
        order, from the first new token's window (and chunk `first`) on, and the position where
        they start.
        """
        storage, place = self.storage, self.place
        k, W, U, end = place.chunk, place.window, place.undo, place.offset + keys.shape[2]
        room = place.room(keys.shape[2])
        storage.reserve(last * place.summary_tokens, room, keys, values)
        if summaries is not None:
            storage.put_summaries(place.stored, *summaries)
            place = place._replace(summarised=last)
        new = (end - 1) // k
        place.check_summarised(new - W)
        start = max(place.oldest, min(place.offset // k - W, new - W - U, first), 0)
        text = storage.form.encode(keys, values)
        if start * k < place.offset:
            text = join([self._read(place.read(start * k, place.offset)), text])

        def chunks(a: int, b: int) -> Planes:
            part = slice((a - start) * k, min(b * k, end) - start * k)
            return [x[:, :, part] for x in text]

        self._ahead = None
        if U:
            leaving = max(start, new - W - U)
            self._put_ring(self._put_undo, U, leaving, chunks(leaving, new - W))
        if W:
            closed = max(new - W, min(place.open, place.base))
            self._put_ring(self._put, W, closed, chunks(closed, new))
        self._put(W * k, chunks(new, new + 1))
        oldest = max(place.oldest, new - W - U)
        self.place = place._replace(offset=end, oldest=oldest, rolled=new - W)
        return *storage.form.decode(text), start * k

    def summaries(self, chunks: int | None = None) -> Pair:
        """Keys and values of the summaries of the first `chunks` chunks (all), newest first."""
        stored = self.place.stored if chunks is None else chunks * self.place.summary_tokens
        return self.storage.summaries(stored)

    def text(self, first: int) -> Pair:
        """Keys and values of the text from chunk `first` on, in order."""
        place = self.place
        return self.copy_of(place.read(first * place.chunk, place.offset))

    def summaries_for_kernel(self) -> tuple[mx.array, mx.array, int]:
        """Keys and values of a buffer where all summaries lie newest first, and the slot behind."""
        return self.storage.newest_first(self.place.stored)

    @property
    def visible(self) -> list[Segment]:
        """What the last token sees."""
        return self.seen(*self.place.seen(self.place.offset))

    def depend_on(self, h: mx.array):
        """Make whoever evaluates the cache evaluate h too."""
        buffer = self.storage.text
        if buffer.planes:
            buffer.planes = mx.depends(buffer.planes, [h])

    # Taking back

    def is_trimmable(self) -> bool:
        """Whether the last `rollback` tokens can be taken back; never changes."""
        return self.place.rollback > 0

    def trim(self, n: int) -> int:
        """Take back the last n tokens (all there are, if fewer). Returns how many.

        Raises ValueError, and changes nothing, if text is needed that is no longer held.
        """
        if n < 0:
            raise ValueError(f"trim: found {n}, expected at least 0 tokens")
        place = self.place
        n, k, W = min(n, place.offset), place.chunk, place.window
        if n == 0:
            return 0
        to = place._replace(offset=place.offset - n)
        to = to._replace(summarised=min(to.summarised, to.offset // k))
        oldest = max(to.open - W, 0)
        if to.offset and (not self.is_trimmable() or oldest < place.oldest):
            raise ValueError(
                f"RollingSummaryCache: cannot take back {n} of {place.offset} tokens; the text is "
                f"held from token {place.oldest * k} on, for windows of {W * k} tokens and "
                f"rollback={place.rollback}"
            )
        if not to.offset:
            self.place, self._ahead = to._replace(oldest=0, rolled=0), None
            return n
        if oldest < place.rolled:  # back over what has moved
            to, back = to._replace(rolled=oldest), min(max(to.open, W), place.rolled)
            held = self._read(place.read(oldest * k, back * k)) if oldest < back else None
            opened = None
            if to.open >= W:
                opened = self._read(place.read(to.open * k, (to.open + 1) * k))
            if held:
                self._put_ring(self._put, W, oldest, held)
            if opened:
                self._put(W * k, opened)
            self._ahead = None
        self.place = to
        return n

    # What mlx-lm asks of a cache

    @property
    def state(self) -> tuple[mx.array, ...]:
        """Everything there is, as `from_state` skips __init__: numbers, then all planes."""
        buffers = [self.undo, *self.storage.buffers]
        forms = [x.form for x in self.storage.buffers]
        numbers = [n for f in forms for n in (f.bits, f.group_size, f.value_bits)]
        counts = [len(x.planes) for x in buffers]
        own = [STATE, *self.place, self.text_bits or 0, self.value_bits or 0, self.storage.left]
        planes = [x for buffer in buffers for x in buffer.planes]
        return mx.array([*own, *counts, *numbers]), *planes

    @state.setter
    def state(self, v):
        numbers, *planes = v
        if numbers.ndim != 1 or numbers.size < 1 or numbers[0].item() != STATE:
            raise ValueError("found the cache of another version of ksa-mlx; make it anew")
        _, *place, text_bits, value_bits, left = numbers.tolist()[: 4 + len(Place._fields)]
        self.place, self._ahead, self._beside = Place(*place), None, []
        self.text_bits, self.value_bits = text_bits or None, value_bits or None
        rest = numbers.tolist()[4 + len(place) :]
        if len(rest) == 5:  # counts of two buffers, and one form
            self.storage = Joined(Affine(*rest[2:]) if rest[2] else PLAIN)
        else:
            _, _, _, *forms = rest
            self.storage = Apart(Affine(*forms[:3]), Affine(*forms[3:]))
        self.storage.left = left
        self.undo = Buffer(self.storage.form)
        for buffer, count in zip([self.undo, *self.storage.buffers], rest, strict=False):
            buffer.planes, planes = list(planes[:count]), planes[count:]
        if isinstance(self.storage, Joined):
            self.storage.right = self.storage.text.slots - left

    @classmethod
    def merge(cls, caches: list["RollingSummaryCache"]) -> BatchRollingSummaryCache:
        """A batch of single sequences' caches."""
        return BatchRollingSummaryCache.merge(caches)

    def size(self) -> int:
        return self.place.offset

    def empty(self) -> bool:
        return not self.storage.text.planes

    @property
    def nbytes(self) -> int:
        """Bytes held, capacity included."""
        planes = [x for buffer in (self.undo, *self.storage.buffers) for x in buffer.planes]
        for held in self._ahead or ():
            planes += held or []
        return sum(x.nbytes for x in planes)

    def to_quantized(
        self,
        group_size: int = 64,
        bits: int = 4,
        text_bits: int | None = None,
        value_bits: int | None = None,
    ) -> "RollingSummaryCache":
        """The same cache with its keys and values in mlx's affine format; itself if they are.

        `text_bits` for the text of the window, where they differ from those of the summaries;
        `value_bits` for the values of whatever has `bits`.
        """
        if self.storage.bits:
            return self
        own = Affine(bits, group_size, value_bits or self.value_bits)
        text = text_bits or self.text_bits
        new = copy.copy(self)
        in_window = Affine(text, group_size) if text else own
        new.storage = self.storage.quantized(self.place.stored, in_window, own)
        new.undo, new._ahead = Buffer(in_window), None
        if self.undo.planes:
            new.undo.planes = in_window.encode(*self.undo.planes)
        return new
