"""The decode and prefill kernels, executed on the CPU, against the definition.

The grids are covering designs: every two values of two factors meet in some case.
"""

import mlx.core as mx
import numpy as np
import pytest

from ksa_mlx.attention import decode, metal
from ksa_mlx.attention.prefill import layout, prefill_kernel
from ksa_mlx.naive import visibility

from . import metal_cpu
from ._kernels import (
    DTYPES,
    TOLERANCE,
    attend,
    close,
    covering,
    f64,
    name,
    over_slots,
    unpacked,
)
from .metal_cpu import lint

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

HEAD_DIMS = metal.HEAD_DIMS
SPLIT = 2 * decode.SLOTS_PER_SPLIT  # more slots are split


@pytest.fixture
def run():
    """Run kernels in the instrument: run(settings) is a context that gives the log of launches."""
    return lambda **settings: metal_cpu.running(reload=[metal], **settings)


# ---- Decode


def adversarial(kind, rng, dtype, B, heads, kv_heads, rows, dim, slots):
    """Queries, keys, values: random, all keys equal, or scores up to +-1e4, equal or far apart."""
    q = rng.standard_normal((B, heads, rows, dim)).astype(np.float32)
    k = rng.standard_normal((B, kv_heads, slots, dim)).astype(np.float32)
    v = rng.standard_normal((B, kv_heads, slots, dim)).astype(np.float32)
    if kind == "equal":
        k[:] = k[:, :, :1]
    if kind == "large":
        # A score is level * |q|^2 / sqrt(dim) exactly alike wherever the level is the same.
        q[:] = np.where(rng.random(q.shape[-1]) < 0.5, 1.0, -1.0)
        level = rng.integers(-4, 5, size=(B, kv_heads, slots, 1)) / 4
        k = (np.round(1e4 / dim**0.5) * level * q[:, :1, :1]).astype(np.float32)
    return [mx.array(x).astype(dtype) for x in (q, k, v)]


def spans(B, rows, slots, length):
    """Ragged ranges: sequence b sees about `length` slots in two segments, its last row of all."""
    out = []
    for b in range(B):
        n = max(length - 5 * b, min(length, 1))
        first = n // 3
        start = min(2 + b, slots - n)
        # Earlier rows see later summaries, as they know fewer, and less text.
        one = [(start + min(rows - 1 - r, first), start + first) for r in range(rows)]
        two = [
            (slots - n + first, max(slots - n + first, slots - (rows - 1 - r))) for r in range(rows)
        ]
        out.append([one, two])
    return out


def tables(ranges):
    """Bounds of the first and the second segment of `spans`."""
    return [decode.bounds([one[i] for one in ranges]) for i in range(2)]


def decode_case(run, dtype, dim, group, B, rows, keys, values, seed=0, **settings):
    rng = np.random.default_rng(seed)
    kv_heads = 2 if group <= 4 and keys < 300 else 1
    slots = keys + 7 * B + 3
    q, k, v = adversarial(
        values, rng, DTYPES[dtype], B, group * kv_heads, kv_heads, rows, dim, slots
    )
    ranges = spans(B, rows, slots, keys)
    with run(**settings) as log:
        got = decode.launch(q, [(k, v, table) for table in tables(ranges)], keys)
    close(got, over_slots(f64(q), f64(k), f64(v), ranges), TOLERANCE[dtype])
    return log, ranges


DECODE = covering(
    dtype=list(DTYPES),
    dim=list(HEAD_DIMS),
    group=[1, 2, 3, 4, 8, 16],
    B=[1, 2, 3],
    rows=[1, 2, 3, 5, 8],
    keys=[0, 1, 7, 8, 9, SPLIT - 1, SPLIT, SPLIT + 1, 1023, 1024, 1025],
    values=["random", "equal", "large"],
)


@pytest.mark.quick(6)
@pytest.mark.parametrize("case", DECODE, ids=name)
def test_decode(run, case):
    log, _ = decode_case(run, **case, check=False)
    calls = 2 if case["group"] * case["rows"] > (96 if case["dim"] <= 128 else 48) else 1
    assert len(log.launches) == calls * (2 if case["keys"] > SPLIT else 1)
    # The cache is never copied.
    assert all(set(launch.copies) <= {"queries"} for launch in log.launches)


def test_decode_of_the_longest_context(run):
    """What a query of the released 4B sees of 131072 tokens, for one KV head."""
    decode_case(run, "bfloat16", 128, 4, 1, 1, 17416, "random", check=False)


CHECKED = [
    {"dtype": "float32", "dim": 64, "group": 2, "B": 2, "rows": 1, "keys": 40, "values": "random"},
    {"dtype": "float16", "dim": 80, "group": 4, "B": 1, "rows": 2, "keys": 9, "values": "large"},
    {
        "dtype": "bfloat16",
        "dim": 128,
        "group": 4,
        "B": 3,
        "rows": 1,
        "keys": 37,
        "values": "random",
    },
    {"dtype": "bfloat16", "dim": 96, "group": 3, "B": 2, "rows": 5, "keys": 33, "values": "equal"},
    {"dtype": "float32", "dim": 256, "group": 2, "B": 1, "rows": 4, "keys": 20, "values": "random"},
    {
        "dtype": "float32",
        "dim": 32,
        "group": 1,
        "B": 2,
        "rows": 1,
        "keys": SPLIT + 1,
        "values": "random",
    },
    {
        "dtype": "float16",
        "dim": 64,
        "group": 16,
        "B": 1,
        "rows": 1,
        "keys": SPLIT + 3,
        "values": "random",
    },
]


@pytest.mark.quick(2)
@pytest.mark.parametrize("case", CHECKED, ids=name)
def test_decode_in_any_order(run, case):
    """No race, no access out of bounds, and the same to the bit in 8 orders of the threads."""
    decode_case(run, **case, orders=8)


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", CHECKED[:1] + CHECKED[4:], ids=name)
def test_decode_in_lockstep(run, case):
    """The lanes of a simdgroup come to each simd operation and barrier by the same path."""
    decode_case(run, **case, check="lockstep")


@pytest.mark.quick(2)
@pytest.mark.parametrize("settings", [{"contract": "fast"}, {"fast_noise": 4}], ids=name)
@pytest.mark.parametrize("case", CHECKED, ids=name)
def test_decode_with_other_arithmetic(run, case, settings):
    """Fused multiply-adds, and fast:: functions a few units in the last place off."""
    decode_case(run, **case, check=False, **settings)


def test_a_single_visible_key_gives_its_value(run):
    rng = np.random.default_rng(3)
    q, k, v = adversarial("large", rng, mx.float32, 1, 2, 1, 1, 64, 50)
    with run(check=False):
        got = decode.launch(q, [(k, v, decode.bounds([[(17, 18)]]))], 1)
    assert mx.array_equal(got, mx.broadcast_to(v[:, :, 17:18], got.shape))


def visible_slots(ranges, shape):
    """Which slots any row of a sequence sees, (B, KV heads, slots)."""
    seen = np.zeros(shape, bool)
    for b, segments in enumerate(ranges):
        for rows in segments:
            for start, stop in rows:
                seen[b, :, start:stop] = True
    return seen


@pytest.mark.quick(3)
@pytest.mark.parametrize("rows, group", [(1, 4), (3, 2), (8, 4)])
@pytest.mark.parametrize("B, keys", [(1, 40), (2, 70), (2, SPLIT + 40)])
def test_decode_loads_what_is_visible_once(run, B, keys, rows, group):
    log, ranges = decode_case(run, "float32", 64, group, B, rows, keys, "random")
    launch = log.launches[0]
    assert [one.kernel for one in log.launches] == ["ksa_decode", "ksa_combine"][
        : 1 + (keys > SPLIT)
    ]
    for kind in ("keys", "values"):
        for i, one in enumerate((kind, f"more_{kind}")):
            buffer = launch.buffers[one]
            seen = visible_slots([of[i : i + 1] for of in ranges], buffer.shape[:3])
            assert (buffer.touched == seen[..., None]).all()
            assert buffer.loaded_elements == seen.sum() * 64


def test_decode_parts_are_written_and_read_once(run):
    log, _ = decode_case(run, "float32", 64, 4, 2, 1, SPLIT + 40, "random")
    parts = log.launches[0].buffers["out"]
    assert parts.stored_elements == np.prod(parts.shape)
    assert log.launches[1].buffers["out"].stored_elements == 2 * 8 * 64


# ---- Decode over quantised caches


def quantised_case(run, dtype, dim, group_size, bits, summary_bits, rows, B, keys, **settings):
    """Text of one buffer and, unless summary_bits is None, summaries of another; 16: plain."""
    rng = np.random.default_rng(dim + keys)
    kv_heads, group, slots = 2, 2, keys + 20

    def buffer(bits):
        x = mx.array(rng.standard_normal((B, kv_heads, slots, dim)).astype(np.float32))
        x = x.astype(DTYPES[dtype])
        return x if bits == 16 else tuple(mx.quantize(x, group_size=group_size, bits=bits))

    q = mx.array(rng.standard_normal((B, kv_heads * group, rows, dim)).astype(np.float32))
    q = q.astype(DTYPES[dtype])
    text, ranges = (buffer(bits), buffer(bits)), [one[:1] for one in spans(B, rows, slots, keys)]

    def held(x, bits):
        return f64(x) if bits == 16 else unpacked(*x, bits)

    k, v = (held(x, bits) for x in text)
    second, seen = [], [list(one) for one in ranges]
    if summary_bits is not None:
        summaries = buffer(summary_bits), buffer(summary_bits)
        other = [one[1:] for one in spans(B, rows, slots, max(keys // 2, 1))]
        second = [(*summaries, decode.bounds([one[0] for one in other]))]
        k, v = (
            np.concatenate([x, held(y, summary_bits)], axis=2)
            for x, y in zip((k, v), summaries, strict=False)
        )
        for one, more in zip(seen, other, strict=False):
            one += [[(slots + a, slots + b) for a, b in part] for part in more]
    with run(**settings) as log:
        first = (*text, decode.bounds([one[0] for one in ranges]))
        got = decode.launch(q, [first, *second], 2 * keys)
    close(got, over_slots(f64(q), k, v, seen), TOLERANCE[dtype])
    return log, ranges, (other if second else None)


QUANTISED = [
    case
    for case in covering(
        dtype=list(DTYPES),
        dim=[32, 64, 96, 128, 256],
        group_size=[32, 64],
        bits=[4, 8, 16],
        summary_bits=[4, 8, 16, None],
        rows=[1, 3, 8],
        B=[1, 2],
        keys=[1, 9, 40, SPLIT],
    )
    if case["dim"] % case["group_size"] == 0 and (case["bits"], case["summary_bits"]) != (16, None)
]


@pytest.mark.quick(4)
@pytest.mark.parametrize("case", QUANTISED, ids=name)
def test_quantised_decode(run, case):
    log, *_ = quantised_case(run, **case, check=False)
    assert len(log.launches) <= 2
    assert not any(launch.copies for launch in log.launches)


@pytest.mark.quick(2)
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("bits, summary_bits", [(8, 4), (4, None), (16, 8)])
@pytest.mark.parametrize("dim, group_size", [(64, 32), (128, 64)])
def test_quantised_decode_loads_what_is_visible_once(
    run, dim, group_size, bits, summary_bits, rows
):
    log, ranges, other = quantised_case(
        run, "float16", dim, group_size, bits, summary_bits, rows, 2, 30, orders=2
    )
    buffers = log.launches[0].buffers
    for prefix, width, spans in (("", bits, ranges), ("more_", summary_bits, other)):
        if width is None:
            continue
        for kind in ("key", "value"):
            one = buffers[f"{prefix}{kind}s"]
            seen = visible_slots(spans, one.shape[:3])
            assert (one.touched == seen[..., None]).all()
            assert one.loaded_bytes == seen.sum() * dim * width // 8
            if width < 16:
                for what in ("scales", "biases"):
                    assert (
                        buffers[f"{prefix}{kind}_{what}"].loaded_elements
                        == seen.sum() * dim / group_size
                    )


def test_quantised_decode_refuses_other_formats(run):
    x = mx.zeros((1, 1, 64, 64))
    packed = mx.quantize(x, group_size=64, bits=2)
    with pytest.raises(ValueError, match="found 2 bits"):
        decode.launch(x[:, :, :1], [(packed, packed, decode.bounds([[(0, 1)]]))], 1)
    packed = mx.quantize(x.astype(mx.float16), group_size=64, bits=8)
    with pytest.raises(ValueError, match=r"found mlx.core.float16 scales"):
        decode.launch(x[:, :, :1], [(packed, packed, decode.bounds([[(0, 1)]]))], 1)


# ---- Prefill


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
def test_prefill(run, case):
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
def test_prefill_in_any_order(run, case):
    launch, *_ = prefill_case(run, **case, orders=8)
    assert launch.threadgroup_bytes <= 32768


@pytest.mark.quick(1)
@pytest.mark.parametrize("case", PREFILL_CHECKED[:2], ids=name)
def test_prefill_in_lockstep(run, case):
    prefill_case(run, **case, check="lockstep")


@pytest.mark.quick(1)
@pytest.mark.parametrize("settings", [{"contract": "fast"}, {"fast_noise": 4}], ids=name)
@pytest.mark.parametrize("case", PREFILL_CHECKED, ids=name)
def test_prefill_with_other_arithmetic(run, case, settings):
    prefill_case(run, **case, check=False, **settings)


@pytest.mark.parametrize("case", PREFILL_CHECKED, ids=name)
def test_prefill_visits_the_tiles_that_are_seen(run, case):
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
def test_prefill_threadgroup_memory(run, dim):
    launch, *_ = prefill_case(run, "float32", dim, 1, 1, 1, 0, 8, 1, 1, check=False)
    assert launch.threadgroup_bytes <= 32768


# ---- The sources


def every_kernel(dtype, dim, slots):
    """Call each kernel in each of its forms."""
    dtype = DTYPES[dtype]

    def zeros(heads, n):
        return mx.zeros((1, heads, n, dim), dtype=dtype)

    cache = zeros(1, slots)
    for heads, rows, visited in ((1, 1, 1), (1, 8, 1), (4, 8, 1), (1, 1, SPLIT + 1)):
        bounds = decode.bounds([[(0, 1)] * rows])
        decode.launch(zeros(heads, rows), [(cache, cache, bounds)], visited)
        if dim % 32 == 0:
            packed = mx.quantize(cache, group_size=32, bits=4)
            wide = mx.quantize(cache, group_size=32, bits=8)
            more = cache, cache, bounds
            decode.launch(zeros(heads, rows), [(packed, packed, bounds)], visited)
            decode.launch(zeros(heads, rows), [(wide, wide, bounds), more], visited)
    where = layout([9], [0], [0], [1], 4, 1, 2)
    prefill_kernel(zeros(1, 9), zeros(1, 9), zeros(1, 9), cache, cache, where)


LINTED = [("float32", 32, 8), ("bfloat16", 128, 300), ("float16", 256, 300), ("bfloat16", 80, 8)]


@pytest.mark.slow
@pytest.mark.parametrize("dtype, dim, slots", LINTED)
def test_lint(run, monkeypatch, dtype, dim, slots):
    """Metal would take the sources; no input is so small that MLX passes it as `constant`."""
    seen = set()

    def check(self, *, inputs, output_shapes, output_dtypes, template, **_):
        kernel = self.for_types(inputs, output_dtypes, template)
        if kernel not in seen:
            seen.add(kernel)
            assert lint.problems(kernel) == []
        assert not any(a.what == "data" and " constant " in a.declaration for a in kernel.arguments)
        return [mx.zeros(s, dtype=d) for s, d in zip(output_shapes, output_dtypes, strict=False)]

    monkeypatch.setattr(metal_cpu.metal_kernel, "__call__", check)
    with run():
        every_kernel(dtype, dim, slots)
    assert {k.name for k in seen} >= {"ksa_decode", "ksa_combine", "ksa_prefill"}
