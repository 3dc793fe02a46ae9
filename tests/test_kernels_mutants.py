"""Kernels that are slightly wrong are noticed: each line of the list breaks one thing."""

from contextlib import contextmanager

import pytest

from ksa_mlx.attention import metal

from . import metal_cpu
from .test_kernels import decode_case, prefill_case, quantised_case

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SHARED = {
    "dtype": "float32",
    "dim": 64,
    "group": 2,
    "B": 2,
    "rows": 2,
    "keys": 70,
    "values": "random",
}
TILED = {**SHARED, "group": 4, "rows": 4}
SPLIT = {**SHARED, "keys": 300, "rows": 1}
LARGE = {**SHARED, "values": "large"}
PREFILL = {
    "dtype": "float32",
    "dim": 32,
    "group": 2,
    "B": 2,
    "length": 33,
    "offset": 17,
    "chunk": 8,
    "s": 1,
    "window": 1,
}
QUANTISED = {
    "dtype": "float32",
    "dim": 64,
    "group_size": 32,
    "bits": 4,
    "summary_bits": 8,
    "rows": 1,
    "B": 2,
    "keys": 30,
}

# The file; what is replaced, which time it occurs (from 0), by what; the case that notices.
MUTANTS = {
    "no barrier before a tile is overwritten": ("decode.h", BARRIER, 0, "", TILED),
    "no barrier before a tile is read": ("decode.h", BARRIER, 1, "", TILED),
    "no barrier before statistics are read": ("decode.h", BARRIER, 2, "", SHARED),
    "no barrier before sums are read": ("decode.h", BARRIER, 3, "", SHARED),
    "no barrier before sums are overwritten": ("decode.h", BARRIER, 4, "", SHARED),
    "a barrier without memory": ("decode.h", "mem_threadgroup", 1, "mem_none", TILED),
    "a barrier of the simdgroup": ("decode.h", "threadgroup_barrier", 3, "simdgroup_barrier", SHARED),
    "one slot too many": ("decode.h", "slot < to", 0, "slot <= to", SHARED),
    "one slot too few": ("decode.h", "slot < to", 0, "slot < to - 1", SHARED),
    "the wrong rows see": ("decode.h", "first % count", 0, "0 % count", dict(TILED, rows=5)),
    "the last slot hidden": ("decode.h", "slot < sees.y", 0, "slot < sees.y - 1", SHARED),
    "no fading": ("decode.h", "fast::exp2(rows.best[c] - best)", 0, "1.0f", SHARED),
    "infinite start": ("common.h", "-3.402823466e+38f", 0, "-INFINITY", dict(SHARED, keys=1)),
    "scores overflow": ("decode.h", "fast::exp2(score - best)", 0, "fast::exp2(score)", LARGE),
    "no scale": ("decode.h", "precise::rsqrt(static_cast<float>(D))", 0, "1.0f", SHARED),
    "the next sequence's cache": ("decode.metal", "* kv_heads + head", 0, "+ head", SHARED),
    "an output unwritten": ("decode.metal", "c < C", 0, "c < C - 1", SHARED),
    "a split left out": ("decode.metal", "+ splits - 1) / splits", 0, ") / splits", SPLIT),
    "parts not weighted": ("combine.metal", "* fade", 1, "", SPLIT),
    "the other half of a byte": ("decode.h", "low >> (e", 0, "low >> (4 - e", QUANTISED),
    "another group's bias": ("decode.h", "groups + group)", 0, "groups)", QUANTISED),
    "prefill, no barrier before keys": ("prefill.metal", BARRIER, 0, "", PREFILL),
    "prefill, keys read too early": ("prefill.metal", BARRIER, 1, "", PREFILL),
    "prefill, values too early": ("prefill.metal", BARRIER, 2, "", PREFILL),
    "prefill, values read too early": ("prefill.metal", BARRIER, 3, "", PREFILL),
    "prefill, the future": ("prefill.metal", "offset + row + 1", 0, "offset + row + 2", PREFILL),
    "prefill, summaries too early": ("prefill.metal", "sees_summaries : sees_to", 0, "summaries : sees_to", PREFILL),
    "prefill, edges unmasked": ("prefill.metal", "begin + K > offset", 0, "begin > offset", PREFILL),
    "prefill, a window too wide": ("prefill.metal", "old * chunk - start", 0, "0", PREFILL),
    "prefill, summaries in order": ("prefill.metal", "summary ? -D : D", 0, "D", PREFILL),
    "prefill, half of a row's lanes": ("prefill.metal", "static_cast<ushort>(8)", 1, "static_cast<ushort>(4)", PREFILL),
    "prefill, padding not zero": ("prefill.metal", "row < rows ? 1.0f / sum : 0.0f", 0, "1.0f / sum", PREFILL),
}  # fmt: skip


def replaced(text: str, old: str, which: int, new: str) -> str:
    parts = text.split(old)
    assert which < len(parts) - 1, f"{old!r} occurs {len(parts) - 1} times"
    return old.join(parts[: which + 1]) + new + old.join(parts[which + 1 :])


@pytest.mark.quick(3)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutant(mutant):
    file, old, which, new, case = MUTANTS[mutant]

    @contextmanager
    def run(**settings):
        with metal_cpu.running(reload=[metal], **settings) as log:
            source = metal.source

            def changed(name):
                return replaced(source(name), old, which, new) if name == file else source(name)

            metal.source = changed
            yield log

    check = prefill_case if case is PREFILL else quantised_case if "bits" in case else decode_case
    with pytest.raises((metal_cpu.KernelFault, AssertionError)) as noticed:
        check(run, **case)
    assert "occurs" not in str(noticed.value), "the source has changed: adapt the mutant"
