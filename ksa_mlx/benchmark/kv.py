"""What quantised KV saves and costs in decode."""

from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.make import make_cache
from .models import filled
from .timing import Table, bar, in_turns, ratio, size, spread

WARMUP = 3


def measure(
    ksa, n: int, steps: int, dtype: mx.Dtype, widths: list[int], value_bits: int | None = None
) -> dict[str, Any]:
    """Decode steps after n tokens, on plain and on quantised caches: bytes held, peak, time.

    A width is that of all keys and values; "4, text 8" is 4 bits but for the windows' text, and
    "8, values 4" but for the values, where `value_bits` are given.
    """
    ways: dict[str, Any] = {"plain": None, **{str(bits): (bits, None) for bits in widths}}
    if 4 in widths:
        ways["4, text 8"] = 4, 8
    if value_bits:
        ways |= {f"{b}, values {value_bits}": (b, None, value_bits) for b in widths}
    token, held, peak = mx.array([[7]]), {}, {}

    def caches(bits=None, text_bits=None, value_bits=None):
        made = make_cache(ksa, text_bits=text_bits, value_bits=value_bits)
        made = [filled(c, ksa.args, n, dtype) for c in made]
        if bits:
            # One after the other, so that two forms of a cache are never held at once.
            for i, c in enumerate(made):
                made[i] = c.to_quantized(64, bits)
                mx.eval(made[i].state)
        return made

    with bar(f"memory of decode after {n} tokens", len(ways)) as tick:
        for name, way in ways.items():
            cache = caches(*(way or ()))
            mx.clear_cache()
            mx.reset_peak_memory()
            for _ in range(10):
                mx.eval(ksa(token, cache=cache))
            held[name], peak[name] = sum(c.nbytes for c in cache), mx.get_peak_memory()
            del cache
            tick()

    alive = {name: caches(*(way or ())) for name, way in ways.items()}

    def step(cache):
        return lambda: mx.eval(ksa(token, cache=cache))

    with bar(f"decode after {n} tokens", WARMUP + steps) as tick:
        seconds = in_turns({k: step(c) for k, c in alive.items()}, steps, WARMUP, tick)
    return {
        "context": n,
        "kv_bytes": held,
        "peak_bytes": peak,
        "median_ms": {k: float(np.median(s)) * 1e3 for k, s in seconds.items()},
        "speedup": {k: ratio(seconds["plain"], s) for k, s in seconds.items()},
    }


def table() -> Table:
    return Table(
        "Decode on quantised caches. The peak of memory includes the weights; ratios of times are\n"
        "medians over turns, with quartiles.",
        [
            ("context,\ntokens", 9),
            ("bits", 11),
            ("KV cache", 11),
            ("peak of\nmemory", 11),
            ("ms a\ntoken", 9),
            ("plain / this", 19),
        ],
    )


def lines(r: dict[str, Any]) -> list[list[str]]:
    return [
        [
            str(r["context"]),
            name,
            size(r["kv_bytes"][name]),
            size(r["peak_bytes"][name]),
            f"{r['median_ms'][name]:.2f}",
            spread(r["speedup"][name]),
        ]
        for name in r["kv_bytes"]
    ]
