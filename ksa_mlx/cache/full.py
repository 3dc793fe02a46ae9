"""Full layers' caches: mlx-lm's own, also with values in bits of their own, and rows of them."""

from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from .batch import Rows
from .storage import Affine, Buffer


class SplitKVCache(QuantizedKVCache):
    """mlx-lm's quantised cache, with the values in `value_bits`."""

    keys: Any
    values: Any

    def __init__(self, group_size: int = 64, bits: int = 8, value_bits: int = 8):
        super().__init__(group_size, bits)
        self.value_bits = value_bits

    def update_and_fetch(self, keys, values):
        """Append keys and values (B, KV heads, L, head_dim). Returns all, three planes each."""
        buffer = Buffer(Affine(self.bits, self.group_size, self.value_bits))
        new, start = buffer.form.encode(keys, values), self.offset
        self.offset += keys.shape[2]
        if self.keys is not None:
            buffer.planes = [*self.keys, *self.values]
        if self.offset > buffer.slots:
            buffer.planes = [x[:, :, :start] for x in buffer.planes]
            more = -(-keys.shape[2] // self.step) * self.step
            buffer.grow([x[:, :, :1] for x in new], more)
        buffer.put(start, new)
        self.keys, self.values = buffer.form.pair(buffer.planes)
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
