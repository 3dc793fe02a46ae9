"""Few query rows over segments of a cache: MLX's operations, the kernel, and the one that chooses.

The queries are always the last tokens of the last segment: they see themselves and all before.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..cache.storage import Held, Segment, part_of
from . import metal
from .choice import OPERATIONS, Key, chosen
from .plan import BLOCK
from .trial import DECODE

# Query rows a sequence in one launch; decode.h's kRows.
ROWS = 8

# Slots a threadgroup reads, and how many threadgroups share them at most. Not tuned on Apple
# hardware.
SLOTS_PER_SPLIT = 128
MAX_SPLITS = 64


def decode(queries: mx.array, segments: list[Segment], kernels: str | None) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over segments, by the kernel where it runs.

    kernels: what `metal.wanted` says; a kernel has no gradient. Returns (B, heads, L, head_dim).
    """
    if kernels:
        return ARMS[arm(kernels, queries, segments)](queries, segments)
    return decode_ops(queries, segments)


def decode_rows(queries: mx.array, segments: list[list[Segment]], kernels: str | None) -> mx.array:
    """The same for a batch of sequences that share no cache.

    Args: queries (B, heads, L, head_dim); segments: of each sequence. Returns (B, heads, L,
    head_dim).
    """
    rows = mx.split(queries, len(segments))
    each = zip(rows, segments, strict=True)
    return mx.concatenate([decode(one, seen, kernels) for one, seen in each], axis=0)


# MLX's operations


def decode_ops(queries: mx.array, segments: list[Segment]) -> mx.array:
    """By MLX's operations: its fused attention over one plain segment, else each in its form."""
    length = queries.shape[2]
    if len(segments) == 1 and not segments[0].form.bits:
        keys, values, start, stop, _ = segments[0]
        seen = keys[:, :, start:stop], values[:, :, start:stop]
        if length > 1:
            return attend(queries, *seen, "causal")
        return mx.fast.scaled_dot_product_attention(queries, *seen, scale=queries.shape[-1] ** -0.5)
    kv_heads = _heads(segments[0].keys)
    q = (queries * queries.shape[-1] ** -0.5).reshape(
        queries.shape[0], kv_heads, -1, length, queries.shape[-1]
    )
    parts: list[mx.array] = []
    edges: list[int] = []
    for keys, _, start, stop, form in segments:
        edges.append((edges[-1] if edges else 0) + stop - start)
        parts.append(form.scores(q, part_of(keys, start, stop)))
    scores = mx.concatenate(parts, axis=-1)
    if length > 1:
        n = scores.shape[-1]
        sees = mx.arange(n)[None] <= mx.arange(n - length, n)[:, None]
        scores = mx.where(sees, scores, -mx.inf)
    weights = mx.split(mx.softmax(scores, axis=-1, precise=True), edges[:-1], axis=-1)
    weighed = [
        form.weigh(w, part_of(values, start, stop))
        for w, (_, values, start, stop, form) in zip(weights, segments, strict=True)
    ]
    return sum(weighed[1:], weighed[0]).reshape(queries.shape)


def attend(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    mask,
    after: Sequence[mx.array] = (),
) -> mx.array:
    """MLX's attention, after the block before: else MLX holds the scores of several at once.

    On the CPU, where it is not fused, many causal queries go block by block.
    """
    length = queries.shape[2]
    if length > BLOCK and isinstance(mask, str) and mx.default_device() == mx.cpu:
        before = keys.shape[2] - length
        outputs: list[mx.array] = []
        for a in range(0, length, BLOCK):
            b = min(a + BLOCK, length)
            seen = keys[:, :, : before + b], values[:, :, : before + b]
            outputs.append(attend(queries[:, :, a:b], *seen, mask, outputs[-1:] or after))
        return mx.concatenate(outputs, axis=2)
    if after:
        queries = mx.depends([queries], list(after))[0]
    scale = queries.shape[-1] ** -0.5
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)


# The kernel


def decode_kernel(queries: mx.array, segments: list[Segment]) -> mx.array:
    """By the kernel: one or two segments, at most 8 rows. Each key and value is loaded once."""
    B, length = queries.shape[0], queries.shape[2]
    caches = [(x.keys, x.values, _all_rows(B, length, x.start, x.stop)) for x in segments]
    last = segments[-1]
    caches[-1] = last.keys, last.values, _last_rows(B, length, last.start, last.stop)
    return launch(queries, caches, sum(x.stop - x.start for x in segments))


def bounds(ranges: Sequence[Sequence[tuple[int, int]]]) -> mx.array:
    """The table of slots that `launch` reads.

    Args: ranges[b][row] = (start, stop), the slots that a row of sequence b sees. Returns
    (B, 8, 2) int32.
    """
    table = np.zeros((len(ranges), ROWS, 2), dtype=np.int32)
    for b, rows in enumerate(ranges):
        table[b, : len(rows)] = rows
    return mx.array(table)


@functools.lru_cache(64)
def _last_rows(batch: int, length: int, start: int, stop: int) -> mx.array:
    """Bounds where the last `length` slots of start .. stop - 1 see themselves and all before."""
    return bounds([[(start, stop - length + 1 + r) for r in range(length)]] * batch)


@functools.lru_cache(64)
def _all_rows(batch: int, length: int, start: int, stop: int) -> mx.array:
    """Bounds where all rows see the slots start .. stop - 1."""
    return bounds([[(start, stop)] * length] * batch)


def launch(
    queries: mx.array, caches: Sequence[tuple[Held, Held, mx.array]], visited: int
) -> mx.array:
    """Attention of few query rows over ranges of slots of one or two caches, read once.

    Args:
        queries: (B, heads, L <= 8, head_dim).
        caches: (keys, values, bounds) of each. Keys and values are whole buffers, as a slice would
            be copied: (B, KV heads, capacity, head_dim) of the queries' dtype, or both as
            `mx.quantize` returns them. bounds (B, 8, 2) int32, from `bounds`.
        visited: about how many slots the longest sequence visits; decides the number of splits.

    Returns (B, heads, L, head_dim), zeros for a row that sees nothing. One launch, or two if split.
    Raises ValueError for more rows, and for formats that the kernel does not read.
    """
    B, heads, length, dim = queries.shape
    kv_heads = _heads(caches[0][0])
    if length > ROWS:
        raise ValueError(f"decode: found {length} query rows, expected at most {ROWS}")
    count = heads // kv_heads * length
    most = 8 if dim <= 128 else 4
    if count > 12 * most and length > 1:
        # More than 12 simdgroups may not fit the registers: the cache is read twice.
        halves = []
        for rows in (slice(0, length // 2), slice(length // 2, length)):
            some = [(k, v, mx.roll(table, -rows.start, axis=1)) for k, v, table in caches]
            halves.append(launch(queries[:, :, rows], some, visited))
        return mx.concatenate(halves, axis=2)
    if count <= most:
        simdgroups, rows, tile = 8, count, 0
    else:
        simdgroups = -(-count // most)
        rows, tile = -(-count // simdgroups), 16 if dim <= 128 else 8
    one = visited <= 2 * SLOTS_PER_SPLIT
    splits = 1 if one else min(MAX_SPLITS, -(-visited // SLOTS_PER_SPLIT))
    partial = splits > 1
    template = {"T": queries.dtype, "O": mx.float32 if partial else queries.dtype, "D": dim}
    template |= {"C": rows, "N": simdgroups, "TILE": tile, "PARTIAL": partial}
    inputs = [queries]
    unseen = caches[0][0], caches[0][1], _all_rows(B, length, 0, 0)
    for prefix, (keys, values, table) in zip(("", "MORE_"), [*caches, unseen], strict=False):
        planes, template[f"{prefix}BITS"], template[f"{prefix}GROUP"] = _planes(
            keys, values, queries
        )
        inputs += [*planes, table]
    names = "keys key_scales key_biases values value_scales value_biases bounds"
    more = " ".join(f"more_{name}" for name in names.split())
    (out,) = metal.kernel("decode", f"queries {names} {more}", "common.h decode.h")(
        inputs=inputs,
        template=list(template.items()),
        grid=(32 * simdgroups * kv_heads, splits, B),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(B, kv_heads, splits, count, dim + 2) if partial else queries.shape],
        output_dtypes=[template["O"]],
    )
    return _combine(out, queries) if partial else out


def _combine(parts: mx.array, queries: mx.array) -> mx.array:
    """What the splits (B, KV heads, splits, rows, head_dim + 2) sum up to, like `queries`."""
    B, kv_heads, _, count, _ = parts.shape
    dim = queries.shape[-1]
    return metal.kernel("combine", "parts")(
        inputs=[parts],
        template=[("T", queries.dtype), ("D", dim)],
        grid=(dim, count, B * kv_heads),
        threadgroup=(dim, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]


def _heads(keys: Held) -> int:
    return (keys if isinstance(keys, mx.array) else keys[0]).shape[1]


def _format(keys: Held, dim: int) -> tuple[int, int]:
    """Bits (0: plain) and group size of keys."""
    if isinstance(keys, mx.array):
        return 0, 32
    return keys[0].shape[-1] * 32 // dim, dim // keys[1].shape[-1]


def _planes(keys: Held, values: Held, queries: mx.array) -> tuple[list, int, int]:
    """The six arrays of a cache for decode.metal, its bits (0: plain) and group size."""
    dim = queries.shape[-1]
    bits, group = _format(keys, dim)
    if not bits:
        return [keys, keys, keys, values, values, values], bits, group
    scales = keys[1]
    if (bits, group) not in metal.FORMATS:
        raise ValueError(
            f"quantised cache: found {bits} bits in groups of {group}, "
            "expected 4 or 8 bits in groups of 32 or 64"
        )
    if scales.dtype != queries.dtype:
        raise ValueError(
            f"quantised cache: found {scales.dtype} scales, expected the queries' {queries.dtype}"
        )
    if scales.size < 8:
        # MLX would pass them in another address space.
        raise ValueError(
            f"quantised cache: found {scales.size} scales, expected room for at least 8"
        )
    return [*keys, *values], bits, group


# Choosing

ARMS = {OPERATIONS: decode_ops, "kernel": decode_kernel}


def arm(choice: str, queries: mx.array, segments: list[Segment]) -> str:
    """The name of the arm that computes this; choice: what `metal.wanted` says."""
    heads, length, dim = queries.shape[1:]
    plain = [x.keys if isinstance(x.keys, mx.array) else x.keys[1] for x in segments]
    kv_heads = plain[0].shape[1]
    if length > ROWS or not metal.takes(queries, kv_heads, *(x.dtype for x in plain)):
        return OPERATIONS
    formats = tuple((x.form.bits, x.form.group_size) for x in segments)
    for held, found in zip(plain, formats, strict=True):
        if found[0] and (found not in metal.FORMATS or held.size < 8):
            return OPERATIONS
    if choice == "metal":
        return "kernel"
    quantised = any(bits for bits, _ in formats)
    untimed = "kernel" if quantised or dim not in metal.VECTOR_DIMS else OPERATIONS
    keys = DECODE.bucket(sum(x.stop - x.start for x in segments))
    key = Key("decode", queries.dtype, dim, kv_heads, heads // kv_heads, length, formats, keys)
    return chosen(key, ARMS, DECODE, untimed, choice == "retune")
