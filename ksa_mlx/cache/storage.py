"""In which form keys and values are held, and what attention reads of them: segments.

Keys and values that are held are a list of planes: two arrays (keys, values), or in mlx's affine
format six (packed, scales, biases of the keys, then of the values); in all of them axis 2 counts
tokens.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self, TypeAlias

import mlx.core as mx
import numpy as np

from .place import CAPACITY

Planes = list[mx.array]
Held: TypeAlias = Any  # keys or values: an array, or (packed, scales, biases)


class _Form:
    """bits of keys and value_bits of values (0: plain), and the group size.

    There is one object of each: forms are compared at every step, and copied with caches.
    """

    bits = value_bits = group_size = 0
    _made: ClassVar[dict[tuple, Any]] = {}

    def __new__(cls, *numbers: int | None):
        return cls._made.setdefault((cls, *numbers), super().__new__(cls))

    def __deepcopy__(self, _: dict) -> Self:
        return self


class Plain(_Form):
    """Keys and values as they come."""

    def __str__(self) -> str:
        return "plain"

    def encode(self, keys: mx.array, values: mx.array) -> Planes:
        return [keys, values]

    def decode(self, planes: Planes) -> tuple[mx.array, mx.array]:
        return planes[0], planes[1]

    def pair(self, planes: Planes) -> tuple[Held, Held]:
        return planes[0], planes[1]

    def scores(self, queries: mx.array, keys: Held) -> mx.array:
        """Queries (B, KV heads, group, L, head_dim) times keys (B, KV heads, n, head_dim)."""
        return queries @ keys[:, :, None].swapaxes(-1, -2)

    def weigh(self, weights: mx.array, values: Held) -> mx.array:
        """Weights (B, KV heads, group, L, n) times values (B, KV heads, n, head_dim)."""
        return weights @ values[:, :, None]


class Affine(_Form):
    """Keys and values in mlx's affine format, the values in `value_bits` if not in `bits` too.

    Raises ValueError for a head_dim that is no multiple of the group size.
    """

    def __new__(cls, bits: int, group_size: int, value_bits: int | None = None):
        self = super().__new__(cls, bits, group_size, value_bits or bits)
        self.bits, self.group_size, self.value_bits = bits, group_size, value_bits or bits
        return self

    def __str__(self) -> str:
        values = f" and {self.value_bits}" if self.value_bits != self.bits else ""
        return f"{self.bits}{values} bit/{self.group_size}"

    def encode(self, keys: mx.array, values: mx.array) -> Planes:
        if keys.shape[-1] % self.group_size:
            raise ValueError(
                f"kv group size: found {self.group_size}, expected a divisor of "
                f"head_dim = {keys.shape[-1]}"
            )
        size = self.group_size
        return [*mx.quantize(keys, size, self.bits), *mx.quantize(values, size, self.value_bits)]

    def decode(self, planes: Planes) -> tuple[mx.array, mx.array]:
        keys, values = self.pair(planes)
        size = self.group_size
        return mx.dequantize(*keys, size, self.bits), mx.dequantize(*values, size, self.value_bits)

    def pair(self, planes: Planes) -> tuple[Held, Held]:
        return tuple(planes[:3]), tuple(planes[3:])

    def _times(self, x: mx.array, held: Held, transpose: bool, bits: int) -> mx.array:
        packed, scales, biases = held
        return mx.quantized_matmul(
            x,
            packed[:, :, None],
            scales[:, :, None],
            biases[:, :, None],
            transpose=transpose,
            group_size=self.group_size,
            bits=bits,
        )

    def scores(self, queries: mx.array, keys: Held) -> mx.array:
        return self._times(queries, keys, True, self.bits)

    def weigh(self, weights: mx.array, values: Held) -> mx.array:
        return self._times(weights, values, False, self.value_bits)


Form = Plain | Affine
PLAIN = Plain()


class Segment(NamedTuple):
    """What attention reads: the slots start .. stop - 1 of a buffer's keys and values.

    keys, values: the whole buffers, (B, KV heads, capacity, head_dim) or three such planes.
    """

    keys: Held
    values: Held
    start: int
    stop: int
    form: Form

    @property
    def nbytes(self) -> float:
        """Bytes of these slots' keys and values, and of nothing else that the buffers hold."""
        planes = [y for x in self[:2] for y in ([x] if isinstance(x, mx.array) else x)]
        return sum(y.nbytes / y.shape[2] for y in planes) * (self.stop - self.start)

    def behind(self, arrays: list[mx.array]) -> "Segment":
        """The same; whoever evaluates it evaluates these arrays too."""
        keys, values = (
            mx.depends([x], arrays)[0] if isinstance(x, mx.array) else tuple(mx.depends(x, arrays))
            for x in self[:2]
        )
        return self._replace(keys=keys, values=values)


def segments_of(cache: Any) -> list[Segment]:
    """What a cache's last token sees, of ours or of mlx-lm's KVCache or QuantizedKVCache."""
    if hasattr(cache, "visible"):
        return cache.visible
    form: Form = PLAIN
    if hasattr(cache, "bits"):
        form = Affine(cache.bits, cache.group_size, getattr(cache, "value_bits", None))
    return [Segment(cache.keys, cache.values, 0, cache.offset, form)]


def part_of(x: Held, start: int, stop: int) -> Held:
    """The tokens start .. stop - 1 of keys or values."""
    if isinstance(x, mx.array):
        return x[:, :, start:stop]
    packed, scales, biases = x
    return packed[:, :, start:stop], scales[:, :, start:stop], biases[:, :, start:stop]


def join(parts: Sequence[Sequence[mx.array]]) -> Planes:
    """Several pieces of text as one, each its planes (or keys and values)."""
    if len(parts) == 1:
        return list(parts[0])
    return [mx.concatenate(planes, axis=2) for planes in zip(*parts, strict=True)]


class Buffer:
    """Slots of keys and values in one form; planes is empty until there is room."""

    def __init__(self, form: Form):
        self.form = form
        self.planes: Planes = []

    @property
    def slots(self) -> int:
        return self.planes[0].shape[2] if self.planes else 0

    def grow(self, like: Planes, right: int, left: int = 0):
        """Make room for so many more slots on either side; like: one token as it is held."""
        room = [[mx.zeros((*x.shape[:2], n, x.shape[3]), x.dtype) for x in like]
                for n in (left, right) if n]  # fmt: skip
        if self.planes:
            room.insert(1 if left else 0, self.planes)
        self.planes = join(room)

    def put(self, slot: int, held: Planes):
        """Write tokens as they are held, from a slot on."""
        stop = slot + held[0].shape[2]
        for plane, x in zip(self.planes, held, strict=True):
            plane[:, :, slot:stop] = x

    def take(self, slots: np.ndarray) -> Planes:
        """A copy of these slots, as they are held."""
        index = mx.array(slots)
        return [mx.take(x, index, axis=2) for x in self.planes]

    def segment(self, start: int, stop: int) -> Segment:
        return Segment(*self.form.pair(self.planes), start, stop, self.form)


def _room(summaries: int) -> int:
    """Capacity for so many: in steps that grow, so that copying stays constant work a token."""
    step = max(CAPACITY, summaries // 64)
    return -(-summaries // step) * step


# MLX changes an array in place only if its buffer is at most a page larger, and its pool hands out
# buffers that are up to a page larger than asked for. A plane of few pages costs little to copy;
# for one of few bytes a slot, capacity grows by no more than MOST slots.
PAGE, SMALL, MOST = 16384, 65536, 512


def whole_pages(slots: int, like: Planes) -> int:
    """Capacity for so many slots in which each large plane fills whole pages; like: one token."""
    step = 1
    for x in like:
        if slots * x.nbytes >= SMALL:
            step = max(step, min(PAGE // math.gcd(PAGE, x.nbytes), MOST))
    return -(-slots // step) * step


class Joined:
    """Keys and values in one buffer, so that attention reads one contiguous range::

    free ... | S2 S1 S0 | text
             ^ summaries grow to the left, text to the right
    """

    def __init__(self, form: Form = PLAIN):
        self.form, self.bits = form, form.bits
        self.text = Buffer(form)
        self.left = self.right = 0  # slots left of the text, and for it

    @property
    def buffers(self) -> list[Buffer]:
        return [self.text]

    def reserve(self, summaries: int, slots: int, keys: mx.array, values: mx.array):
        """Make room for so many summaries and text slots; keys and values give shape and dtype."""
        if summaries <= self.left and slots <= self.right:
            return
        like = self.form.encode(keys[:, :, :1], values[:, :, :1])
        left, right = self.left, max(slots, self.right)
        if summaries > left:
            left = whole_pages(_room(summaries) + right, like) - right
        else:
            right = whole_pages(left + right, like) - left
        self.text.grow(like, right - self.right, left - self.left)
        self.left, self.right = left, right

    def put_summaries(self, done: int, keys: mx.array, values: mx.array):
        """Write summaries done, done + 1, ... (B, KV heads, n, head_dim)."""
        start = self.left - done - keys.shape[2]
        self.text.put(start, self.form.encode(keys[:, :, ::-1], values[:, :, ::-1]))

    def take(self, slots: np.ndarray) -> Planes:
        """A copy of the text in these slots, as it is held."""
        return self.text.take(slots + self.left)

    def segments(self, summaries: int, text: int) -> list[Segment]:
        """The first so many summaries and text slots; the last tokens of the text come last."""
        return [self.text.segment(self.left - summaries, self.left + text)]

    def summaries(self, n: int) -> tuple[mx.array, mx.array]:
        """Keys and values of the first n summaries, newest first."""
        part = slice(self.left - n, self.left)
        return self.form.decode([x[:, :, part] for x in self.text.planes])

    def newest_first(self, n: int) -> tuple[mx.array, mx.array, int]:
        """Buffers where the first n summaries lie, and the slot behind them: whole ones if they
        are plain."""
        if self.bits:
            return *self.summaries(n), n
        return *self.form.decode(self.text.planes), self.left

    def quantized(self, n: int, text: Affine, summaries: Affine) -> "Joined | Apart":
        """The same text and n summaries in mlx's affine format."""
        to: Joined | Apart
        if text == summaries:
            to = Joined(text)
            to.left, to.right = self.left, self.right
            if self.text.planes:
                to.text.planes = text.encode(*self.text.planes)
                like = [x[:, :, :1] for x in to.text.planes]
                more = whole_pages(self.text.slots, like) - self.text.slots
                if more:
                    to.text.grow(like, 0, more)
                    to.left += more
            return to
        to = Apart(text, summaries)
        if self.text.planes:
            to.text.planes = text.encode(*(x[:, :, self.left :] for x in self.text.planes))
            if n:
                oldest_first = [x[:, :, ::-1] for x in self.summaries(n)]
                to.own.planes = summaries.encode(*oldest_first)
        return to


class Apart:
    """Text in one affine format and summaries in another, in buffers of their own.

    At long contexts nearly all slots are summaries, yet it is the rounding of the few text keys
    that costs quality (docs/performance.md): bits of its own for the text cost little.
    """

    left = 0

    def __init__(self, text: Affine, summaries: Affine):
        self.form, self.bits = text, text.bits
        self.text, self.own = Buffer(text), Buffer(summaries)

    @property
    def buffers(self) -> list[Buffer]:
        return [self.text, self.own]

    def reserve(self, summaries: int, slots: int, keys: mx.array, values: mx.array):
        for buffer, wanted in ((self.text, slots), (self.own, _room(summaries))):
            if wanted > buffer.slots:
                like = buffer.form.encode(keys[:, :, :1], values[:, :, :1])
                buffer.grow(like, whole_pages(wanted, like) - buffer.slots)

    def put_summaries(self, done: int, keys: mx.array, values: mx.array):
        self.own.put(done, self.own.form.encode(keys, values))

    def take(self, slots: np.ndarray) -> Planes:
        """A copy of the text in these slots, as it is held."""
        return self.text.take(slots)

    def segments(self, summaries: int, text: int) -> list[Segment]:
        seen = [self.text.segment(0, text)]
        return [self.own.segment(0, summaries), *seen] if summaries else seen

    def summaries(self, n: int) -> tuple[mx.array, mx.array]:
        keys, values = self.own.form.decode([x[:, :, :n] for x in self.own.planes])
        return keys[:, :, ::-1], values[:, :, ::-1]

    def newest_first(self, n: int) -> tuple[mx.array, mx.array, int]:
        return *self.summaries(n), n

    def quantized(self, *_: Any) -> "Apart":
        return self
