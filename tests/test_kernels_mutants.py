"""Kernels that are slightly wrong are noticed: each line of the list breaks one thing."""

from contextlib import contextmanager

import pytest

from ksa_mlx.attention import metal
from ksa_mlx.attention.kernel import Variant

from . import metal_cpu
from .test_decode_kernel import decode_case
from .test_prefill_kernel import PREFILL_CHECKED, prefill_case

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
SHARED = {"dtype": "float32", "dim": 64, "group": 2, "B": 2, "rows": 2, "keys": 70}
SHARED |= {"values": "random"}
FOUR = {**SHARED, "group": 4, "rows": 1}
LONG = {**SHARED, "keys": 300, "rows": 1}
SPLIT = {**SHARED, "rows": 1, "variant": Variant(0, 2)}
LARGE = {**SHARED, "values": "large"}
ONE = {**SHARED, "own": False}
PREFILL = PREFILL_CHECKED[0]
QUANTISED = {**SHARED, "rows": 1, "keys": 30, "formats": [(4, 4), (8, 8)]}
AFTER_PLAIN = {**QUANTISED, "formats": [(16, 16), (4, 4)]}

# The file; what is replaced, which time it occurs (from 0), by what; the case that notices.
MUTANTS = {
    "no barrier before parts are joined": ("decode.metal", BARRIER, 0, "", SHARED),
    "a barrier without memory": ("decode.metal", "mem_threadgroup", 0, "mem_none", SHARED),
    "a barrier of the simdgroup": ("decode.metal", "threadgroup_barrier", 0, "simdgroup_barrier", SHARED),
    "one slot too many": ("decode.h", "slot < sees_to", 0, "slot <= sees_to", SHARED),
    "one slot too few": ("decode.h", "slot < sees_to", 0, "slot < sees_to - 1", SHARED),
    "another position's range": ("decode.h", "(first + row_of<C>(lane)) % length", 0, "0", SHARED),
    "what is before the range": ("decode.h", "slot >= fresh && ", 0, "", SHARED),
    "a row that sees nothing": ("decode.h", "? 0.0f : 1.0f;", 0, "? 1.0f : 1.0f;", {**SHARED, "keys": 1}),
    "keys twice": ("decode.h", "max(tile, sees_from)", 0, "sees_from", {**SHARED, "keys": 37}),
    "no fading": ("decode.h", "fast::exp2(rows.best - best)", 0, "1.0f", SHARED),
    "sums do not fade": ("decode.h", "rows.sum *= fade;", 0, "", LONG),
    "infinite start": ("common.h", "-3.402823466e+38f", 0, "-INFINITY", {**SHARED, "keys": 1}),
    "scores overflow": ("decode.h", "exp2(weights[s] - best)", 0, "exp2(weights[s])", LARGE),
    "the best of some keys": ("decode.h", "bit = L; bit < 32", 0, "bit = L; bit < 16", LARGE),
    "sums of some keys": ("decode.h", "lanes(D); bit < 32", 0, "lanes(D); bit < 16", SHARED),
    "sums of some lanes": ("decode.h", "bit < L;", 0, "bit < L / 2;", SHARED),
    "another row's weights": ("decode.h", "+ lane_of(c, C)", 0, "+ c", FOUR),
    "another row's fading": ("decode.h", "lane_of(c, C)", 0, "c", FOUR),
    "rows exchanged": ("decode.h", "second ? high : low", 0, "second ? low : high", FOUR),
    "a tile left out": ("decode.h", "tile += N * kTile", 0, "tile += 2 * N * kTile", LONG),
    "no scale": ("forms.h", "precise::rsqrt(static_cast<float>(D))", 0, "1.0f", SHARED),
    "the next sequence's cache": ("decode.metal", "(own[0])", 0, "(0)", ONE),
    "an output unwritten": ("decode.metal", "min(C, count", 0, "min(C - 1, count", SHARED),
    "a part left out": ("decode.metal", "* (split + 1) *", 0, "* split *", SPLIT),
    "parts not weighted": ("combine.metal", "* fade", 1, "", SPLIT),
    "the other half of a word": ("forms.h", "] >> 16", 0, "]", QUANTISED),
    "another group's bias": ("forms.h", "key_biases[group]", 0, "key_biases[0]", QUANTISED),
    "another group's scale": ("forms.h", "value_scales[group]", 0, "value_scales[0]", QUANTISED),
    "queries not divided": ("forms.h", "/= factor<KEY_BITS>(e)", 0, "/= 1.0f", QUANTISED),
    "biases do not fade": ("decode.h", "biases[c] *= by;", 0, "", {**QUANTISED, "keys": 300}),
    "values too large": ("forms.h", " / factor<VALUE_BITS>(e) +", 0, " +", QUANTISED),
    "the first cache too small": ("forms.h", "*= factor<VALUE_BITS>(e)", 0, "*= 1.0f", AFTER_PLAIN),
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

    check = prefill_case if case is PREFILL else decode_case
    with pytest.raises((metal_cpu.KernelFault, AssertionError)) as noticed:
        check(run, **case)
    assert "occurs" not in str(noticed.value), "the source has changed: adapt the mutant"
