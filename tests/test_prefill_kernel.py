"""The prefill kernel, executed on the CPU, against the definition."""

import mlx.core as mx
import numpy as np
import pytest

from ksa_mlx.attention import metal
from ksa_mlx.attention.prefill import layout, prefill_kernel
from ksa_mlx.naive import visibility

from . import metal_cpu
from ._kernels import DTYPES, TOLERANCE, attend, close, covering, f64, name, run

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

HEAD_DIMS = metal.HEAD_DIMS


def prefill_case(run, dtype, dim, group, B, length, offset, chunk, s, window, seed=0, **settings):
    """A ragged batch: each sequence starts 3 tokens earlier, with 2 rows less, than the last."""
    rng = np.random.default_rng(seed)
    offsets = [max(0, offset - 3 * b) for b in range(B)]
    rows = [max(1, length - 2 * b) for b in range(B)]
    starts = [max(0, o // chunk - window) * chunk for o in offsets]
    ends = [o + n for o, n in zip(offsets, rows, strict=False)]
    left = [max(0, (end - 1) // chunk - window) * s + b for b, end in enumerate(ends)]

    def random(heads, n):
        x = rng.standard_normal((B, heads, n, dim)).astype(np.float32)
        return mx.array(x).astype(DTYPES[dtype])

    q = random(group, length)
    N = max(end - start for end, start in zip(ends, starts, strict=False))
    text = random(1, N), random(1, N)
    cache = random(1, max(left) + 4), random(1, max(left) + 4)
    with run(**settings) as log:
        where = layout(rows, offsets, starts, left, chunk, s, window)
        got = prefill_kernel(q, *text, *cache, where)

    expected = np.zeros(q.shape)
    (tk, tv), (ck, cv), queries = map(f64, text), map(f64, cache), f64(q)
    visible = []
    for b in range(B):
        sees = visibility(ends[b], chunk, s, window)[offsets[b] : ends[b]]
        visible.append(sees)
        for h, r in np.ndindex(group, rows[b]):
            of_text = np.flatnonzero(sees[r, : ends[b]]) - starts[b]
            slots = left[b] - 1 - np.flatnonzero(sees[r, ends[b] :])
            keys = np.concatenate([tk[b, 0, of_text], ck[b, 0, slots]])
            values = np.concatenate([tv[b, 0, of_text], cv[b, 0, slots]])
            expected[b, h, r] = attend(queries[b, h, r], keys, values)
    close(got, expected, TOLERANCE[dtype])
    assert len(log.launches) == 1
    return log.last, visible, ends


PREFILL = covering(
    dtype=list(DTYPES),
    dim=list(HEAD_DIMS),
    group=[1, 2, 4, 16],
    B=[1, 2, 3],
    length=[1, 7, 8, 9, 31, 32, 33, 64, 65],
    offset=[0, 1, 15, 16, 17, 63, 130],
    chunk=[1, 4, 8, 9],
    s=[1, 2],
    window=[0, 1, 3, 8],
)


@pytest.mark.quick(6)
@pytest.mark.parametrize("case", PREFILL, ids=name)
def test_prefill(case):
    prefill_case(run, **case, check=False)


PREFILL_CHECKED = [
    {
        "dtype": "float32",
        "dim": 32,
        "group": 2,
        "B": 2,
        "length": 33,
        "offset": 17,
        "chunk": 8,
        "s": 1,
        "window": 1,
    },
    {
        "dtype": "bfloat16",
        "dim": 64,
        "group": 1,
        "B": 1,
        "length": 70,
        "offset": 0,
        "chunk": 4,
        "s": 2,
        "window": 3,
    },
    {
        "dtype": "float16",
        "dim": 80,
        "group": 1,
        "B": 2,
        "length": 9,
        "offset": 40,
        "chunk": 8,
        "s": 1,
        "window": 0,
    },
    {
        "dtype": "bfloat16",
        "dim": 256,
        "group": 1,
        "B": 1,
        "length": 18,
        "offset": 30,
        "chunk": 8,
        "s": 1,
        "window": 2,
    },
]


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", PREFILL_CHECKED, ids=name)
def test_prefill_in_any_order(case):
    launch, *_ = prefill_case(run, **case, orders=8)
    assert launch.threadgroup_bytes <= 32768


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", PREFILL_CHECKED[:2], ids=name)
def test_prefill_in_lockstep(case):
    prefill_case(run, **case, check="lockstep")


@pytest.mark.quick(1)
@pytest.mark.parametrize("settings", [{"contract": "fast"}, {"fast_noise": 4}], ids=name)
@pytest.mark.parametrize("case", PREFILL_CHECKED, ids=name)
def test_prefill_with_other_arithmetic(case, settings):
    prefill_case(run, **case, check=False, **settings)


@pytest.mark.parametrize("case", PREFILL_CHECKED, ids=name)
def test_prefill_visits_the_tiles_that_are_seen(case):
    """No tile is visited that nobody sees, and of the others no key is loaded that nobody sees."""
    launch, visible, ends = prefill_case(run, **case)
    rows, width = 32, 32 if case["dim"] <= 128 else 16
    tiles = loaded_text = loaded_summaries = 0
    for sees, end in zip(visible, ends, strict=False):
        for first in range(0, len(sees), rows):
            seen = sees[first : first + rows].any(axis=0)
            text, summaries = seen[:end].sum(), seen[end:].sum()
            tiles += -(-text // width) - (-summaries // width)
            loaded_text += text * case["dim"] * case["group"]
            loaded_summaries += summaries * case["dim"] * case["group"]
    multiplies = 4 * 2 * (case["dim"] // 8) * (width // 8)  # of 4 simdgroups, for scores and values
    assert launch.matrix_multiplies == tiles * multiplies * case["group"]
    for kind in ("keys", "values"):
        assert launch.buffers[kind].loaded_elements == loaded_text
        assert launch.buffers[f"summary_{kind}"].loaded_elements == loaded_summaries


@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_prefill_threadgroup_memory(dim):
    launch, *_ = prefill_case(run, "float32", dim, 1, 1, 1, 0, 8, 1, 1, check=False)
    assert launch.threadgroup_bytes <= 32768
