"""What the tests of the kernels share: attention over slots in float64, and covering grids."""

import functools
import itertools

import mlx.core as mx
import numpy as np

from ksa_mlx.attention import metal

from . import metal_cpu

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
# Of the largest value. The outputs of half types are rounded once.
TOLERANCE = {"float32": 1e-5, "float16": 1e-3, "bfloat16": 8e-3}


def covering(**factors):
    """A small list of cases, dicts, in which every two values of two factors meet at least once."""
    names, rng = list(factors), np.random.default_rng(0)
    left = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x in range(len(factors[a]))
        for y in range(len(factors[b]))
    }
    cases = []
    while left:
        a, x, b, y = min(left)
        best, most = None, -1
        for _ in range(30):
            case = {n: int(rng.integers(len(factors[n]))) for n in names}
            case[a], case[b] = x, y
            met = sum((p, case[p], q, case[q]) in left for p, q in itertools.combinations(names, 2))
            if met > most:
                best, most = case, met
        left -= {(p, best[p], q, best[q]) for p, q in itertools.combinations(names, 2)}
        cases.append({n: factors[n][i] for n, i in best.items()})
    return cases


def name(case: dict) -> str:
    return "-".join(f"{k}={v}" for k, v in case.items())


def f64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


def unpacked(packed: mx.array, scales: mx.array, biases: mx.array, bits: int) -> np.ndarray:
    """What mlx's affine format stands for: scale * element + bias, the low bits of a byte first."""
    elements = np.array(packed).view(np.uint8)
    if bits == 4:
        elements = np.stack([elements & 15, elements >> 4], axis=-1)
    elements = elements.reshape(*scales.shape, -1).astype(np.float64)
    values = elements * f64(scales)[..., None] + f64(biases)[..., None]
    return values.reshape(*scales.shape[:-1], -1)


def attend(query, keys, values):
    """The definition: one query (head_dim,) over keys and values (n, head_dim), in float64."""
    if not len(keys):
        return np.zeros(values.shape[1])
    scores = keys @ query * query.shape[0] ** -0.5
    weights = np.exp(scores - scores.max())
    return weights @ values / weights.sum()


def over_slots(queries, keys, values, ranges):
    """Attention of queries (B, heads, L, D) over ranges[b][segment][row] of the slots of keys and
    values (B, KV heads, slots, D). All arrays are numpy's, in float64.
    """
    q, k, v = queries, keys, values
    out, group = np.zeros(q.shape), q.shape[1] // k.shape[1]
    for b, h, r in np.ndindex(q.shape[:3]):
        slots = np.concatenate([np.arange(*rows[r]) for rows in ranges[b]])
        out[b, h, r] = attend(q[b, h, r], k[b, h // group, slots], v[b, h // group, slots])
    return out


def close(got: mx.array, expected: np.ndarray, tolerance: float):
    """All finite, and within `tolerance` of the largest value."""
    got = f64(got)
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    size = max(np.abs(expected).max(), 1e-3) if expected.size else 1
    worst = np.abs(got - expected).max() / size
    assert worst <= tolerance, f"off by {worst:.3g} of the largest value, {tolerance} allowed"


# run(settings): a context in which kernels run in the instrument; it gives the log of launches.
run = functools.partial(metal_cpu.running, reload=[metal])
