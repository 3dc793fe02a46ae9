"""Decode steps of random models, KSA and mlx-lm's Qwen3 with the same weights, as generation runs
them: the next step is built and handed over while the last one runs."""

import functools
import time
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from ..benchmark.models import build, filled, ksa_args
from ..benchmark.timing import size
from ..cache.make import make_cache
from .stage import Cases, Found, Options, Stage

NAMES = ("ksa", "qwen3")
# More bytes beside what is held than the keys of the smallest layer are a copy; not fewer than so
# many, which a step that computes summaries needs.
LEAST_COPY = 2 << 20
RAISED = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000"}
FOUR_B = 8 << 30  # bytes that make room for the 4B in 4 bit


def shape_of(options: Options) -> tuple[str, mx.Dtype, int | None]:
    """Shape, dtype and bits of the random models."""
    if options.metal and options.memory >= FOUR_B:
        return "4b", mx.bfloat16, 4
    return "small", mx.bfloat16 if options.metal else mx.float32, None


@functools.lru_cache(1)
def models(shape: str, dtype: mx.Dtype, bits: int | None) -> dict[str, Any]:
    return dict(zip(NAMES, build(ksa_args(shape), dtype, bits), strict=True))


def caches(both: dict[str, Any], n: int, dtype: mx.Dtype) -> dict[str, list[Any]]:
    """Caches as after n tokens, random."""
    args = both["ksa"].args
    made = {"ksa": make_cache(both["ksa"]), "qwen3": [KVCache() for _ in args.windows]}
    return {k: [filled(c, args, n, dtype) for c in cs] for k, cs in made.items()}


def loop(model: Any, cache: list[Any], rows: int, steps: int) -> dict[str, list[float]]:
    """Decode greedily; seconds of each step, and of building and handing over its graph."""
    seconds: dict[str, list[float]] = {"step": [], "build": [], "hand over": []}

    def ahead(token: mx.array) -> mx.array:
        start = time.perf_counter()
        logits = model(token, cache=cache)
        token = mx.argmax(logits[:, -1:], axis=-1)
        built = time.perf_counter()
        mx.async_eval(token)
        seconds["build"].append(built - start)
        seconds["hand over"].append(time.perf_counter() - built)
        return token

    token = ahead(mx.full((rows, 1), 7))
    for _ in range(steps):
        start = time.perf_counter()
        following = ahead(token)
        mx.eval(token)
        seconds["step"].append(time.perf_counter() - start)
        token = following
    mx.eval(token)
    return seconds


def over(model: Any, cache: list[Any], steps: int) -> dict[str, Any]:
    """Bytes that a loop needs beside what it held before, and whether that is a copy of a layer's
    keys and values."""
    loop(model, cache, 1, 2)
    mx.eval([c.state for c in cache])
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    took = loop(model, cache, 1, steps)["step"]
    extra = mx.get_peak_memory() - held
    copies = extra > max(min(c.nbytes for c in cache) / 2, LEAST_COPY)
    return {"over": extra, "copies": copies, "ms": float(np.median(took)) * 1e3}


def decode(options: Options, n: int, steps: int) -> Found:
    """A step after n tokens: two turns of each model, forwards and backwards."""
    shape, dtype, bits = shape_of(options)
    both = models(shape, dtype, bits)
    held = caches(both, n, dtype)
    took: dict[str, dict[str, list[float]]] = {name: {} for name in NAMES}
    for name in (*NAMES, *reversed(NAMES)):
        for what, some in loop(both[name], held[name], 1, steps).items():
            took[name].setdefault(what, []).extend(some[1:])
    found: Found = {
        name: {what: float(np.median(s)) * 1e3 for what, s in took[name].items()}
        | {"mean": float(np.mean(took[name]["step"])) * 1e3}
        for name in NAMES
    }
    return found | {"in_place": {name: over(both[name], held[name], 6) for name in NAMES}}


def contexts(options: Options) -> list[int]:
    """Those whose caches have room: a half more than those of full attention for both models."""
    shape, dtype, _ = shape_of(options)
    if not options.metal:
        return [1024, 8192]
    args, weights = ksa_args(shape), 3 << 30 if shape == "4b" else 1 << 28
    row = 2 * args.num_key_value_heads * args.head_dim * dtype.size * args.num_hidden_layers
    room = 0.7 * options.memory - weights
    return [n for n in (1024, 16384, 65536) if 1.5 * n * row <= room]


def cases(options: Options) -> Cases:
    steps = 68 if options.metal else 6  # two turns pass a step that computes summaries
    return {f"{n} tokens": partial(decode, options, n, steps) for n in contexts(options)}


def verdict(found: Found) -> str:
    return f"copies {size(found['over'])} a step" if found["copies"] else "in place"


def line(case: str, found: Found) -> str:
    if "error" in found:
        return f"{case}: {found['error']}"
    ksa, qwen3 = found["ksa"], found["qwen3"]
    where = " / ".join(verdict(found["in_place"][name]) for name in NAMES)
    building, handing = (f"{ksa[what]:.1f} / {qwen3[what]:.1f}" for what in ("build", "hand over"))
    return (
        f"{case}: {ksa['step']:.1f} (mean {ksa['mean']:.1f}) / {qwen3['step']:.1f}; "
        f"to build {building}, to hand over {handing}; {where}"
    )


# With raised limits


def raised(options: Options) -> Found:
    shape, dtype, bits = shape_of(options)
    both = models(shape, dtype, bits)
    n = contexts(options)[-1] if len(contexts(options)) < 2 else contexts(options)[1]
    held = caches(both, n, dtype)
    return {name: over(both[name], held[name], 12) for name in NAMES}


def raised_cases(options: Options) -> Cases:
    return {"MLX_MAX_OPS_PER_BUFFER=1000": partial(raised, options)} if options.metal else {}


def raised_line(case: str, found: Found) -> str:
    if "error" in found:
        return f"{case}: {found['error']}"
    parts = (f"{verdict(found[name])}, {found[name]['ms']:.1f} ms" for name in NAMES)
    return f"{case}: " + " / ".join(parts)


# Batches


def batch(options: Options, rows: int, steps: int) -> Found:
    """Decode of sequences in different phases of their chunks, beyond the window."""
    shape, dtype, bits = shape_of(options)
    both = models(shape, dtype, bits)
    each = [caches(both, 1100 + 3 * row, dtype) for row in range(rows)]
    found: Found = {}
    for name in NAMES:
        held = [one[name] for one in each]
        cache = held[0]
        if rows > 1:
            cache = [layer[0].merge(list(layer)) for layer in zip(*held, strict=True)]
        took = loop(both[name], cache, rows, steps)
        found[name] = {what: float(np.median(s)) * 1e3 for what, s in took.items()}
        found[name]["tokens_s"] = rows / float(np.mean(took["step"][1:]))
    return found


def batch_cases(options: Options) -> Cases:
    rows, steps = ((1, 4, 8), 34) if options.metal else ((1, 4), 6)
    return {f"{n} row{'s' * (n > 1)}": partial(batch, options, n, steps) for n in rows}


def batch_line(case: str, found: Found) -> str:
    if "error" in found:
        return f"{case}: {found['error']}"
    ksa, qwen3 = found["ksa"], found["qwen3"]
    return (
        f"{case}: {ksa['tokens_s']:.0f} / {qwen3['tokens_s']:.0f} tokens/s; "
        f"to build {ksa['build']:.1f} / {qwen3['build']:.1f} ms"
    )


MODEL = Stage(
    "model",
    "Decode of random models, ms a token, ksa / qwen3 (the 4B in 4 bit if it has room)",
    cases,
    line,
    seconds=100,
    case_seconds=60,
)
RAISED_LIMITS = Stage(
    "raised",
    "The same with raised limits of MLX's command buffers, ksa / qwen3",
    raised_cases,
    raised_line,
    seconds=45,
    case_seconds=45,
    env=RAISED,
)
BATCH = Stage(
    "batch",
    "Batches in different phases, ksa / qwen3",
    batch_cases,
    batch_line,
    seconds=60,
    case_seconds=45,
)
