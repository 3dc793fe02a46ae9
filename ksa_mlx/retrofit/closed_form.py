"""What needs no gradients: where own projections start, and the attention sink in a summary.

Both are least squares, layer by layer on the way of the summary rows. A chunk's summary shall be
found where the mean of the chunk's keys is, somewhat louder, and say the mean of its values. The
first chunk is the same in every text; its summary shall be found as often as its text was, as most
of what a query gives to nothing in particular goes there (the attention sink).
"""

import math
from collections.abc import Iterator, Sequence

import mlx.core as mx
import numpy as np
from mlx_lm.tuner.lora import LoRALinear

from .features import Features
from .streams import Rows, summary_stream

# Strengths of the ridge, relative to the mean of the normal matrix's diagonal.
RIDGE, LOUD_RIDGE, SINK_RIDGE, EDIT_RIDGE = 2e-2, 1e-2, 3e-3, 1e-3

Array = np.ndarray


def start(model, batches: Sequence[Features], rng: np.random.Generator):
    """Set the own k and v projections of a model by ridge regression on `batches`.

    A summary stands for k tokens, so that log k more logit would count them all; half of it does
    best, as some of the tokens are near-copies of others.
    """
    chunk = model.args.summary_chunk_size
    for i, all_rows in _side_by_side(model, batches):
        attn = all_rows[0].layer.self_attn
        positions = all_rows[0].positions
        xs, keys, values = [], [], []
        for features, rows in zip(batches, all_rows, strict=True):
            pooled = [_pooled(x, features.chunks, chunk) for x in features.texts[i]]
            xs.append(_rows(rows.x))
            keys.append(_heads(_unrotated(attn, pooled[0], positions)))
            values.append(_heads(pooled[1]))
        x, k, v = (np.concatenate(some) for some in (xs, keys, values))
        if i in batches[0].lessons:
            queries = [f.lessons[i].queries for f in batches]
            k = k + _louder(attn, queries, positions, math.log(chunk) / 2, rng)
        for name, target in (("k", _before_norm(attn, k, x)), ("v", v.reshape(len(v), -1))):
            missing = target - _projected(attn, name, x)
            _add(attn, name, _solve(x.T @ x, x.T @ missing, RIDGE).T)


def sink(model, batches: Sequence[Features]) -> dict[int, tuple[float, float]]:
    """Make the first chunk's summary the attention sink, by a change of rank one to each layer's
    own k and v projections that leaves the other summaries as they are.

    Returns, by layer, mean and standard deviation over queries of the error of its log mass. The
    first layer is left out: there all summaries are one constant.
    """
    chunk, found = model.args.summary_chunk_size, {}
    for i, all_rows in _side_by_side(model, batches):
        if i == 0 or i not in batches[0].lessons:
            continue
        attn, positions = all_rows[0].layer.self_attn, all_rows[0].positions
        text_keys, text_values = (_numpy(x[0, :, :chunk]) for x in batches[0].texts[i])
        queries = np.concatenate([_by_kv_head(f.lessons[i].queries, text_keys) for f in batches], 1)
        keys, values, errors = [], [], []
        for q, k, v in zip(queries, text_keys, text_values, strict=True):
            logits = q @ k.T * q.shape[-1] ** -0.5
            mass = np.logaddexp.reduce(logits, axis=-1)
            missing = mass * q.shape[-1] ** 0.5 - q @ k[0]
            key = k[0] + _solve(q.T @ q, q.T @ missing[:, None], SINK_RIDGE)[:, 0]
            keys.append(key)
            values.append(np.exp(logits - mass[:, None]).mean(axis=0) @ v)
        at_once = mx.array(np.array(keys, dtype=np.float32))[None, :, None]
        key = _heads(_unrotated(attn, at_once, positions[:1]))
        x = np.concatenate([_rows(rows.x, skip=1) for rows in all_rows])
        first = _rows(all_rows[0].x, skip=0)[:1]
        wanted = {"k": _before_norm(attn, key, first), "v": np.array(values).reshape(1, -1)}
        # The direction in which the first summary differs most from the others.
        apart = _solve(x.T @ x, first.T, EDIT_RIDGE)
        apart /= first @ apart
        for name, target in wanted.items():
            _add(attn, name, (apart @ (target - _projected(attn, name, first))).T)
        got = _numpy(all_rows[0].pair()[0][0, :, 0])
        for q, k, u in zip(queries, text_keys, got, strict=True):
            scale = q.shape[-1] ** -0.5
            errors.append(q @ u * scale - np.logaddexp.reduce(q @ k.T * scale, axis=-1))
        found[i] = float(np.mean(errors)), float(np.std(errors))
    return found


def _side_by_side(model, batches: Sequence[Features]) -> Iterator[tuple[int, list[Rows]]]:
    """The summary rows of several batches, layer by layer."""
    streams = [summary_stream(model, f.texts.__getitem__, f.chunks) for f in batches]
    for some in zip(*streams, strict=True):
        rows = [r for _, r in some]
        mx.eval([r.x for r in rows])
        yield some[0][0], rows


def _numpy(x: mx.array) -> Array:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def _rows(x: mx.array, skip: int = 1) -> Array:
    """(B, rows, hidden) as (all, hidden), without the first `skip` rows of each."""
    return _numpy(x[:, skip:]).reshape(-1, x.shape[-1])


def _heads(x: mx.array) -> Array:
    """(B, KV heads, rows, head_dim) as (all rows, KV heads, head_dim), the first of each left
    out unless it is alone."""
    some = x if x.shape[2] == 1 else x[:, :, 1:]
    y = _numpy(some).swapaxes(1, 2)
    return y.reshape(-1, *y.shape[2:])


def _pooled(x: mx.array, chunks: int, chunk: int) -> mx.array:
    """The mean of each chunk's keys or values: (B, KV heads, chunks, head_dim)."""
    B, heads, _, dim = x.shape
    return x[:, :, : chunks * chunk].reshape(B, heads, chunks, chunk, dim).mean(axis=3)


def _unrotated(attn, x: mx.array, positions: mx.array) -> mx.array:
    """Take RoPE at positions (rows,) back from (B, heads, rows, head_dim)."""
    back = _rotated(attn, x, -positions)
    # YaRN also scales, both ways.
    scale = mx.sqrt(_rotated(attn, back, positions).square().sum() / x.square().sum())
    return back / scale


def _rotated(attn, x: mx.array, positions: mx.array) -> mx.array:
    return attn.rotate_at(x.swapaxes(1, 2), positions)


def _by_kv_head(queries: mx.array, keys: Array) -> Array:
    """(B, heads, P, head_dim) as (KV heads, all that read it, head_dim)."""
    q = _numpy(queries)
    q = q.reshape(q.shape[0], len(keys), -1, q.shape[-1]).swapaxes(0, 1)
    return q.reshape(len(keys), -1, q.shape[-1])


def _louder(attn, queries, positions: mx.array, wanted: float, rng) -> Array:
    """What to add to keys, before RoPE, so that logits rise by `wanted`: (KV heads, head_dim).

    A query finds it at any distance: each is turned to a chunk drawn at random.
    """
    kv_heads = attn.n_kv_heads
    turned = []
    for q in queries:
        at = np.array(positions)[rng.integers(0, positions.size, q.shape[2])]
        turned.append(_by_kv_head(_rotated(attn, q, mx.array(-at)), np.empty(kv_heads)))
    added = []
    for q in np.concatenate(turned, axis=1):
        target = q.sum(axis=0)[:, None] * wanted * q.shape[-1] ** 0.5
        added.append(_solve(q.T @ q, target, LOUD_RIDGE)[:, 0])
    return np.array(added)


def _before_norm(attn, keys: Array, x: Array) -> Array:
    """Keys (rows, KV heads, head_dim) as the own k projection must give them, (rows, all).

    Where keys are normed only their direction is free: they get the size of the projection's.
    """
    if "k_norm" not in attn:
        return keys.reshape(len(keys), -1)
    size = np.sqrt((_projected(attn, "k", x) ** 2).mean())
    weight = _numpy(attn.k_norm.weight)
    keys = keys / np.where(weight == 0, np.inf, weight)  # what the norm drops is free
    keys = keys * size / np.sqrt((keys**2).mean(axis=-1, keepdims=True))
    return keys.reshape(len(keys), -1)


def _projected(attn, name: str, x: Array) -> Array:
    return _numpy(attn[f"{name}_proj_summary"](mx.array(x.astype(np.float32))))


def _add(attn, name: str, change: Array):
    """Add a matrix (out, in) to an own projection, as near as its rank allows."""
    own = attn[f"{name}_proj_summary"]
    if not isinstance(own, LoRALinear):
        own.weight = (own.weight + mx.array(change.astype(np.float32))).astype(own.weight.dtype)
        return
    whole = change.T / own.scale + _numpy(own.lora_a) @ _numpy(own.lora_b)
    left, sizes, right = np.linalg.svd(whole, full_matrices=False)
    rank, root = own.lora_a.shape[1], np.sqrt(sizes)
    own.lora_a = mx.array((left * root)[:, :rank].astype(np.float32))
    own.lora_b = mx.array((root[:, None] * right)[:rank].astype(np.float32))


def _solve(normal: Array, right: Array, ridge: float) -> Array:
    """Regularised least squares: (normal + ridge * mean diagonal) x = right."""
    n = len(normal)
    # Of a head whose queries are all zero nothing is asked.
    strength = max(ridge * np.trace(normal) / n, np.finfo(np.float32).tiny)
    return np.linalg.solve(normal + strength * np.eye(n), right)
