"""How many bytes a model's caches hold after so many tokens, exactly, whatever their class.

They are counted on caches of the model's own classes, which read arrays that nobody evaluates: MLX
knows the shape of what it never computes. So buffers grow here by the very code that grows them.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import CacheList, make_prompt_cache

from ..attention.plan import Step
from ..cache.place import CAPACITY
from ..cache.rolling import RollingSummaryCache


class Quantised(NamedTuple):
    """When mlx-lm quantises a cache, and to what: its --quantized-kv-start, --kv-bits and so on."""

    bits: int
    group_size: int = 64
    start: int = 5000


class Held(NamedTuple):
    """Bytes of one sequence's caches.

    now: at the end. most: at any time, each layer at its own worst. padded: those of `most` that
    mlx-lm's batches hold for every sequence as for its longest one; ours pad nothing. largest: of
    one layer.
    """

    now: int
    most: int
    padded: int
    largest: int


class Sizes:
    """How large the caches of a model get.

    Args:
        model: one of ours or of mlx-lm's; its weights are not touched.
        quantised: what becomes of the caches, None: nothing.
        step: tokens of a prompt that are read at once.
        make: makes the caches, if not the model itself.
    """

    def __init__(
        self,
        model: Any,
        quantised: Quantised | None = None,
        step: int = 2048,
        make: Callable[[], list[Any]] | None = None,
    ):
        self.args: Any = getattr(model, "args", None)
        self.quantised, self.step = quantised, step
        make = make or (lambda: make_prompt_cache(model))
        fresh, probe = make(), make()
        model(mx.array([[0]]), cache=probe)
        self.layers: Counter[Any] = Counter()
        self.caches: dict[Any, tuple[Any, Any]] = {}  # an empty one, one that has read a token
        for pair in zip(fresh, probe, strict=True):
            for cache, like in _members(*pair):
                shapes = [(x.shape, x.dtype) for x in arrays(like.state)]
                limits = getattr(like, "place", None), getattr(like, "max_size", None)
                kind = type(like), *limits, str(shapes)
                self.layers[kind] += 1
                self.caches[kind] = cache, like

    @property
    def read_once(self) -> list[mx.array]:
        """Arrays of caches that have read a token, one cache a kind."""
        return [x for _, like in self.caches.values() for x in arrays(like.state)]

    @property
    def ours(self) -> bool:
        """Whether the model is a KSA model with windows."""
        return any(isinstance(c, RollingSummaryCache) for c, _ in self.caches.values())

    def held(self, prompt: int, answer: int = 0) -> Held:
        """Of a sequence that reads so many tokens as a prompt and then so many one by one."""
        now = most = padded = largest = 0
        for kind, layers in self.layers.items():
            *_, last = along = list(self._along(*self.caches[kind], prompt, answer))
            now += layers * last
            most += layers * max(along)
            if not self.ours:
                padded += layers * max(along)
            largest = max(largest, *along)
        return Held(now, most, padded, largest)

    def _along(self, cache: Any, like: Any, prompt: int, answer: int) -> Iterator[int]:
        """Bytes of one layer's cache at each of its sizes."""
        ours = isinstance(cache, RollingSummaryCache)
        if not ours and not hasattr(cache, "update_and_fetch"):
            yield like.nbytes  # a state that does not grow
            return
        cache, read = copy.deepcopy(cache), self._read_ours if ours else _read
        quantised = self.quantised if hasattr(cache, "to_quantized") else None
        yield 0
        for length, singly in [*((n, False) for n in pieces(prompt, self.step)), (answer, True)]:
            while length:
                n = length
                if singly and quantised and cache.offset < quantised.start:
                    n = min(n, quantised.start - cache.offset)
                length -= read(cache, like, n, singly)
                yield cache.nbytes
                if quantised and cache.offset >= quantised.start:
                    cache = cache.to_quantized(quantised.group_size, quantised.bits)
                    quantised = None
                    yield cache.nbytes

    def _read_ours(self, cache: Any, like: Any, length: int, singly: bool) -> int:
        """Let a RollingSummaryCache read up to `length` tokens. Returns how many."""
        place, k = cache.place, self.args.summary_chunk_size
        if singly:
            # The next token that needs summaries comes alone, as all of them do.
            due = (place.summarised + self.args.smallest_window + 1) * k - place.offset
            length = min(length, CAPACITY, due or 1)
        step = Step.plan(self.args, place.offset, length, place.summarised)
        end, W = place.offset + length, place.window
        moves = None if singly else place.advance(length, step.first, step.last)
        if moves:
            after, ahead, room = moves.after, moves.ahead, moves.text
        else:
            after = place._replace(
                offset=end, summarised=step.last, rolled=max(0, (end - 1) // k - W)
            )
            ahead = after.ahead() if singly and after.full else None
            # Of one token, the last, or of all at once.
            n = 1 if singly else length
            room = after._replace(offset=end - n).room(n)
        keys, values = like.storage.text.planes
        one = zeros(keys, 1), zeros(values, 1)
        form = cache.storage.form
        cache.storage.reserve(after.stored, room, *one)
        if place.undo and not cache.undo.planes and after.rolled:
            cache.undo.form = form
            cache.undo.grow(form.encode(*one), place.undo * k)
        cache.place, cache._ahead = after, None
        if ahead:
            sizes = (0 if slots is None else slots.size for slots in ahead)
            held = (n and form.encode(zeros(keys, n), zeros(values, n)) for n in sizes)
            cache._ahead = tuple(planes or None for planes in held)
        return length


def _read(cache: Any, like: Any, length: int, singly: bool) -> int:
    """Let one of mlx-lm's caches read up to `length` tokens. Returns how many."""
    if singly and hasattr(cache, "max_size"):
        length = 1  # several would leave it longer
    elif singly and not cache.empty():
        keys = cache.keys if isinstance(cache.keys, mx.array) else cache.keys[0]
        # All that its buffers have room for, or one that they have not.
        length = min(length, max(keys.shape[2] - cache.offset, 1))
    cache.update_and_fetch(zeros(like.keys, length), zeros(like.values, length))
    return length


def pieces(prompt: int, step: int) -> list[int]:
    """The calls in which mlx-lm reads a prompt: its last token alone."""
    whole, rest = divmod(max(prompt - 1, 0), step)
    return [step] * whole + [rest] * bool(rest) + [1] * bool(prompt)


def zeros(like: mx.array, length: int) -> mx.array:
    """So many tokens of keys or values such as `like`, (1, KV heads, tokens, head_dim)."""
    return mx.zeros((1, like.shape[1], length, like.shape[3]), like.dtype)


def arrays(tree: Any) -> list[mx.array]:
    """All arrays of a cache's state, or of a model's parameters."""
    flat: Any = tree_flatten(tree)
    return [x for _, x in flat if isinstance(x, mx.array)]


def _members(cache: Any, like: Any) -> Iterator[tuple[Any, Any]]:
    """Caches that hold keys and values themselves, where one holds several."""
    if isinstance(cache, CacheList):
        for pair in zip(cache.caches, like.caches, strict=True):
            yield from _members(*pair)
    else:
        yield cache, like
