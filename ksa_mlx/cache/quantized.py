"""Quantised KV: rolling summary caches in mlx's affine format, text and summaries each in its bits.

At long contexts nearly all slots are summaries, yet it is the rounding of the few text keys that
costs quality (`tools/measure_kv_bits.py`): 8 bits for text and 4 for summaries take 5 % more memory
than 4 bits for both at 128K, for a tenth of the error.
"""

import mlx.core as mx
from mlx.utils import tree_map

from .rolling import STEP, RollingSummaryCache, put, rows_of, tokens_of


class QuantizedRollingSummaryCache(RollingSummaryCache):
    """A rolling summary cache whose keys and values are held in mlx's affine format.

    Keys and values are tuples (packed, scales, biases); slots lie as in the parent. Raises
    ValueError for a head_dim that is no multiple of the group size.
    """

    def __init__(
        self,
        chunk: int,
        summary_tokens: int,
        window: int,
        rollback: int = 0,
        group_size: int = 64,
        bits: int = 8,
    ):
        super().__init__(chunk, summary_tokens, window, rollback)
        self.group_size, self.bits = group_size, bits

    def _encode(self, x):
        def quantize(x):
            if x.shape[-1] % self.group_size:
                raise ValueError(
                    f"kv group size: found {self.group_size}, expected a divisor of "
                    f"head_dim = {x.shape[-1]}"
                )
            return tuple(mx.quantize(x, group_size=self.group_size, bits=self.bits))

        return tree_map(quantize, x)

    def _decode(self, x):
        return tuple(mx.dequantize(*y, group_size=self.group_size, bits=self.bits) for y in x)

    def _fill(self, plain: RollingSummaryCache):
        """Hold what a plain cache holds."""
        for name in plain._held:
            x = getattr(plain, name)
            setattr(self, name, None if x is None else self._encode(x))
        for name in plain._numbers:
            setattr(self, name, getattr(plain, name))

    _numbers = (*RollingSummaryCache._numbers, "group_size", "bits")

    def to_quantized(self, *_, **__):
        return self


class MixedRollingSummaryCache(QuantizedRollingSummaryCache):
    """Text in `bits`, summaries in `summary_bits` and in buffers of their own, oldest first.

    Summary keys and values are tuples (packed, scales, biases) of the same group size.
    """

    def __init__(
        self,
        chunk: int,
        summary_tokens: int,
        window: int,
        rollback: int = 0,
        group_size: int = 64,
        bits: int = 8,
        summary_bits: int = 4,
    ):
        super().__init__(chunk, summary_tokens, window, rollback, group_size, bits)
        self.summary_bits = summary_bits
        self.summary_keys = self.summary_values = None

    def _pack(self, x):
        """Summaries as they are held."""
        return tree_map(lambda y: tuple(mx.quantize(y, self.group_size, self.summary_bits)), x)

    @property
    def visible(self):
        return 0, super().visible[1]

    @property
    def visible_summaries(self) -> int:
        """How many of the summaries the last token sees."""
        return self.summary_tokens * max(0, self._open - self.window)

    def reserve(self, summarised: int, length: int, keys: mx.array, values: mx.array):
        super().reserve(0, length, keys, values)
        needed = summarised * self.summary_tokens
        held = 0 if self.summary_keys is None else tokens_of(self.summary_keys)
        if needed <= held:
            return
        step = max(STEP, needed // 64)
        more = -(-needed // step) * step - held

        def grow(like, buffer=None):
            room = mx.zeros((*like.shape[:2], more, like.shape[3]), like.dtype)
            return room if buffer is None else mx.concatenate([buffer, room], axis=2)

        like = self._pack((keys[:, :, :1], values[:, :, :1]))
        old = ((self.summary_keys, self.summary_values),) if held else ()
        self.summary_keys, self.summary_values = tree_map(grow, like, *old)

    def store_summaries(self, keys: mx.array, values: mx.array):
        slot = self.summarised * self.summary_tokens
        put((self.summary_keys, self.summary_values), slot, self._pack((keys, values)))
        self.summarised += keys.shape[2] // self.summary_tokens

    def summaries(self, chunks: int):
        part = slice(0, chunks * self.summary_tokens)
        held = rows_of((self.summary_keys, self.summary_values), part)
        return tuple(
            mx.dequantize(*x, self.group_size, self.summary_bits)[:, :, ::-1] for x in held
        )

    def _fill(self, plain: RollingSummaryCache):
        if plain.keys is not None and plain.summarised:
            oldest_first = tuple(x[:, :, ::-1] for x in plain.summaries(plain.summarised))
            self.summary_keys, self.summary_values = self._pack(oldest_first)
        super()._fill(plain)
        if plain.keys is not None:
            text = slice(plain.summaries_end, None)
            self.keys, self.values = rows_of((self.keys, self.values), text)
        self._left = 0

    _held = (*QuantizedRollingSummaryCache._held, "summary_keys", "summary_values")
    _numbers = (*QuantizedRollingSummaryCache._numbers, "summary_bits")


def quantize_cache(plain: RollingSummaryCache, group_size: int, text_bits: int, bits: int):
    """A plain cache quantised: text in `text_bits`, summaries in `bits`."""
    shape = plain.chunk, plain.summary_tokens, plain.window, plain.rollback, group_size
    if text_bits == bits:
        cache = QuantizedRollingSummaryCache(*shape, bits)
    else:
        cache = MixedRollingSummaryCache(*shape, text_bits, bits)
    cache._fill(plain)
    return cache


def mixed_attention(queries: mx.array, keys, values, cache: MixedRollingSummaryCache) -> mx.array:
    """Attention over the visible summaries and text, each read in its own bits.

    Args: queries (B, heads, L, head_dim), the last L tokens of the text; keys, values: the
    visible text as the cache holds it. Returns (B, heads, L, head_dim).
    """
    B, heads, L, dim = queries.shape
    part = slice(0, cache.visible_summaries)
    segments = [(keys, values, cache.bits)]
    if part.stop:
        held = rows_of((cache.summary_keys, cache.summary_values), part)
        segments.insert(0, (*held, cache.summary_bits))
    kv_heads = keys[0].shape[1]
    q = (queries * dim**-0.5).reshape(B, kv_heads, heads // kv_heads, L, dim)

    def times(x, planes, bits, transpose):
        planes = [y[:, :, None] for y in planes]
        return mx.quantized_matmul(
            x, *planes, transpose=transpose, group_size=cache.group_size, bits=bits
        )

    scores = mx.concatenate([times(q, k, bits, True) for k, _, bits in segments], axis=-1)
    if L > 1:
        n = scores.shape[-1]
        sees = mx.arange(n)[None] <= mx.arange(n - L, n)[:, None]
        scores = mx.where(sees, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True)
    edge = part.stop if len(segments) > 1 else 0
    parts = [weights[..., :edge], weights[..., edge:]][-len(segments) :]
    out = sum(times(w, v, bits, False) for w, (_, v, bits) in zip(parts, segments))
    return out.reshape(queries.shape)
