"""The decode kernel, executed on the CPU, against the definition.

The grids are covering designs: every two values of two factors meet in some case.
"""

import mlx.core as mx
import numpy as np
import pytest

from ksa_mlx.attention import kernel, metal
from ksa_mlx.attention.kernel import Variant
from ksa_mlx.cache.storage import PLAIN, Affine, Segment

from . import metal_cpu
from ._kernels import (
    DTYPES,
    TOLERANCE,
    close,
    covering,
    f64,
    name,
    over_slots,
    run,
    unpacked,
)

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

HEAD_DIMS = metal.HEAD_DIMS
SPLIT = kernel.KEYS * kernel.SIMDGROUPS  # more slots are split
TILE = 16
USUAL = Variant()


def adversarial(kind, rng, dtype, heads, kv_heads, rows, dim, slots):
    """Queries, keys, values of one sequence: random, all keys equal, or scores up to +-1e4, equal
    or far apart."""
    q = rng.standard_normal((1, heads, rows, dim)).astype(np.float32)
    k = rng.standard_normal((1, kv_heads, slots, dim)).astype(np.float32)
    v = rng.standard_normal((1, kv_heads, slots, dim)).astype(np.float32)
    if kind == "equal":
        k[:] = k[:, :, :1]
    if kind == "large":
        # A score is level * |q|^2 / sqrt(dim) exactly alike wherever the level is the same.
        q[:] = np.where(rng.random(dim) < 0.5, 1.0, -1.0)
        level = rng.integers(-4, 5, size=(1, kv_heads, slots, 1)) / 4
        k = (np.round(1e4 / dim**0.5) * level * q[:, :1, :1]).astype(np.float32)
    return [mx.array(x).astype(dtype) for x in (q, k, v)]


def held(x, bits, group_size):
    """Keys or values as a cache of so many bits holds them (16: plain), and what they stand for."""
    if bits == 16:
        return x, f64(x)
    packed = tuple(mx.quantize(x, group_size=group_size, bits=bits))
    return packed, unpacked(*packed, bits)


def form(keys, values, group_size):
    """The form of keys and values of so many bits."""
    return PLAIN if keys == 16 else Affine(keys, group_size, values)


def launch(queries, caches, ranges, variant=USUAL):
    """The kernel over caches[b][i] = (keys, values, form), and ranges[b][i][position] of them."""
    rows = [[Segment(k, v, 0, 1, f) for k, v, f in own] for own in caches]
    return kernel.decode_kernel(queries, rows, ranges, variant)


def spans(rows, slots, length):
    """About `length` slots in two ranges of one buffer; the last position sees all of them."""
    first = length // 3
    start = slots - length - 1
    # Earlier positions see later summaries, as they know fewer, and less text.
    one = [(start + min(rows - 1 - r, first), start + first) for r in range(rows)]
    low = slots - length + first
    return one, [(low, max(low, slots - (rows - 1 - r))) for r in range(rows)]


def decode_case(
    run, dtype, dim, group, B, rows, keys, values, own=True, formats=None, group_size=32, seed=0,
    variant=USUAL, **settings,
):  # fmt: skip
    """Decode a ragged batch and compare. Two ranges of one buffer each; or with `formats`, one or
    two (bits of keys, bits of values), a range of as many buffers. Returns the log, and for each
    sequence the ranges of its caches."""
    rng = np.random.default_rng(seed)
    kv_heads = 2 if group <= 4 and keys < 300 else 1
    queries, caches, ranges, exact = [], [], [], []
    most = keys + 7 * B + TILE
    for b in range(B):
        n = max(keys - 5 * b, min(keys, 1))
        slots = most if not own else n + 3 * b + TILE
        kind = adversarial(values, rng, DTYPES[dtype], group * kv_heads, kv_heads, rows, dim, slots)
        queries.append(kind[0])
        parts = spans(rows, slots, n)
        if formats is None:
            caches.append([(*kind[1:], PLAIN)] * 2)
            ranges.append(list(parts))
            seen = f64(kind[1]), f64(kind[2]), [list(parts)]
        else:
            pairs, some = [], []
            for i, bits in enumerate(formats):
                x = adversarial(
                    values, rng, DTYPES[dtype], group, kv_heads, rows, dim, slots + 4 * i
                )
                pairs.append([held(y, n, group_size) for y, n in zip(x[1:], bits, strict=True)])
                some.append(parts[i] if len(formats) == 2 else parts[1])
            forms = [form(*bits, group_size) for bits in formats]
            caches.append([(*(x for x, _ in p), f) for p, f in zip(pairs, forms, strict=True)])
            ranges.append(some)
            k, v = (np.concatenate([p[i][1] for p in pairs], axis=2) for i in range(2))
            moved = [[(slots * i + a, slots * i + z) for a, z in one] for i, one in enumerate(some)]
            seen = k, v, [moved]
        exact.append(over_slots(f64(kind[0]), *seen))
    if not own:
        both = range(len(caches[0]))
        caches = [
            [
                (*(joined([of[i][j] for of in caches]) for j in range(2)), caches[0][i][2])
                for i in both
            ]
        ]
    with run(**settings) as log:
        got = launch(mx.concatenate(queries), caches, ranges, variant)
    close(got, np.concatenate(exact), TOLERANCE[dtype])
    return log, ranges


def joined(x):
    """Several sequences' keys or values in one buffer."""
    if isinstance(x[0], mx.array):
        return mx.concatenate(x)
    return tuple(mx.concatenate(planes) for planes in zip(*x, strict=True))


DECODE = covering(
    dtype=list(DTYPES),
    dim=list(HEAD_DIMS),
    group=[1, 2, 3, 4, 8, 16],
    B=[1, 2, 3, 12],
    rows=[1, 2, 3, 5, 8],
    keys=[0, 1, TILE - 1, TILE, TILE + 1, SPLIT - 1, SPLIT, SPLIT + 1, 1023, 1025],
    values=["random", "equal", "large"],
    own=[True, False],
    variant=[Variant(), Variant(1, 3), Variant(2, 1), Variant(4, 5)],
)


@pytest.mark.quick(6)
@pytest.mark.parametrize("case", DECODE, ids=name)
def test_decode(case):
    log, _ = decode_case(run, **case, check=False)
    # Two buffers of plain keys and values a sequence and cache, and two caches here.
    launches = -(-case["B"] // 7) if case["own"] else 1
    names = [launch.kernel for launch in log.launches]
    assert sum(name.startswith("ksa_decode") for name in names) == launches
    # The cache is never copied; parts of the queries may be.
    assert all(set(launch.copies) <= {"queries"} for launch in log.launches)


def test_decode_of_the_longest_context():
    """What a query of the released 4B sees of 131072 tokens, for one KV head."""
    decode_case(run, "bfloat16", 128, 4, 1, 1, 17416, "random", check=False)


SMALL = {"B": 1, "rows": 1, "values": "random"}
CHECKED = [
    {**SMALL, "dtype": "float32", "dim": 64, "group": 2, "B": 2, "keys": 40},
    {**SMALL, "dtype": "float16", "dim": 80, "group": 4, "rows": 2, "keys": 9, "values": "large"},
    {**SMALL, "dtype": "bfloat16", "dim": 128, "group": 4, "B": 3, "keys": 37},
    {**SMALL, "dtype": "bfloat16", "dim": 96, "group": 3, "B": 2, "rows": 5, "keys": 33},
    {**SMALL, "dtype": "float32", "dim": 256, "group": 2, "rows": 4, "keys": 20, "own": False},
    {**SMALL, "dtype": "float32", "dim": 32, "group": 1, "B": 2, "keys": SPLIT + 1},
    {**SMALL, "dtype": "float16", "dim": 64, "group": 16, "keys": SPLIT + 3, "own": False},
    {**SMALL, "dtype": "float16", "dim": 128, "group": 4, "keys": 40, "formats": [(4, 4)]},
    {**SMALL, "dtype": "float32", "dim": 96, "group": 2, "keys": 20, "formats": [(8, 4), (16, 16)]},
]  # fmt: skip


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", CHECKED, ids=name)
def test_decode_in_any_order(case):
    """No race, no access out of bounds, and the same to the bit in 8 orders of the threads."""
    decode_case(run, **case, orders=8)


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", [CHECKED[0], CHECKED[4], CHECKED[7]], ids=name)
def test_decode_in_lockstep(case):
    """The lanes of a simdgroup come to each simd operation and barrier by the same path."""
    decode_case(run, **case, check="lockstep")


@pytest.mark.quick(2)
@pytest.mark.parametrize("settings", [{"contract": "fast"}, {"fast_noise": 4}], ids=name)
@pytest.mark.parametrize("case", CHECKED, ids=name)
def test_decode_with_other_arithmetic(case, settings):
    """Fused multiply-adds, and fast:: functions a few units in the last place off."""
    decode_case(run, **case, check=False, **settings)


def test_a_single_visible_key_gives_its_value():
    q, k, v = adversarial("large", np.random.default_rng(3), mx.float32, 2, 1, 1, 64, 50)
    with run(check=False):
        got = launch(q, [[(k, v, PLAIN)]], [[[(17, 18)]]])
    assert mx.array_equal(got, mx.broadcast_to(v[:, :, 17:18], got.shape))


QUANTISED = [
    case
    for case in covering(
        dtype=list(DTYPES),
        dim=[32, 64, 96, 128, 256],
        group=[1, 4, 6],
        group_size=[32, 64],
        formats=[[(4, 4)], [(8, 8)], [(4, 4), (8, 8)], [(8, 4), (16, 16)], [(16, 16), (4, 8)]],
        rows=[1, 3, 8],
        B=[1, 2, 5],
        own=[True, False],
        keys=[1, 9, 40, SPLIT + 1],
        values=["random"],
    )
    if case["dim"] % case["group_size"] == 0
]


@pytest.mark.quick(4)
@pytest.mark.parametrize("case", QUANTISED, ids=name)
def test_quantised_decode(case):
    log, _ = decode_case(run, **case, check=False)
    buffers = sum(2 if bits == (16, 16) else 6 for bits in case["formats"])
    launches = -(-case["B"] // (28 // buffers)) if case["own"] else 1
    names = [launch.kernel for launch in log.launches]
    assert sum(name.startswith("ksa_decode") for name in names) == launches


def seen_slots(ranges, shape):
    """Which slots of a buffer any position sees, (1, KV heads, slots, 1)."""
    seen = np.zeros(shape, bool)
    for start, stop in ranges:
        seen[:, :, start:stop] = True
    return seen[..., None]


@pytest.mark.quick(3)
@pytest.mark.parametrize("rows, group", [(1, 4), (2, 2), (1, 3)])
@pytest.mark.parametrize("formats", [[(16, 16)], [(4, 4)], [(8, 4), (16, 16)]])
def test_decode_loads_what_is_visible_once(formats, rows, group):
    """The last tile begins earlier if there is too little for it."""
    keys = 10 * TILE + 3
    log, ranges = decode_case(
        run, "float32", 64, group, 2, rows, keys, "random", formats=formats, variant=Variant(4)
    )
    launch = log.launches[0]
    for b, own in enumerate(ranges):
        for i, (prefix, bits) in enumerate(zip(("", "more_"), formats, strict=False)):
            visible = max(stop for _, stop in own[i]) - min(start for start, _ in own[i])
            for kind, width in zip(("keys", "values"), bits, strict=True):
                buffer = launch.buffers[f"{prefix}{kind}_{b}"]
                seen = seen_slots(own[i], buffer.shape[:3])
                assert (buffer.touched == seen).all()
                once = 2 * visible * 64 * (4 if width == 16 else width / 8)
                assert once <= buffer.loaded_bytes <= once * (1 + TILE / visible)


def test_decode_parts_are_written_and_read_once():
    case = {**SMALL, "dtype": "float32", "dim": 64, "group": 4, "keys": SPLIT + 40, "B": 2}
    log, _ = decode_case(run, **case)
    assert [launch.kernel for launch in log.launches] == ["ksa_decode_2_plain_plain", "ksa_combine"]
    parts = log.launches[0].buffers["out"]
    assert parts.stored_elements == np.prod(parts.shape)
    assert log.launches[1].buffers["out"].stored_elements == 2 * 4 * 64


def test_what_the_kernel_does_not_read_is_refused():
    x = mx.zeros((1, 1, 64, 64))
    for bits, held, expected in (
        (2, x, "found 2 bit/64, expected 4 or 8"),
        (8, x.astype(mx.float16), r"found mlx.core.float16 scales"),
    ):
        packed = mx.quantize(held, group_size=64, bits=bits)
        with pytest.raises(ValueError, match=expected):
            launch(x[:, :, :1], [[(packed, packed, Affine(bits, 64))]], [[[(0, 1)]]])
    short = x[:, :, :15]
    with pytest.raises(ValueError, match="found 15 slots, expected at least 16"):
        launch(x[:, :, :1], [[(short, short, PLAIN)]], [[[(0, 1)]]])
    with pytest.raises(ValueError, match="found 9 query rows"):
        launch(x[:, :, :9], [[(x, x, PLAIN)]], [[[(0, 1)] * 9]])


@pytest.mark.parametrize("letter, most", [("g", 5), ("s", 20), ("d", 40), ("?", 20)])
def test_splits_follow_keys_and_cores(monkeypatch, letter, most):
    """At least 64 keys a simdgroup, at most 4 threadgroups a core."""
    info = {"architecture": f"applegpu_g15{letter}"}
    monkeypatch.setattr(mx, "device_info", lambda: info)
    kernel.cores.cache_clear()
    try:
        assert kernel._splits(17416, 8, 64) == min(most, 35)
        assert kernel._splits(512, 8, 64) == 1 and kernel._splits(513, 8, 64) == 2
        assert kernel._splits(17416, 8 * 40, 64) <= 2
    finally:
        kernel.cores.cache_clear()


LENGTHS = 8 * TILE, 40 * TILE


def counted(dim, group, bits, dtype="bfloat16"):
    """What each further key costs in a long range, of one KV head and all its query heads; and
    how often each element of keys and values is loaded."""
    logs, loaded = [], []
    for n in LENGTHS:
        k = mx.zeros((1, 1, n + 5, dim), DTYPES[dtype])
        cache = held(k, bits, 64)[0]
        one = cache, cache, form(bits, bits, 64)
        with run() as log:
            queries = mx.zeros((1, group, 1, dim), DTYPES[dtype])
            launch(queries, [[one]], [[[(3, n + 3)]]], Variant(splits=1))
        logs.append(log.launches)
        loaded.append([log.last.buffers[x] for x in ("keys_0", "values_0")])
    more = LENGTHS[1] - LENGTHS[0]
    for short, long in zip(*loaded, strict=True):
        once = more * dim * (16 if bits == 16 else bits) / 8
        assert once <= long.loaded_bytes - short.loaded_bytes <= 1.03 * once
    return metal_cpu.per_key(*logs, keys=more)


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dim, group", [(128, 4), (64, 4), (256, 2)])
def test_what_a_key_costs(dim, group, bits):
    """Shuffles by a computed index take 28 cycles on M1, sums over a simdgroup 14 (docs/kernels.md)."""
    cost = counted(dim, group, bits)
    assert cost["reductions"] == cost["lane_shuffles"] == cost["threadgroup_barriers"] == 0
    assert cost["shuffles"] + cost["broadcasts"] <= 7
    assert cost["exponentials"] <= 0.6
    assert cost["votes"] <= 1 / TILE
