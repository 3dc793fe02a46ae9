"""The Metal kernels of the compressed attention, and when they run instead of MLX's operations.

The sources are in `metal/`; each is the body of one `mx.fast.metal_kernel`, behind `attention.h`.
Summary rows need none: MLX's attention computes all chunks in one launch
(`attention.summary_attention`).
"""

import functools
import os
import platform
import warnings
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Union

import mlx.core as mx
import numpy as np

from ..naive import visibility

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Query rows a sequence in one decode launch; attention.h's kRows.
ROWS = 8

# Slots a threadgroup reads in decode, and how many threadgroups share them at most. Not tuned on
# Apple hardware.
SLOTS_PER_SPLIT = 128
MAX_SPLITS = 64

# Bits and group sizes of quantised caches.
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64)]

# Keys or values: plain, or quantised as (packed, scales, biases).
Cache = Union[mx.array, tuple[mx.array, mx.array, mx.array]]
Ranges = Sequence[Sequence[tuple[int, int]]]


def source(name: str) -> str:
    """A file of `metal/`, which is in the installed package, or beside it in the repository."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "metal", here.parent / "metal"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"{name}: not found in {here / 'metal'} or {here.parent / 'metal'}; reinstall ksa-mlx"
    )


@functools.lru_cache(None)
def _kernel(name: str, inputs: str, outputs: str = "out"):
    return mx.fast.metal_kernel(
        name=f"ksa_{name}",
        input_names=inputs.split(),
        output_names=outputs.split(),
        header=source("attention.h"),
        source=source(f"{name}.metal"),
    )


# Choosing

_override: str | None = None
_warned = False


@contextmanager
def using(choice: str):
    """Inside the block "metal" forces the kernels, "ops" MLX's operations, and "auto" chooses.

    The environment variable KSA_MLX_KERNELS does the same for a process; this wins over it.
    """
    global _override
    saved, _override = _override, _checked("kernels", choice)
    try:
        yield
    finally:
        _override = saved


def _checked(name: str, choice: str) -> str:
    if choice not in ("auto", "metal", "ops"):
        raise ValueError(f"{name}: found {choice!r}, expected auto, metal or ops")
    return choice


def use(kernel: str, queries: mx.array, *caches: Cache) -> bool:
    """Whether a kernel, "decode" or "prefill", runs for queries (B, heads, L, head_dim) and
    the keys of one cache, or of two.

    If not forced: where Metal is the default device and the kernel agrees with MLX's operations.
    """
    choice = _override or _checked("KSA_MLX_KERNELS", os.environ.get("KSA_MLX_KERNELS", "auto"))
    if choice == "ops":
        return False
    _, heads, length, dim = queries.shape
    for keys in caches:
        plain = isinstance(keys, mx.array)
        held, kv_heads = (keys if plain else keys[1]).dtype, (keys if plain else keys[0]).shape[1]
        if not queries.dtype == held in DTYPES or dim not in HEAD_DIMS or heads > 16 * kv_heads:
            return False
        if not plain and (_format(keys, dim) not in FORMATS or keys[1].size < 8):
            return False
    if choice == "metal":
        return True
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return False
    # What distinguishes the compiled kernels.
    formats = tuple(_format(keys, dim) for keys in caches)
    rows = length if kernel == "decode" else 0
    return _agrees(kernel, queries.dtype, dim, heads // kv_heads, rows, formats)


@functools.lru_cache(None)
def _agrees(
    kernel: str, dtype: mx.Dtype, dim: int, group: int, rows: int, formats: tuple[tuple, ...]
) -> bool:
    """Whether a kernel, once compiled, computes what MLX's operations do; warns if not."""
    try:
        if kernel == "prefill":
            worst = _prefill_difference(dtype, dim, group)
        else:
            # Short and long: in one launch, and split over several threadgroups.
            worst = max(_decode_difference(dtype, dim, group, rows, formats, n) for n in (60, 300))
        # MLX's own attention may use TF32 for float32 (M5).
        if worst <= {mx.float32: 5e-3, mx.float16: 1e-2, mx.bfloat16: 6e-2}[dtype]:
            return True
        found = f"differs from MLX's operations by {worst:.2g}"
    except (RuntimeError, ValueError) as error:
        found = f"does not run: {error}"
    _warn(
        f"{kernel} {found} ({dtype}, head_dim {dim}, {group} query heads a KV head, {rows} rows, "
        f"(bits, group size) {formats})"
    )
    return False


def _random(dtype: mx.Dtype, *shapes: tuple) -> list:
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [mx.random.normal(shape, key=k).astype(dtype) for shape, k in zip(shapes, keys)]


def _distance(queries: mx.array, keys: mx.array, values: mx.array, mask, got: mx.array) -> float:
    """The largest difference of `got` from MLX's attention; NaN if it is not all numbers."""
    expected = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )
    return mx.abs(got.astype(mx.float32) - expected.astype(mx.float32)).max().item()


def _decode_difference(dtype, dim, group, rows, formats, slots: int) -> float:
    """Of `decode_last` from MLX's operations, on caches of so many random slots."""
    start, stop, summaries = 3, slots - 2, slots // 4
    one = (1, 1, slots, dim)
    queries, *held = _random(dtype, (1, group, rows, dim), *[one] * 2 * len(formats))
    caches, exact = [], []
    for x, (bits, size) in zip(held, [f for f in formats for _ in "kv"]):
        caches.append(mx.quantize(x, size, bits) if bits else x)
        exact.append(mx.dequantize(*caches[-1], size, bits) if bits else x)
    seen = [x[:, :, start:stop] for x in exact[:2]]
    second = ()
    if len(formats) == 2:
        second = (*caches[2:], summaries)
        seen = [mx.concatenate([x[:, :, :summaries], y], axis=2) for x, y in zip(exact[2:], seen)]
    got = decode_last(queries, *caches[:2], start, stop, *second)
    return _distance(queries, *seen, "causal", got)


def _prefill_difference(dtype, dim, group) -> float:
    """Of `prefill` from MLX's operations, on a short random text."""
    chunk, window, n = 8, 2, 61
    sees = mx.array(visibility(n, chunk, 1, window)[:n])
    left = sees.shape[1] - n
    queries, *text = _random(dtype, (1, group, n, dim), *[(1, 1, n, dim)] * 2)
    held = _random(dtype, *[(1, 1, left, dim)] * 2)
    got = prefill(queries, *text, *held, layout([n], [0], [0], [left], chunk, 1, window))
    seen = [mx.concatenate([t, x[:, :, ::-1]], axis=2) for t, x in zip(text, held)]
    return _distance(queries, *seen, sees, got)


def _warn(found: str):
    """Say once in a process that a kernel is not used."""
    global _warned
    if _warned:
        return
    _warned = True
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    warnings.warn(
        f"ksa-mlx: the Metal kernel {found}. MLX's operations are used instead: correct, but "
        f"slower. Please report this with: device {info.get('device_name', 'unknown')}, macOS "
        f"{platform.mac_ver()[0] or 'none'}, MLX {mx.__version__}",
        RuntimeWarning,
        stacklevel=2,
    )


# Decode


def bounds(ranges: Sequence[Ranges]) -> mx.array:
    """The table of slots that `decode` reads.

    Args: ranges[b][segment][row] = (start, stop), the slots of a segment that a row of sequence b
    sees; those of different segments are different slots. Returns (B, segments, 8, 2) int32.
    """
    table = np.zeros((len(ranges), max(map(len, ranges)), ROWS, 2), dtype=np.int32)
    for b, segments in enumerate(ranges):
        for i, rows in enumerate(segments):
            table[b, i, : len(rows)] = rows
    return mx.array(table)


def decode(
    queries: mx.array,
    keys: Cache,
    values: Cache,
    bounds: mx.array,
    visited: int,
    summary_keys: Cache | None = None,
    summary_values: Cache | None = None,
    summary_bounds: mx.array | None = None,
) -> mx.array:
    """Attention of few query rows over ranges of slots of a cache, which are read once.

    Args:
        queries (B, heads, L <= 8, head_dim).
        keys, values (B, KV heads, capacity, head_dim): the whole buffers, as a slice would be
            copied. Both plain, of the queries' dtype, or both as `mx.quantize` returns them:
            (packed, scales, biases).
        bounds (B, segments, 8, 2) int32, from `bounds`.
        visited: about how many slots the longest sequence visits; decides the number of splits.
        summary_keys, summary_values, summary_bounds: a second cache of other slots, perhaps of
            other bits.

    Returns (B, heads, L, head_dim), zeros for a row that sees nothing. One launch, or two if split.
    """
    B, heads, length, dim = queries.shape
    plain = all(isinstance(x, mx.array) for x in (keys, values)) and summary_keys is None
    kv_heads = (keys if isinstance(keys, mx.array) else keys[0]).shape[1]
    if length > ROWS:
        raise ValueError(f"decode: found {length} query rows, expected at most {ROWS}")
    count = heads // kv_heads * length
    most = 8 if dim <= 128 else 4
    if count > 12 * most and length > 1:
        # More than 12 simdgroups may not fit the registers: the cache is read twice.
        outputs = []
        for rows in (slice(0, length // 2), slice(length // 2, length)):
            tables = [
                None if x is None else mx.roll(x, -rows.start, axis=2)
                for x in (bounds, summary_bounds)
            ]
            outputs.append(
                decode(
                    queries[:, :, rows],
                    keys,
                    values,
                    tables[0],
                    visited,
                    summary_keys,
                    summary_values,
                    tables[1],
                )
            )
        return mx.concatenate(outputs, axis=2)
    if count <= most:
        simdgroups, rows, tile = 8, count, 0
    else:
        simdgroups = -(-count // most)
        rows, tile = -(-count // simdgroups), 16 if dim <= 128 else 8
    splits = (
        1 if visited <= 2 * SLOTS_PER_SPLIT else min(MAX_SPLITS, -(-visited // SLOTS_PER_SPLIT))
    )
    partial = splits > 1
    out_dtype = mx.float32 if partial else queries.dtype
    template = {"T": queries.dtype, "O": out_dtype, "D": dim}
    template.update(C=rows, N=simdgroups, TILE=tile, PARTIAL=partial)
    if plain:
        kernel, inputs = (
            _kernel("decode", "queries keys values bounds"),
            [queries, keys, values, bounds],
        )
    else:
        if summary_keys is None:
            summary_keys, summary_values, summary_bounds = keys, values, _all_rows(B, length, 0)
        text, template["BITS"], template["GROUP"] = _quantized(keys, values, queries)
        summaries, bits, group = _quantized(summary_keys, summary_values, queries)
        template.update(SUMMARY_BITS=bits, SUMMARY_GROUP=group)
        one = "keys key_scales key_biases values value_scales value_biases bounds"
        two = " ".join(f"summary_{name}" for name in one.split())
        kernel = _kernel("decode_quantized", f"queries {one} {two}")
        inputs = [queries, *text, bounds, *summaries, summary_bounds]
    (out,) = kernel(
        inputs=inputs,
        template=list(template.items()),
        grid=(32 * simdgroups * kv_heads, splits, B),
        threadgroup=(32 * simdgroups, 1, 1),
        output_shapes=[(B, kv_heads, splits, count, dim + 2) if partial else queries.shape],
        output_dtypes=[out_dtype],
    )
    return _combine(out, queries) if partial else out


def _format(keys: Cache, dim: int) -> tuple[int, int]:
    """Bits (0: plain) and group size of keys."""
    if isinstance(keys, mx.array):
        return 0, 32
    return keys[0].shape[-1] * 32 // dim, dim // keys[1].shape[-1]


def _quantized(keys: Cache, values: Cache, queries: mx.array) -> tuple[list, int, int]:
    """The arrays of a cache for decode_quantized.metal, its bits (0: plain) and group size."""
    dim = queries.shape[-1]
    bits, group = _format(keys, dim)
    if not bits:
        return [keys, keys, keys, values, values, values], bits, group
    scales = keys[1]
    if (bits, group) not in FORMATS:
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


@functools.lru_cache(64)
def _last_rows(batch: int, length: int, start: int, stop: int) -> mx.array:
    """Bounds where the last `length` slots of start .. stop - 1 see themselves and all before."""
    rows = [(start, stop - length + 1 + r) for r in range(length)]
    return bounds([[rows]] * batch)


@functools.lru_cache(64)
def _all_rows(batch: int, length: int, stop: int) -> mx.array:
    """Bounds where all rows see the slots 0 .. stop - 1."""
    return bounds([[[(0, stop)] * length]] * batch)


def decode_last(
    queries: mx.array,
    keys: Cache,
    values: Cache,
    start: int,
    stop: int,
    summary_keys: Cache | None = None,
    summary_values: Cache | None = None,
    summaries: int = 0,
) -> mx.array:
    """`decode` of the slots start .. stop - 1, the last L of which are the queries' own, and of the
    first slots of a second cache, if there is one."""
    B, _, length, _ = queries.shape
    text = keys, values, _last_rows(B, length, start, stop), stop - start + summaries
    if not summaries:
        return decode(queries, *text)
    second = summary_keys, summary_values, _all_rows(B, length, summaries)
    return decode(queries, *text, *second)


def _combine(parts: mx.array, queries: mx.array) -> mx.array:
    B, kv_heads, _, count, _ = parts.shape
    dim = queries.shape[-1]
    return _kernel("combine", "parts")(
        inputs=[parts],
        template=[("T", queries.dtype), ("D", dim)],
        grid=(dim, count, B * kv_heads),
        threadgroup=(dim, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]


# Prefill


def layout(
    rows: Sequence[int],
    offsets: Sequence[int],
    starts: Sequence[int],
    left: Sequence[int],
    chunk: int,
    summary_tokens: int,
    window: int,
) -> mx.array:
    """Where things are in a `prefill`, for each sequence: (B, 8) int32.

    Args: new text rows that are not padding; the position of the first of them; the position of
    the text's first key; the slot behind the summaries. chunk k, summary_tokens s and window W are
    the layer's.
    """
    same = (chunk, summary_tokens, window, 0)
    return mx.array(
        np.array([(*one, *same) for one in zip(rows, offsets, starts, left)], dtype=np.int32)
    )


def prefill(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    summary_keys: mx.array,
    summary_values: mx.array,
    layout: mx.array,
) -> mx.array:
    """Attention of new text over summaries and window, without a mask in memory. One launch.

    Args:
        queries (B, heads, L, head_dim): the new text, padded on the right where sequences differ.
        keys, values (B, KV heads, N, head_dim): the text in order, from the first row's window to
            the last row.
        summary_keys, summary_values (B, KV heads, capacity, head_dim): the whole cache, where the
            summaries lie newest first.
        layout (B, 8) int32, from `layout`.

    Returns (B, heads, L, head_dim), zeros for padding.
    """
    B, heads, length, dim = queries.shape
    return _kernel("prefill", "queries keys values summary_keys summary_values layout")(
        inputs=[queries, keys, values, summary_keys, summary_values, layout],
        template=[("T", queries.dtype), ("D", dim), ("K", 32 if dim <= 128 else 16)],
        grid=(-(-length // 32) * 128, heads, B),
        threadgroup=(128, 1, 1),
        output_shapes=[queries.shape],
        output_dtypes=[queries.dtype],
    )[0]
