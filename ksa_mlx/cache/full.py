"""Full layers' caches: mlx-lm's own, also with values in bits of their own, and rows of them."""

from typing import Any

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from .batch import Rows
from .storage import Affine


class SplitKVCache(QuantizedKVCache):
    """mlx-lm's quantised cache, with the values in `value_bits`."""

    keys: Any
    values: Any

    def __init__(self, group_size: int = 64, bits: int = 8, value_bits: int = 8):
        super().__init__(group_size, bits)
        self.value_bits = value_bits

    def update_and_fetch(self, keys, values):
        """Append keys and values (B, KV heads, L, head_dim). Returns all, three planes each."""
        form = Affine(self.bits, self.group_size, self.value_bits)
        new, start = form.pair(form.encode(keys, values)), self.offset
        self.offset += keys.shape[2]
        if self.keys is None or self.offset > self.keys[0].shape[2]:
            more = -(-keys.shape[2] // self.step) * self.step

            def grow(x, like):
                room = mx.zeros((*like.shape[:2], more, like.shape[3]), like.dtype)
                return room if x is None else mx.concatenate([x[:, :, :start], room], axis=2)

            held = (self.keys, self.values) if self.keys else tree_map(lambda _: None, new)
            self.keys, self.values = (
                tuple(grow(x, like) for x, like in zip(*both, strict=True))
                for both in zip(held, new, strict=True)
            )
        for held, some in zip((self.keys, self.values), new, strict=True):
            for x, y in zip(held, some, strict=True):
                x[:, :, start : self.offset] = y
        return self.keys_and_values()

    @property
    def state(self):
        return self.keys, self.values, self.offset, self.group_size, self.bits, self.value_bits

    @state.setter
    def state(self, v):
        self.keys, self.values, self.offset, self.group_size, self.bits, self.value_bits = v


class FullCache(KVCache):
    """mlx-lm's cache, whose values are quantised to bits of their own when mlx-lm quantises it."""

    def __init__(self, value_bits: int):
        super().__init__()
        self.value_bits = value_bits

    @property
    def state(self):
        return self.keys, self.values, self.offset, self.value_bits

    @state.setter
    def state(self, v):
        self.keys, self.values, self.offset, self.value_bits = v

    def to_quantized(self, group_size: int = 64, bits: int = 4) -> SplitKVCache:
        new = SplitKVCache(group_size, bits, self.value_bits)
        new.offset = self.offset
        if self.keys is not None:
            form = Affine(bits, group_size, self.value_bits)
            new.keys, new.values = form.pair(form.encode(self.keys, self.values))
        return new


class BatchFullCache(Rows):
    """One full layer's caches of a batch, a KVCache or a quantised one a sequence."""

    def update(self, keys: mx.array, values: mx.array) -> list[tuple]:
        """Append the next columns, (B, KV heads, columns, head_dim). Returns of each sequence its
        new tokens' number, and all keys and values as its cache hands them out."""
        lengths, found = self.lengths(keys.shape[2]), []
        pairs = zip(*(mx.split(x, len(self.rows)) for x in (keys, values)), strict=True)
        for row, pair, n in zip(self.rows, pairs, lengths, strict=True):
            new = (x[:, :, :n] for x in pair) if n < keys.shape[2] else pair
            found.append((n, *(row.update_and_fetch(*new) if n else (None, None))))
        self.advance(keys.shape[2])
        return found

    def make_mask(self, *args, **kwargs):
        """None: no sequence is padded, and each is masked by itself."""
