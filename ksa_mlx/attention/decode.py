"""Few query rows over segments of a cache: MLX's operations, the kernel, and the one that chooses.

The queries are always the last tokens of the last segment: they see themselves and all before.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..cache.storage import Held, Segment, part_of
from . import metal
from .choice import OPERATIONS, Arm, Key, chosen
from .kernel import POSITIONS, Variant, decode_kernel, room
from .plan import BLOCK
from .trial import DECODE


def decode(queries: mx.array, segments: list[Segment], kernels: str | None) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over segments, by the kernel where it is faster.

    kernels: what `metal.wanted` says; a kernel has no gradient. Returns (B, heads, L, head_dim).
    """
    return decode_rows(queries, [segments], kernels)


def decode_rows(queries: mx.array, rows: list[list[Segment]], kernels: str | None) -> mx.array:
    """The same for a batch: segments of each sequence, or of one cache that all share."""
    if kernels:
        return ARMS[arm(kernels, queries, rows)](queries, rows)
    return decode_rows_ops(queries, rows)


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


# Choosing


def decode_rows_ops(queries: mx.array, rows: list[list[Segment]]) -> mx.array:
    """By MLX's operations, sequence by sequence where they share no cache."""
    if len(rows) == 1:
        return decode_ops(queries, rows[0])
    each = zip(mx.split(queries, len(rows)), rows, strict=True)
    return mx.concatenate([decode_ops(one, segments) for one, segments in each])


# The kernel as it is cut usually, with fewer rows a simdgroup, with fewer threadgroups.
ARMS: dict[str, Arm] = {
    OPERATIONS: decode_rows_ops,
    "kernel": decode_kernel,
    "kernel, 2 rows": functools.partial(decode_kernel, variant=Variant(rows=2)),
    "kernel, 256 keys": functools.partial(decode_kernel, variant=Variant(keys=256)),
}


def arm(choice: str, queries: mx.array, rows: list[list[Segment]]) -> str:
    """The name of the arm that computes this; choice: what `metal.wanted` says."""
    heads, length, dim = queries.shape[1:]
    if length > POSITIONS or any(len(segments) > 2 for segments in rows):
        return OPERATIONS
    for segments in rows:
        plain = [x.keys if isinstance(x.keys, mx.array) else x.keys[1] for x in segments]
        kv_heads = plain[0].shape[1]
        if not metal.takes(queries, kv_heads, *(x.dtype for x in plain)):
            return OPERATIONS
        formats = tuple((x.form.bits, x.form.group_size) for x in segments)
        for held, found, x in zip(plain, formats, segments, strict=True):
            both = {found, (x.form.value_bits, x.form.group_size)}
            if held.size < 8 or (found[0] and not both <= set(metal.FORMATS)):
                return OPERATIONS
    if choice == "metal":
        return "kernel"
    keys = DECODE.bucket(max(sum(x.stop - x.start for x in segments) for segments in rows))
    shape = dim, kv_heads, heads // kv_heads, length
    key = Key("decode", queries.dtype, *shape, formats, keys, room(len(rows), formats))
    return chosen(key, arms_of(key), DECODE, untimed(key), choice == "retune")


def arms_of(key: Key) -> dict[str, Arm]:
    """Those of ARMS that differ here: a simdgroup may have no more than 2 rows anyway."""
    few = key.head_dim > 128 or key.group * key.rows <= 2
    return {name: run for name, run in ARMS.items() if not (few and "rows" in name)}


def untimed(key: Key) -> str:
    """What is taken where nothing can be timed."""
    quantised = any(bits for bits, _ in key.formats)
    return "kernel" if quantised or key.head_dim not in metal.VECTOR_DIMS else OPERATIONS


def _heads(keys: Held) -> int:
    return (keys if isinstance(keys, mx.array) else keys[0]).shape[1]
