"""Random inputs on which the arms of decode and prefill are compared and timed."""

from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx

from ..cache.storage import Segment
from ..naive import visibility
from .choice import Inputs, Key, Trial
from .plan import Step

# Text slots of a windowed layer of the released model; what lies before them is summaries.
TEXT = 1032
# Slots of a chain that differ: time does not depend on values, and making many takes memory.
BLOCK = 4096
# Layers of a chain at most: short caches do not fill the bytes, and need not.
LAYERS = 64


def plain_attention(queries: mx.array, keys: mx.array, values: mx.array, mask=None) -> mx.array:
    """The definition, by plain operations in float32: queries (B, heads, L, head_dim) over keys
    and values (B, KV heads, n, head_dim); mask (L, n), True where seen."""
    q, k, v = (x.astype(mx.float32) for x in (queries, keys, values))
    q = (q * q.shape[-1] ** -0.5).reshape(*k.shape[:2], -1, *q.shape[2:])
    scores = q @ k[:, :, None].swapaxes(-1, -2)
    if mask is not None:
        scores = mx.where(mask, scores, -mx.inf)
    weights = mx.softmax(scores, axis=-1, precise=True)
    return (weights @ v[:, :, None]).reshape(queries.shape)


def random(dtype: mx.Dtype, *shapes: tuple, seed: int = 0) -> list[mx.array]:
    """The same normal numbers at each call."""
    keys = mx.random.split(mx.random.key(seed), len(shapes))
    return [mx.random.normal(x, dtype, key=k) for x, k in zip(shapes, keys, strict=True)]


# Decode: queries, and of each sequence its segments


def _decode(key: Key, keys: int, fill: int) -> Inputs:
    one, n = nbytes(key._replace(keys=keys)), key.sequences
    layers = max(1, min(LAYERS, int(fill // one))) if fill else 1
    # Between them, and at both ends, lies what must not be read.
    gap = 3
    shape = n, key.kv_heads * key.group, key.rows, key.head_dim
    (queries,) = random(key.dtype, shape)
    caches: list[list[Segment]] = [[] for _ in range(layers * n)]
    seen: list[list] = [[] for _ in range(n)]
    for i, (part, form) in enumerate(zip(_parts(key, keys), key.forms, strict=True)):
        slots = len(caches) * (part + gap) + gap
        block = min(BLOCK, slots) if fill else slots
        held = (1, key.kv_heads, block, key.head_dim)
        planes = form.encode(*random(key.dtype, held, held, seed=i + 1))
        if block < slots:
            planes = [mx.tile(x, (1, 1, -(-slots // block), 1)) for x in planes]
        for at, into in enumerate(caches):
            start = gap + at * (part + gap)
            into.append(Segment(*form.pair(planes), start, start + part, form))
        # Scales in float32, so that what they stand for is not rounded once more.
        exact = [x if x.dtype == mx.uint32 else x.astype(mx.float32) for x in planes]
        for own, segments in zip([] if fill else seen, caches, strict=False):
            start, stop = segments[-1].start, segments[-1].stop
            own.append(form.decode([x[:, :, start:stop] for x in exact]))
        mx.eval(planes)
    mx.eval(queries)
    rows = [caches[i * n : (i + 1) * n] for i in range(layers)]
    if fill:
        return Inputs(queries, rows, None)
    sees = mx.arange(keys) <= mx.arange(keys - key.rows, keys)[:, None]
    outputs = []
    for q, own in zip(mx.split(queries, n), seen, strict=True):
        all_keys, all_values = (mx.concatenate(x, axis=2) for x in zip(*own, strict=True))
        outputs.append(plain_attention(q, all_keys, all_values, sees))
    return Inputs(queries, rows, mx.concatenate(outputs))


def _parts(key: Key, keys: int) -> list[int]:
    """Keys of each segment: summaries, then text."""
    text = min(TEXT, keys // 2)
    return [keys] if len(key.forms) == 1 else [keys - text, text]


def nbytes(key: Key) -> float:
    """Bytes of the keys and values of one layer, of all sequences."""
    row = 1, key.kv_heads, 1, key.head_dim
    one = [
        sum(x.nbytes for x in form.encode(mx.zeros(row, key.dtype), mx.zeros(row, key.dtype)))
        for form in key.forms
    ]
    parts = _parts(key, key.keys)
    return sum(n * size for n, size in zip(parts, one, strict=True)) * key.sequences


DECODE = Trial(_decode, checked=(61, 1000, 3000), timed=(1024, 4096, 16384))


# Prefill: queries, and what `PrefillInputs` holds


class PrefillInputs(NamedTuple):
    """keys, values: the text from position `start` on. summary_keys, summary_values: whole
    buffers, where summaries lie newest first up to the slot `end`. step, window: the plan."""

    keys: mx.array
    values: mx.array
    start: int
    summary_keys: mx.array
    summary_values: mx.array
    end: int
    step: Step
    window: int


def _prefill(key: Key, keys: int, fill: int) -> Inputs:
    if fill:
        # As in the released model: `rows` new tokens, their window, and summaries before it.
        chunk, window, rows = 8, 128, key.rows
        chunks = max(keys - rows - chunk * window, 0)
        offset = chunk * (chunks + window + 1) - rows
    else:
        # A short text from its beginning, with all kinds of edges in it.
        chunk, window, rows, offset = 8, 2, keys, 0
        sees = visibility(rows, chunk, 1, window)[:rows]
        chunks = sees.shape[1] - rows
    shape = {"summary_chunk_size": chunk, "summary_token_num": 1, "smallest_window": window}
    step = Step(SimpleNamespace(**shape), offset, rows, chunks, chunks)
    start = max(0, offset // chunk - window) * chunk
    kv, dim = key.kv_heads, key.head_dim
    texts = [(1, kv, offset + rows - start, dim)] * 2
    (queries,) = random(key.dtype, (1, kv * key.group, rows, dim))
    text_keys, text_values = random(key.dtype, *texts, seed=1)
    own_keys, own_values = random(key.dtype, *[(1, kv, chunks + 3, dim)] * 2, seed=2)
    mx.eval(queries, text_keys, text_values, own_keys, own_values)
    layer = PrefillInputs(
        text_keys, text_values, start, own_keys, own_values, chunks, step, window
    )  # fmt: skip
    if fill:
        return Inputs(queries, [layer], None)
    keys_seen, values_seen = (
        mx.concatenate([text, own[:, :, :chunks][:, :, ::-1]], axis=2)  # oldest first
        for text, own in ((text_keys, own_keys), (text_values, own_values))
    )
    exact = plain_attention(queries, keys_seen, values_seen, mx.array(sees))
    return Inputs(queries, [layer], exact)


PREFILL = Trial(_prefill, checked=(61, 300), timed=(4096,))
