"""The decode kernel: few query rows over ranges of slots of caches, each key and value read once.

A launch takes a batch of sequences, each with buffers of its own: nothing is copied or padded
where they have different lengths.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.storage import Held, Segment
from . import metal

# Query positions in one launch; decode.h's kPositions.
POSITIONS = 8

SIMDGROUPS = 8

# Keys a simdgroup should have at least, and threadgroups a core at most. Not tuned on Apple
# hardware.
KEYS = 64
THREADGROUPS = 4

# Metal has 31 buffers a kernel: the queries, the table and the output take three.
BUFFERS = 28

# Slots start .. stop - 1, which one position sees; of each position, cache and sequence.
Range = tuple[int, int]
Ranges = Sequence[Sequence[Sequence[Range]]]
Cache = tuple[Held, Held]


class Variant(NamedTuple):
    """How a launch is cut: query rows a simdgroup (1, 2 or 4), threadgroups that share the slots,
    or how many keys a simdgroup has at least; 0: as is usual."""

    rows: int = 0
    splits: int = 0
    keys: int = 0


class Format(NamedTuple):
    """Bits of keys and of values (0: plain), and the group size."""

    keys: int
    values: int
    group: int

    def __str__(self) -> str:
        return f"{self.keys}x{self.values}x{self.group}" if self.group else "plain"


PLAIN = Format(0, 0, 0)


def format_of(keys: Held, values: Held, dim: int) -> Format:
    """The format of a cache, of heads of so many elements."""
    if isinstance(keys, mx.array):
        return PLAIN
    of_keys, of_values = (x[0].shape[-1] * 32 // dim for x in (keys, values))
    return Format(of_keys, of_values, dim // keys[1].shape[-1])


def decode_kernel(
    queries: mx.array, rows: Sequence[Sequence[Segment]], variant: Variant | None = None
) -> mx.array:
    """Attention of the last tokens of each sequence over its segments; they see themselves and all
    before.

    Args: queries (B, heads, L, head_dim), L at most 8. rows: of each sequence, or one of all if
    they share it, one or two segments. Returns (B, heads, L, head_dim).
    """
    length = queries.shape[2]
    caches, ranges = [], []
    for segments in rows:
        *before, last = segments
        caches.append([(x.keys, x.values) for x in segments])
        ends = range(last.stop - length + 1, last.stop + 1)
        ranges.append([[(x.start, x.stop)] * length for x in before])
        ranges[-1].append([(last.start, stop) for stop in ends])
    if len(rows) < len(queries):
        ranges *= len(queries)
    return launch(queries, caches, ranges, variant or Variant())


def launch(
    queries: mx.array,
    caches: Sequence[Sequence[Cache]],
    ranges: Ranges,
    variant: Variant = Variant(),  # noqa: B008
) -> mx.array:
    """Attention of few query positions over ranges of slots of one or two caches.

    Args:
        queries: (B, heads, L <= 8, head_dim).
        caches: of each sequence, or one of all, its one or two: keys and values. Those are whole
            buffers, as a slice would be copied: (1 or B, KV heads, capacity, head_dim) of the
            queries' dtype, or as `mx.quantize` returns them.
        ranges: ranges[b][i][l], the slots of cache i that position l of sequence b sees.
        variant: how the launch is cut.

    Returns (B, heads, L, head_dim), zeros for a position that sees nothing. One launch, or two if
    the slots are split, for as many sequences as have buffers in it. Raises ValueError for more
    positions, and for formats that the kernel does not read.
    """
    length = queries.shape[2]
    if length > POSITIONS:
        raise ValueError(f"decode: found {length} query rows, expected at most {POSITIONS}")
    formats = [tuple(_checked(*one, queries) for one in some) for some in caches]
    if len(caches) == 1:
        return _launch(queries, caches, formats[0], ranges, variant)
    outputs, start = [], 0
    while start < len(caches):
        most, stop = BUFFERS // _buffers_of(formats[start]), start + 1
        while stop < min(start + most, len(caches)) and formats[stop] == formats[start]:
            stop += 1
        part = slice(start, stop)
        some = queries if stop - start == len(caches) else queries[part]
        outputs.append(_launch(some, caches[part], formats[start], ranges[part], variant))
        start = stop
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


def _buffers_of(formats: Sequence[tuple]) -> int:
    return sum(6 if any(one) else 2 for one in formats)


def room(sequences: int, formats: Sequence[tuple]) -> int:
    """For how many sequences the kernel is compiled that serves so many: one kernel serves several
    numbers, as it is not to be compiled whenever a sequence joins."""
    enough = next((n for n in (1, 2, 4, 8) if n >= sequences), BUFFERS)
    return min(enough, BUFFERS // _buffers_of(formats))


def _launch(queries, caches, formats, ranges, variant) -> mx.array:
    """One launch, of caches of one format."""
    B, heads, length, dim = queries.shape
    first = caches[0][0][0]
    kv_heads = (first if isinstance(first, mx.array) else first[0]).shape[1]
    count = heads // kv_heads * length
    rows = min(variant.rows or 4, _rows(count, dim))
    blocks = -(-count // rows)
    capacities = tuple(
        tuple((keys if isinstance(keys, mx.array) else keys[0]).shape[2] for keys, _ in some)
        for some in caches
    )
    table, visited = _table(
        (kv_heads, length, count),
        len(caches) == 1,
        capacities if len(caches) == B else capacities * B,
        tuple(tuple(tuple(x) for x in one) for one in ranges),
    )
    splits = variant.splits or _splits(visited, kv_heads * blocks * B, variant.keys or KEYS)
    partial = splits > 1
    template = [("T", queries.dtype), ("O", mx.float32 if partial else queries.dtype)]
    template += [("D", dim), ("C", rows), ("N", SIMDGROUPS)]
    template += [("PARTIAL", partial), ("TWO", len(formats) == 2)]
    inputs = [queries]
    for some in caches:
        for keys, values in some:
            inputs += [keys, values] if isinstance(keys, mx.array) else [*keys, *values]
    most = room(len(caches), formats)
    caches = [*caches, *[caches[-1]] * (most - len(caches))]
    names, name, chosen = _buffers(most, formats)
    (out,) = metal.kernel("decode", names, "common.h forms.h decode.h", name, chosen)(
        inputs=[*inputs, table],
        template=template,
        grid=(32 * SIMDGROUPS * kv_heads * blocks, splits, B),
        threadgroup=(32 * SIMDGROUPS, 1, 1),
        output_shapes=[(B, kv_heads, splits, count, dim + 2) if partial else queries.shape],
        output_dtypes=[template[1][1]],
    )
    return _combine(out, queries) if partial else out


@functools.lru_cache(None)
def _buffers(sequences: int, formats: tuple[Format, ...]) -> tuple[str, str, str]:
    """For so many sequences' buffers: inputs, the kernel's name, and what chooses among them."""
    buffers: list[list[str]] = [[] for _ in range(sequences)]
    chosen = ""
    for cache, prefix, form in zip(("cache", "more"), ("", "more_"), formats, strict=False):
        names, kind = ["keys", "values"], "ksa::Plain<D, T>"
        if form.group:
            names = "keys key_scales key_biases values value_scales value_biases".split()
            kind = f"ksa::Affine<D, T, {form.keys}, {form.values}, {form.group}>"
        fields = []
        for name in names:
            each = [f"{prefix}{name}_{i}" for i in range(sequences)]
            for own, one in zip(buffers, each, strict=True):
                own.append(one)
            tests = "".join(f"WHICH == {i}u ? {one} : " for i, one in enumerate(each[:-1]))
            fields.append(tests.replace("WHICH", "threadgroup_position_in_grid.z") + each[-1])
        chosen += f"const {kind} {cache} = {{{', '.join(fields)}}};\n"
    if len(formats) == 1:
        chosen += f"const {kind} more = cache;\n"
    inputs = ["queries", *(name for own in buffers for name in own), "table"]
    return " ".join(inputs), "_".join(("decode", str(sequences), *map(str, formats))), chosen


@functools.lru_cache(256)
def _table(counts, shared: bool, capacities, ranges) -> tuple[mx.array, int]:
    """The table that decode.metal reads, and how many slots the longest sequence visits."""
    table = np.zeros((len(ranges), 36), np.int32)
    visited = 0
    for b, (own, caches) in enumerate(zip(capacities, ranges, strict=True)):
        table[b, 0] = b if shared else 0
        table[b, 2 : 2 + len(own)] = own
        slots = 0
        for i, pairs in enumerate(caches):
            at = 4 + 2 * POSITIONS * i
            table[b, at : at + 2 * len(pairs)] = np.array(pairs, np.int32).ravel()
            seen = [pair for pair in pairs if pair[0] < pair[1]]
            if seen:
                slots += max(stop for _, stop in seen) - min(start for start, _ in seen)
        visited = max(visited, slots)
    return mx.array(np.concatenate([np.array([*counts, 0], np.int32), table.ravel()])), visited


def _rows(count: int, dim: int) -> int:
    """Query rows a simdgroup: more do not fit the registers (8 at head_dim 128 and 4 at 256 spill,
    MLX#4077, #3837)."""
    most = 4 if dim <= 128 else 2
    return min(most, 1 << (count - 1).bit_length())


def _splits(visited: int, threadgroups: int, keys: int) -> int:
    """How many threadgroups share the slots, where there are so many without."""
    enough = -(-THREADGROUPS * cores() // threadgroups)
    return max(1, min(-(-visited // (keys * SIMDGROUPS)), enough))


@functools.lru_cache(None)
def cores() -> int:
    """About how many cores the GPU has, by the last letter of its architecture."""
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    letter = str(info.get("architecture", ""))[-1:]
    return {"p": 5, "g": 10, "c": 60, "d": 80}.get(letter, 40)


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


def _checked(keys: Held, values: Held, queries: mx.array) -> Format:
    """The format of a cache. Raises ValueError if the kernel does not read it."""
    form = format_of(keys, values, queries.shape[-1])
    if form == PLAIN:
        return form
    for bits in (form.keys, form.values):
        if (bits, form.group) not in metal.FORMATS:
            raise ValueError(
                f"quantised cache: found {bits} bits in groups of {form.group}, "
                "expected 4 or 8 bits in groups of 32 or 64"
            )
    scales = keys[1]
    if scales.dtype != queries.dtype:
        raise ValueError(
            f"quantised cache: found {scales.dtype} scales, expected the queries' {queries.dtype}"
        )
    if scales.size < 8:
        # MLX would pass them in another address space.
        raise ValueError(
            f"quantised cache: found {scales.size} scales, expected room for at least 8"
        )
    return form
