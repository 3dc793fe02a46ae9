"""The decode kernel: few query rows over ranges of slots of caches, each key and value read once.

A launch takes a batch of sequences, each with buffers of its own: nothing is copied or padded
where they have different lengths.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.storage import Form, Segment
from . import metal

# Query positions in one launch; decode.h's kPositions.
POSITIONS = 8

# Segments of a sequence in one launch.
SEGMENTS = 2

# Keys that are read at once, so a cache must have as many slots; decode.h's kTile.
TILE = 16

SIMDGROUPS = 8

# Keys a simdgroup should have at least, and threadgroups a core at most. Not tuned on Apple
# hardware.
KEYS = 64
THREADGROUPS = 4

# Metal has 31 buffers a kernel: the queries, the table and the output take three.
BUFFERS = 28

# Slots start .. stop - 1, which one position sees; of each position, segment and sequence.
Range = tuple[int, int]
Ranges = Sequence[Sequence[Sequence[Range]]]

# What tells one launch from another: form, start, stop, capacity and dtype of each segment.
Signature = tuple[tuple[tuple[Form, int, int, int, mx.Dtype], ...], ...]


class Variant(NamedTuple):
    """How a launch is cut: query rows a simdgroup (1, 2 or 4), threadgroups that share the slots,
    or how many keys a simdgroup has at least; 0: as is usual."""

    rows: int = 0
    splits: int = 0
    keys: int = 0


USUAL = Variant()


def signature(rows: Sequence[Sequence[Segment]]) -> Signature:
    """What distinguishes these segments, without their keys and values."""
    found = []
    for segments in rows:
        own = []
        for x in segments:
            # Scales tell of the dtype, and packed keys too have a slot in each row.
            some = x.keys if not x.form.bits else x.keys[1]
            own.append((x.form, x.start, x.stop, some.shape[2], some.dtype))
        found.append(tuple(own))
    return tuple(found)


def heads_of(segment: Segment) -> int:
    """KV heads."""
    return (segment.keys if not segment.form.bits else segment.keys[0]).shape[1]


def decode_kernel(
    queries: mx.array,
    rows: Sequence[Sequence[Segment]],
    ranges: Ranges | None = None,
    variant: Variant = USUAL,
    signed: Signature | None = None,
) -> mx.array:
    """Attention of few query positions over one or two segments a sequence.

    Args:
        queries: (B, heads, L <= 8, head_dim).
        rows: of each sequence, or one of all if they share a cache, its segments.
        ranges: ranges[b][i][l], the slots of segment i that position l of sequence b sees. Else
            the positions are the last tokens of the last segment, and see themselves and all
            before.
        variant: how the launch is cut.
        signed: the signature of the rows, if it is known.

    Returns (B, heads, L, head_dim), zeros for a position that sees nothing. One launch, or two if
    the slots are split, for as many sequences as have buffers in it. Raises ValueError for more
    positions, and for formats that the kernel does not read.
    """
    held = None
    if ranges is not None:
        held = tuple(tuple(tuple(positions) for positions in own) for own in ranges)
    kv_heads = heads_of(rows[0][0])
    known = signed or signature(rows)
    plan = _plan(queries.shape, queries.dtype, kv_heads, known, held, variant)
    outputs = []
    for part, launch in plan:
        inputs = [queries if len(plan) == 1 else queries[part]]
        for segments in [*rows[part], *[rows[part][-1]] * launch.spare]:
            for x in segments:
                inputs += (x.keys, x.values) if not x.form.bits else (*x.keys, *x.values)
        names, name, chosen = launch.buffers
        kernel = metal.kernel("decode", names, "common.h forms.h decode.h", name, chosen)
        (out,) = kernel(inputs=[*inputs, launch.table], **launch.call)
        outputs.append(_combine(out, queries.dtype, launch.shape) if launch.partial else out)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs)


class _Launch(NamedTuple):
    """buffers: inputs, the kernel's name, and what chooses among them. spare: sequences that there
    is room for beside. call: grid and the like. shape: of the outputs."""

    buffers: tuple[str, str, str]
    spare: int
    table: mx.array
    call: dict
    shape: tuple[int, ...]
    partial: bool


@functools.lru_cache(256)
def _plan(
    shape: tuple[int, ...],
    dtype: mx.Dtype,
    kv_heads: int,
    rows: Signature,
    ranges: tuple | None,
    variant: Variant,
) -> list[tuple[slice, _Launch]]:
    """The launches of one attention, which is the same in all layers of one window."""
    if shape[2] > POSITIONS:
        raise ValueError(f"decode: found {shape[2]} query rows, expected at most {POSITIONS}")
    for own in rows:
        if len(own) > SEGMENTS:
            raise ValueError(f"decode: found {len(own)} segments, expected at most {SEGMENTS}")
        for form, _, _, capacity, found in own:
            _check(form, capacity, found, dtype)
    if ranges is None:
        ranges = tuple(_last(own, shape[2]) for own in rows)
        ranges *= shape[0] // len(rows)
    if len(rows) == 1:
        return [(slice(None), _launch(shape, dtype, kv_heads, rows, ranges, variant))]
    launches, start = [], 0
    while start < len(rows):
        forms = [x[0] for x in rows[start]]
        most, stop = BUFFERS // _buffers_of(forms), start + 1
        while stop < min(start + most, len(rows)) and [x[0] for x in rows[stop]] == forms:
            stop += 1
        part = slice(start, stop)
        one = stop - start, *shape[1:]
        launches.append(
            (part, _launch(one, dtype, kv_heads, rows[part], ranges[part], variant)),
        )
        start = stop
    return launches


def _last(own: tuple, length: int) -> tuple:
    """Ranges of the last tokens of the last segment."""
    *before, (_, start, stop, *_) = own
    seen = [((x[1], x[2]),) * length for x in before]
    return *seen, tuple((start, end) for end in range(stop - length + 1, stop + 1))


def _launch(shape, dtype, kv_heads, rows, ranges, variant) -> _Launch:
    """One launch, over segments of the same forms."""
    B, heads, length, dim = shape
    forms = tuple(x[0] for x in rows[0])
    count = heads // kv_heads * length
    block = min(variant.rows or 4, _rows(count, dim))
    blocks = -(-count // block)
    table, visited = _table((kv_heads, length, count), rows, ranges)
    splits = variant.splits or _splits(visited, kv_heads * blocks * B, variant.keys or KEYS)
    partial = splits > 1
    out = mx.float32 if partial else dtype
    template = [("T", dtype), ("O", out), ("D", dim), ("C", block), ("N", SIMDGROUPS)]
    call = {
        "template": [*template, ("PARTIAL", partial), ("TWO", len(forms) == 2)],
        "grid": (32 * SIMDGROUPS * kv_heads * blocks, splits, B),
        "threadgroup": (32 * SIMDGROUPS, 1, 1),
        "output_shapes": [(B, kv_heads, splits, count, dim + 2) if partial else shape],
        "output_dtypes": [out],
    }
    most = room(len(rows), forms)
    return _Launch(_buffers(most, forms), most - len(rows), table, call, shape, partial)


def _buffers_of(forms: Sequence[Form]) -> int:
    return sum(6 if form.bits else 2 for form in forms)


def room(sequences: int, forms: Sequence[Form]) -> int:
    """For how many sequences the kernel is compiled that serves so many: one kernel serves several
    numbers, as it is not to be compiled whenever a sequence joins."""
    enough = next((n for n in (1, 2, 4, 8) if n >= sequences), BUFFERS)
    return min(enough, BUFFERS // _buffers_of(forms))


@functools.lru_cache(None)
def _buffers(sequences: int, forms: tuple[Form, ...]) -> tuple[str, str, str]:
    """For so many sequences' buffers: inputs, the kernel's name, and what chooses among them."""
    buffers: list[list[str]] = [[] for _ in range(sequences)]
    chosen = ""
    title, which = ["decode", str(sequences)], "threadgroup_position_in_grid.z"
    for cache, prefix, form in zip(("cache", "more"), ("", "more_"), forms, strict=False):
        names, kind, of = ["keys", "values"], "ksa::Plain<D, T>", "plain"
        if form.bits:
            names = "keys key_scales key_biases values value_scales value_biases".split()
            numbers = [str(n) for n in (form.bits, form.value_bits, form.group_size)]
            kind, of = f"ksa::Affine<D, T, {', '.join(numbers)}>", "x".join(numbers)
        title.append(of)
        fields = []
        for name in names:
            each = [f"{prefix}{name}_{i}" for i in range(sequences)]
            for own, one in zip(buffers, each, strict=True):
                own.append(one)
            tests = (f"{which} == {i}u ? {one} : " for i, one in enumerate(each[:-1]))
            fields.append("".join(tests) + each[-1])
        chosen += f"const {kind} {cache} = {{{', '.join(fields)}}};\n"
    if len(forms) == 1:
        chosen += f"const {kind} more = cache;\n"
    inputs = ["queries", *(name for own in buffers for name in own), "table"]
    return " ".join(inputs), "_".join(title), chosen


def _table(counts, rows: Signature, ranges) -> tuple[mx.array, int]:
    """The table that decode.metal reads, and how many slots the longest sequence visits."""
    table = np.zeros((len(ranges), 36), np.int32)
    visited, shared = 0, len(rows) == 1
    for b, caches in enumerate(ranges):
        own = rows[0 if shared else b]
        table[b, 0] = b if shared else 0
        table[b, 2 : 2 + len(own)] = [x[3] for x in own]
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


def _combine(parts: mx.array, dtype: mx.Dtype, shape: tuple[int, ...]) -> mx.array:
    """What the splits (B, KV heads, splits, rows, head_dim + 2) sum up to."""
    B, kv_heads, _, count, _ = parts.shape
    dim = shape[-1]
    return metal.kernel("combine", "parts")(
        inputs=[parts],
        template=[("T", dtype), ("D", dim)],
        grid=(dim, count, B * kv_heads),
        threadgroup=(dim, 1, 1),
        output_shapes=[shape],
        output_dtypes=[dtype],
    )[0]


def _check(form: Form, capacity: int, found: mx.Dtype, dtype: mx.Dtype):
    """Raises ValueError if the kernel does not read such a cache."""
    if capacity < TILE:
        raise ValueError(f"cache: found {capacity} slots, expected at least {TILE}")
    if not metal.reads(form):
        raise ValueError(
            f"quantised cache: found {form}, expected 4 or 8 bits in groups of 32 or 64"
        )
    if found != dtype:
        what = "scales" if form.bits else "keys"
        raise ValueError(f"cache: found {found} {what}, expected the queries' {dtype}")
