"""The rolling summary cache: what one windowed layer keeps of the text it has read."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models.cache import KVCache, _BaseCache

# Capacity grows by at least this many entries, as in mlx-lm's KVCache.
STEP = 256


class RollingSummaryCache(_BaseCache):
    """Keys and values of one windowed layer: the text of the window, summaries of all before it.

    One buffer each for keys and values, (B, KV heads, slots, head_dim), laid out so that what a
    query sees is always one contiguous range of slots, in no matter which order (RoPE is applied
    before caching and softmax does not care)::

        free ... | S2 S1 S0 | ring: the last W closed chunks | open chunk
                 ^ summaries grow to the left                  ^ text grows to the right

    Until the window is full the text simply lies in order. From then on each chunk is written in
    the open slots; when the next one begins, it moves into the ring, where the chunk lies that
    leaves the window: k entries copied every k tokens. Summaries may be stored long before they
    are seen; they then lie left of the visible range.

    MLX changes a buffer in place only if nothing else in flight reads it. So what a roll moves is
    read one step ahead (`_ahead`), and a step writes first and reads then.

    With `rollback=N` the chunks that left the window last are kept in a small ring of their own,
    so that the text can always be taken back exactly to N tokens before its furthest end so far.

    Args:
        chunk: k, text tokens a chunk.
        summary_tokens: s, summary tokens a chunk.
        window: W, closed chunks before the query's own that are read as text.
        rollback: N, tokens before the furthest one read that `trim` reaches; 0: never trimmable.
    """

    # What text is quantised to, if not to the bits that mlx-lm asks for.
    text_bits: int | None = None

    def __init__(self, chunk: int, summary_tokens: int, window: int, rollback: int = 0):
        self.chunk = chunk
        self.summary_tokens = summary_tokens
        self.window = window
        self.rollback = rollback
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.undo_keys: mx.array | None = None
        self.undo_values: mx.array | None = None
        self.offset = 0  # text tokens read
        self.summarised = 0  # chunks whose summaries are stored
        self._left = 0  # slots left of the text, for summaries
        self._oldest = 0  # the oldest chunk whose text is still held
        self._ahead = None  # a full open chunk and the one it will replace

    # Where things lie

    @property
    def _undo(self) -> int:
        """Chunks in the undo ring: N tokens back cross at most so many chunk edges, and one more
        chunk is there already when it is about to leave the window."""
        return -(-self.rollback // self.chunk) + 1 if self.rollback else 0

    @property
    def _open(self) -> int:
        """The chunk in the open slots. A full one stays there until the next one begins."""
        return max(self.offset - 1, 0) // self.chunk

    def _slot(self, chunk: int) -> int:
        """Where a chunk of the window starts, counted from the first text slot."""
        place = min(chunk, self.window) if chunk == self._open else chunk % self.window
        return place * self.chunk

    def _read(self, start: int, stop: int) -> tuple:
        """A copy of the text keys and values start .. stop - 1, in order; start opens a chunk."""
        k, entered = self.chunk, self._open - self.window
        chunks, length, parts = range(start // k, -(-stop // k)), stop - start, []
        gone = [c % self._undo * k for c in chunks if c < entered]
        held = [self._left + self._slot(c) for c in chunks if c >= entered]
        for keys, values, slots in (
            (self.undo_keys, self.undo_values, gone),
            (self.keys, self.values, held),
        ):
            if slots:
                index = (np.array(slots, np.int32)[:, None] + np.arange(k, dtype=np.int32)).ravel()
                index = mx.array(index[:length])
                parts.append(tree_map(lambda x: mx.take(x, index, axis=2), (keys, values)))
                length -= index.size
        return join(*parts)

    def _write(self, slot: int, keys, values):
        put((self.keys, self.values), slot + self._left, (keys, values))

    def _runs(self, size: int, first: int, length: int):
        """`length` tokens from chunk `first` on in a ring of `size` chunks: (slot, tokens)."""
        k, done = self.chunk, 0
        while done < length:
            at = (first + done // k) % size
            n = min(length - done, (size - at) * k)
            yield at * k, slice(done, done + n)
            done += n

    def _write_ring(self, first: int, keys, values):
        """Write whole chunks, `first` and following, into the ring."""
        for slot, part in self._runs(self.window, first, tokens_of(keys)):
            self._write(slot, *rows_of((keys, values), part))

    def _write_undo(self, first: int, keys, values):
        """Keep whole chunks, `first` and following, that leave the window."""
        if self.undo_keys is None:
            size = self._undo * self.chunk

            def room(x):
                return mx.zeros((*x.shape[:2], size, x.shape[3]), x.dtype)

            self.undo_keys, self.undo_values = tree_map(room, (keys, values))
        for slot, part in self._runs(self._undo, first, tokens_of(keys)):
            put((self.undo_keys, self.undo_values), slot, rows_of((keys, values), part))

    @property
    def visible(self) -> tuple[int, int]:
        """The slots start .. stop - 1 that the last token sees; the last tokens come last."""
        start = self._left - self.summary_tokens * max(0, self._open - self.window)
        stop = self._left + self._slot(self._open) + self.offset - self._open * self.chunk
        return start, stop

    @property
    def summaries_end(self) -> int:
        """The slot behind the summaries: summary j of the text lies in summaries_end - 1 - j."""
        return self._left

    # Reading on

    def fits(self, length: int) -> bool:
        """Whether `length` more tokens leave every text token in the window."""
        return self.offset + length <= (self.window + 1) * self.chunk

    def reserve(self, summarised: int, length: int, keys: mx.array, values: mx.array):
        """Make room for the summaries of the first `summarised` chunks and `length` more tokens.

        keys and values (B, KV heads, ..., head_dim) give the shapes and dtypes.
        """
        text = (self.window + 1) * self.chunk
        if self.fits(length):
            text = min(text, -(-(self.offset + length) // STEP) * STEP)
        left = summarised * self.summary_tokens
        right = 0 if self.keys is None else tokens_of(self.keys) - self._left
        if self.keys is not None and left <= self._left and text <= right:
            return
        if left > self._left:
            # In steps that grow with the cache, so that copying stays constant work a token.
            step = max(STEP, left // 64)
            left = -(-left // step) * step
        grow_left, grow_right = max(0, left - self._left), max(0, text - right)

        def grow(like, buffer=None):
            B, heads, _, dim = like.shape
            parts = [
                mx.zeros((B, heads, grow_left, dim), like.dtype),
                buffer,
                mx.zeros((B, heads, grow_right, dim), like.dtype),
            ]
            parts = [p for p in parts if p is not None and p.shape[2]]
            return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]

        # One row in the form that is held; its contents do not matter.
        like = self._encode((keys[:, :, :1], values[:, :, :1]))
        held = () if self.keys is None else ((self.keys, self.values),)
        self.keys, self.values = tree_map(grow, like, *held)
        self._left += grow_left

    def store_summaries(self, keys: mx.array, values: mx.array):
        """Store the next chunks' summaries, in order, (B, KV heads, chunks * s, head_dim)."""
        s = self.summary_tokens
        end = self.summarised * s
        reverse = self._encode((keys[..., ::-1, :], values[..., ::-1, :]))
        self._write(-end - keys.shape[2], *reverse)
        self.summarised += keys.shape[2] // s

    def append(
        self, keys: mx.array, values: mx.array
    ) -> tuple[mx.array, mx.array, tuple[int, int]]:
        """Append tokens of one chunk (of several while the window is not full).

        Args: keys, values (B, KV heads, L, head_dim). Returns the whole buffers, and which of
        their slots, start .. stop - 1, the last token sees; the last L of these are the new
        tokens, so the causal mask is the right one.
        """
        k, W = self.chunk, self.window
        chunk = self.offset // k
        if chunk > W and self.offset % k == 0:
            self._roll(chunk)
        self._write(min(chunk, W) * k + self.offset % k, *self._encode((keys, values)))
        self.offset += keys.shape[2]
        buffers = self.keys, self.values
        if self.offset % k == 0 and self.offset > W * k:
            # Whoever uses the buffers also reads ahead, before the next step writes.
            ahead = [x for _, x in tree_flatten(self._read_ahead())]
            buffers = tree_map(lambda x: mx.depends([x], ahead)[0], buffers)
        return *buffers, self.visible

    def _read_ahead(self) -> list:
        """The open chunk is full: read what the next roll will move, and keep what it drops."""
        k, current = self.chunk, self._open
        leaving = current - self.window
        closed = self._read(current * k, (current + 1) * k)
        self._ahead = closed, None
        if not self._undo and leaving < self.summarised:
            return [closed]
        left = self._read(leaving * k, (leaving + 1) * k)
        self._ahead = closed, left
        if not self._undo:
            return [closed, left]
        self._write_undo(leaving, *left)
        self._oldest = max(self._oldest, leaving + 1 - self._undo)
        return [closed, self.undo_keys, self.undo_values]

    def _roll(self, chunk: int):
        """Chunk `chunk` begins: chunk - 1 enters the ring, chunk - 1 - window leaves it."""
        self._check_summarised(chunk - self.window)
        if self._ahead is None:
            self._read_ahead()
        if self.window:
            self._write_ring(chunk - 1, *self._ahead[0])
        self._ahead = None
        self._oldest = max(self._oldest, chunk - self.window - self._undo)

    def text(self, first: int, last: int) -> tuple[mx.array, mx.array]:
        """The text of chunks first .. last - 1 as far as it is read, in order."""
        if self._ahead and self._ahead[1] and first == last - 1 == self._open - self.window:
            return self._decode(self._ahead[1])
        return self._decode(self._read(first * self.chunk, min(last * self.chunk, self.offset)))

    def extend(
        self, keys: mx.array, values: mx.array, first: int | None = None
    ) -> tuple[mx.array, mx.array, int]:
        """Append any number of tokens that overflow the window.

        Args: keys, values (B, KV heads, L, head_dim). Returns keys and values of the text, in
        order, from the first new token's window (and chunk `first`) on, and the position where
        they start.
        """
        k, W, U = self.chunk, self.window, self._undo
        end = self.offset + keys.shape[2]
        old, new = self._open, (end - 1) // k
        self._check_summarised(new - W)
        wanted = [self.offset // k - W, new - W - U, new - W if first is None else first]
        first = max(self._oldest, min(wanted), 0)
        text = self._encode((keys, values))
        if first * k < self.offset:
            text = join(self._read(first * k, self.offset), text)

        def chunks(a, b):
            return rows_of(text, slice((a - first) * k, min(b * k, end) - first * k))

        self.offset, self._ahead = end, None
        if U:
            leaving = max(first, new - W - U + 1)
            self._write_undo(leaving, *chunks(leaving, new - W + 1))
        if W:
            moved = max(new - W, old)
            self._write_ring(moved, *chunks(moved, new))
        self._write(W * k, *chunks(new, new + 1))
        self._oldest = max(self._oldest, new - W - max(U - 1, 0))
        return *self._decode(text), first * k

    def _check_summarised(self, needed: int):
        if self.summarised < needed:
            raise ValueError(
                f"RollingSummaryCache: {self.summarised} chunks are summarised, {needed} must be "
                "before the text goes on; a KSA model stores them"
            )

    def summaries(self, chunks: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the summaries of the first `chunks` chunks, newest first."""
        part = slice(self._left - chunks * self.summary_tokens, self._left)
        return self._decode(rows_of((self.keys, self.values), part))

    # Taking back

    def is_trimmable(self) -> bool:
        """Whether the last `rollback` tokens can be taken back; never changes."""
        return self.rollback > 0

    def trim(self, n: int) -> int:
        """Take back the last n tokens (all there are, if fewer). Returns how many.

        Raises ValueError, and changes nothing, if text is needed that is no longer held.
        """
        if n < 0:
            raise ValueError(f"trim: found {n}, expected at least 0 tokens")
        n = min(n, self.offset)
        if n == 0:
            return 0
        target, W, k = self.offset - n, self.window, self.chunk
        old, new = self._open, max(target - 1, 0) // k
        oldest = max(new - W, 0)
        if target and (not self.is_trimmable() or oldest < self._oldest):
            raise ValueError(
                f"RollingSummaryCache: cannot take back {n} of {self.offset} tokens; the text is "
                f"held from token {self._oldest * k} on, for windows of {W * k} tokens and "
                f"rollback={self.rollback}"
            )
        moved = []
        if target and new != old:
            back = max(min(new, old - W), oldest)
            if oldest < back:
                moved = [(oldest, self._read(oldest * k, back * k))]
            moved.append((new, self._read(new * k, (new + 1) * k)))
        self.offset, self._ahead = target, None
        for chunk, text in moved:
            if chunk == new:
                self._write(self._slot(new), *text)
            else:
                self._write_ring(chunk, *text)
        self.summarised = min(self.summarised, target // k)
        if not target:
            self._oldest = 0
        return n

    # What mlx-lm asks of a cache

    # from_state() skips __init__: the state is everything. Arrays only, and None as an empty one:
    # mlx-lm before 0.32 (Python 3.10) saves nothing else.
    _held = ("keys", "values", "undo_keys", "undo_values")
    _numbers = ("offset", "summarised", "chunk", "summary_tokens", "window", "rollback")
    _numbers += ("_left", "_oldest")

    @property
    def state(self):
        held = [getattr(self, name) for name in self._held]
        numbers = mx.array([getattr(self, name) for name in self._numbers])
        return (*(mx.zeros((0,)) if x is None else x for x in held), numbers)

    @state.setter
    def state(self, v):
        *held, numbers = v
        for name, x in zip(self._held, held):
            empty = isinstance(x, mx.array) and x.size == 0
            setattr(self, name, None if empty else x)
        for name, n in zip(self._numbers, numbers.tolist()):
            setattr(self, name, n)
        self._ahead = None

    @classmethod
    def merge(cls, caches: list["RollingSummaryCache"]):
        """A batch of single sequences' caches (`batch.BatchRollingSummaryCache`)."""
        from .batch import BatchRollingSummaryCache

        return BatchRollingSummaryCache.merge(caches)

    def size(self) -> int:
        return self.offset

    def empty(self) -> bool:
        return self.keys is None

    @property
    def nbytes(self) -> int:
        """Bytes held, capacity included."""
        held = [getattr(self, name) for name in self._held] + [self._ahead]
        return sum(x.nbytes for _, x in tree_flatten(held) if x is not None)

    def to_quantized(self, group_size: int = 64, bits: int = 4, text_bits: int | None = None):
        """The same cache with its keys and values quantised (mlx's affine format).

        `text_bits` for the text of the window, where they differ from those of the summaries.
        """
        from .quantized import quantize_cache

        return quantize_cache(self, group_size, text_bits or self.text_bits or bits, bits)

    # In which form keys and values are held: here as they come (`quantized.py` has others)

    def _encode(self, x):
        """Arrays as they are held."""
        return x

    def _decode(self, x):
        """What is held, as arrays."""
        return x

    def as_held(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Keys and values as they will be once they have been in the cache."""
        return self._decode(self._encode((keys, values)))


def tokens_of(x) -> int:
    """Tokens in keys or values as they are held."""
    return (x if isinstance(x, mx.array) else x[0]).shape[2]


def rows_of(x, part: slice):
    """Some tokens of keys and values as they are held."""
    return tree_map(lambda y: y[..., part, :], x)


def put(buffers, slot: int, x):
    """Write keys and values as they are held into buffers, from a slot on."""

    def write(buffer, y):
        buffer[..., slot : slot + y.shape[2], :] = y

    tree_map(write, buffers, x)


def join(*pairs):
    """Keys and values of several pieces of text as one piece."""
    if len(pairs) == 1:
        return tuple(pairs[0])
    return tree_map(lambda *x: mx.concatenate(x, axis=2), *map(tuple, pairs))


def make_cache(
    model, rollback: int | None = None, text_bits: int | None = None
) -> list[_BaseCache]:
    """One cache a layer: rolling summaries for windowed layers, mlx-lm's KVCache for the others.

    `rollback` is how many tokens before the furthest one read can always be taken back (default:
    the model's);
    `text_bits` what the windows' text is quantised to when mlx-lm quantises the caches, if not
    to the same bits as everything else.
    """
    args = model.args
    rollback = model.rollback if rollback is None else rollback
    if rollback < 0:
        raise ValueError(f"rollback: found {rollback}, expected at least 0 tokens")
    caches = []
    for window in model.model.windows:
        if window is None:
            caches.append(KVCache())
            continue
        cache = RollingSummaryCache(
            args.summary_chunk_size, args.summary_token_num, window, rollback
        )
        cache.text_bits = text_bits
        caches.append(cache)
    return caches
