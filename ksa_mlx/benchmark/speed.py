"""Decode and prefill of a KSA model against mlx-lm's Qwen3 with the same weights, in turns.

Decode runs on caches filled with random keys, so that 128K needs no hour of prefill. Beside Qwen3
it is held against its limit: Qwen3 on caches cut to the keys that KSA reads.
"""

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ..cache.make import make_cache
from .models import filled, keys_read
from .timing import Table, bar, in_turns, ratio, size, spread

PREFILL_STEP = 2048  # tokens, as in mlx_lm.generate
WARMUP = 3


def decode_table() -> Table:
    return Table(
        "Decode. Milliseconds a token are medians; ratios of times are medians over turns, with\n"
        "quartiles. Limit: Qwen3 on caches cut to the keys that KSA reads; Qwen3 / KSA cannot be\n"
        "more than Qwen3 / limit, and limit / KSA is 1 if nothing is lost. By means: the same of\n"
        "mean times, which count the steps that compute summaries.",
        [
            ("context,\ntokens", 8),
            ("cache of\nQwen3", 9),
            ("cache of\nKSA", 9),
            ("Qwen3,\nms", 8),
            ("KSA,\nms", 8),
            ("limit,\nms", 8),
            ("Qwen3 / KSA", 18),
            ("Qwen3 /\nlimit", 7),
            ("limit / KSA", 17),
            ("by\nmeans", 6),
        ],
    )


def decode(ksa, full, n: int, steps: int, dtype: mx.Dtype) -> dict[str, Any]:
    """Time decode steps after n tokens: KSA, Qwen3, and Qwen3 cut to the keys that KSA reads."""
    args = ksa.args
    with bar(f"filling caches of {n} tokens"):
        caches = {
            "ksa": [filled(c, args, n, dtype) for c in make_cache(ksa)],
            "qwen3": [filled(KVCache(), args, n, dtype) for _ in args.windows],
            "limit": [filled(KVCache(), args, keys, dtype) for keys in keys_read(args, n)],
        }
    held = {name: sum(c.nbytes for c in cs) for name, cs in caches.items()}

    def step(name):
        model, token = (ksa if name == "ksa" else full), mx.array([[7]])
        return lambda: mx.eval(model(token, cache=caches[name]))

    with bar(f"decode after {n} tokens", WARMUP + steps) as tick:
        seconds = in_turns({name: step(name) for name in caches}, steps, WARMUP, tick)
    return {
        "context": n,
        "kv_bytes": held,
        "median_ms": {k: float(np.median(s)) * 1e3 for k, s in seconds.items()},
        "mean_ms": {k: float(np.mean(s)) * 1e3 for k, s in seconds.items()},
        "speedup": ratio(seconds["qwen3"], seconds["ksa"]),
        "limit": ratio(seconds["qwen3"], seconds["limit"]),
        "of_limit": ratio(seconds["limit"], seconds["ksa"]),
        "of_limit_mean": float(np.mean(seconds["limit"]) / np.mean(seconds["ksa"])),
    }


def decode_cells(r: dict[str, Any]) -> list[str]:
    return [
        str(r["context"]),
        *(size(r["kv_bytes"][k]) for k in ("qwen3", "ksa")),
        *(f"{r['median_ms'][k]:.2f}" for k in ("qwen3", "ksa", "limit")),
        spread(r["speedup"]),
        f"{r['limit']['median']:.2f}",
        spread(r["of_limit"]),
        f"{r['of_limit_mean']:.2f}",
    ]


def prefill_table() -> Table:
    return Table(
        f"Prefill of random tokens in steps of {PREFILL_STEP}; peaks of memory include weights.",
        [
            ("tokens", 8),
            ("Qwen3, s", 10),
            ("KSA, s", 10),
            ("Qwen3 / KSA", 18),
            ("peak of Qwen3", 15),
            ("peak of KSA", 15),
        ],
    )


def prefill(ksa, full, n: int, turns: int) -> dict[str, Any]:
    """Time the reading of n random tokens, in steps as mlx-lm takes them, with peak memory."""
    text = mx.random.randint(0, ksa.args.summary_token_begin, (1, n))
    peak: dict[str, int] = {}
    warmup = 1 if n <= 4096 else 0

    def read(name, model):
        def run():
            mx.clear_cache()
            mx.reset_peak_memory()
            cache = model.make_cache() if name == "ksa" else [KVCache() for _ in model.layers]
            for at in range(0, n, PREFILL_STEP):
                out = model(text[:, at : at + PREFILL_STEP], cache=cache)
                mx.eval(out[:, -1] if at + PREFILL_STEP >= n else [], [c.state for c in cache])
                tick()
            peak[name] = mx.get_peak_memory()

        return run

    runs = {"ksa": read("ksa", ksa), "qwen3": read("qwen3", full)}
    steps = -(-n // PREFILL_STEP) * len(runs) * (warmup + turns)
    with bar(f"prefill of {n} tokens", steps) as tick:
        seconds = in_turns(runs, turns, warmup)
    return {
        "tokens": n,
        "median_s": {k: float(np.median(s)) for k, s in seconds.items()},
        "speedup": ratio(seconds["qwen3"], seconds["ksa"]),
        "peak_bytes": peak,
    }


def prefill_cells(r: dict[str, Any]) -> list[str]:
    return [
        str(r["tokens"]),
        *(f"{r['median_s'][k]:.2f}" for k in ("qwen3", "ksa")),
        spread(r["speedup"]),
        *(size(r["peak_bytes"][k]) for k in ("qwen3", "ksa")),
    ]
