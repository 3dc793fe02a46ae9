"""Few query rows over segments of a cache: MLX's operations, the kernel, and the one that chooses.

The queries are always the last tokens of the last segment: they see themselves and all before.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx

from ..cache.storage import Segment, part_of
from . import metal
from .choice import OPERATIONS, Arm, Key, chosen
from .kernel import (
    POSITIONS,
    SEGMENTS,
    TILE,
    Signature,
    Variant,
    decode_kernel,
    heads_of,
    room,
    signature,
)
from .plan import BLOCK
from .trial import DECODE


def decode(queries: mx.array, segments: list[Segment], kernels: str | None) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over segments, by the kernel where it is faster.

    kernels: what `metal.wanted` says; a kernel has no gradient. Returns (B, heads, L, head_dim).
    """
    if kernels:
        return decode_rows(queries, [segments], kernels)
    return decode_ops(queries, segments)


def decode_rows(queries: mx.array, rows: list[list[Segment]], kernels: str | None) -> mx.array:
    """The same for a batch: segments of each sequence, or of one cache that all share."""
    if kernels:
        signed = signature(rows)
        name = arm(kernels, queries, rows, signed)
        if name != OPERATIONS:
            return decode_kernel(queries, rows, None, VARIANTS[name], signed)
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
    kv_heads = heads_of(segments[0])
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
VARIANTS = {
    "kernel": Variant(),
    "kernel, 2 rows": Variant(rows=2),
    "kernel, 256 keys": Variant(keys=256),
}
ARMS: dict[str, Arm] = {OPERATIONS: decode_rows_ops} | {
    name: functools.partial(decode_kernel, variant=variant) for name, variant in VARIANTS.items()
}


def arm(
    choice: str, queries: mx.array, rows: list[list[Segment]], signed: Signature | None = None
) -> str:
    """The name of the arm that computes this; choice: what `metal.wanted` says."""
    kv_heads = heads_of(rows[0][0])
    key = _key(queries.shape, queries.dtype, kv_heads, signed or signature(rows))
    if key is None:
        return OPERATIONS
    if choice == "metal":
        return "kernel"
    key = key._replace(keys=DECODE.bucket(key.keys))
    return chosen(key, arms_of(key), DECODE, untimed(key), choice == "retune")


@functools.lru_cache(256)
def _key(shape: tuple[int, ...], dtype: mx.Dtype, kv_heads: int, rows: Signature) -> Key | None:
    """What the arm is chosen for; None where the kernel does not take it."""
    _, heads, length, dim = shape
    if length > POSITIONS or not metal.takes(dtype, heads, kv_heads, dim):
        return None
    longest = 0
    if max(map(len, rows)) > SEGMENTS:
        return None
    for own in rows:
        longest = max(longest, sum(stop - start for _, start, stop, *_ in own))
        for form, _, _, capacity, found in own:
            if found != dtype or capacity < TILE or not metal.reads(form):
                return None
    forms = tuple(form for form, *_ in rows[0])
    of_heads = dim, kv_heads, heads // kv_heads, length
    return Key("decode", dtype, *of_heads, forms, longest, room(len(rows), forms))


def arms_of(key: Key) -> dict[str, Arm]:
    """Those of ARMS that differ here: a simdgroup may have no more than 2 rows anyway."""
    few = key.head_dim > 128 or key.group * key.rows <= 2
    return {name: run for name, run in ARMS.items() if not (few and "rows" in name)}


def untimed(key: Key) -> str:
    """What is taken where nothing can be timed."""
    quantised = any(form.bits for form in key.forms)
    return "kernel" if quantised or key.head_dim not in metal.VECTOR_DIMS else OPERATIONS
