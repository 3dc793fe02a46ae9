"""What single operations of a kernel cost, in fused multiply-adds: the cost model rests on them."""

from functools import partial

import mlx.core as mx
import numpy as np

from ..attention import metal
from ..benchmark.timing import in_turns
from .stage import Cases, Found, Options, Stage

# What costs.metal calls 0, 1, ..., and how many multiply-adds accompany one of them there.
OPERATIONS = {
    "fma": 0,
    "simd_sum": 1,
    "simd_shuffle by lane": 1,
    "simd_shuffle_xor": 1,
    "simd_broadcast": 1,
    "exp2": 1,
    "uint to float": 0,
    "bfloat to float": 1,
    "8x8 product": 0,
    "threadgroup load": 1,
}
THREADS = 1024 * 256
ROUNDS = 256
TURNS = 7


def run(op: int, rounds: int, start: mx.array) -> mx.array:
    """Let each thread of `start` (threads,), a multiple of 256, do 16 * rounds operations."""
    return metal.kernel("costs", "start rounds")(
        inputs=[start, mx.array([rounds] * 8, dtype=mx.int32)],
        template=[("OP", op)],
        grid=(start.size, 1, 1),
        threadgroup=(256, 1, 1),
        output_shapes=[start.shape],
        output_dtypes=[mx.float32],
    )[0]


def measure(op: int) -> Found:
    """Nanoseconds of all threads' doing one operation: more rounds less fewer."""
    start = mx.random.uniform(shape=(THREADS,))
    mx.eval(start)
    runs = {n: partial(run, op, n * ROUNDS, start) for n in (1, 2)}
    took = in_turns(
        {"once": lambda: mx.eval(runs[1]()), "twice": lambda: mx.eval(runs[2]())}, TURNS, 2
    )
    return {"ns": float(np.median(took["twice"] - took["once"])) / (16 * ROUNDS) * 1e9}


def relative(found: dict[str, Found]) -> dict[str, float]:
    """Costs in multiply-adds, without those that accompany."""
    one = found.get("fma", {}).get("ns")
    if not one or one <= 0:
        return {}
    return {
        name: found[name]["ns"] / one - beside
        for name, beside in OPERATIONS.items()
        if "ns" in found.get(name, {})
    }


def lines(found: dict[str, Found]) -> list[str]:
    costs = relative(found)
    return [", ".join(f"{name} {cost:.1f}" for name, cost in costs.items())] if costs else []


def cases(options: Options) -> Cases:
    if not options.metal:
        return {}
    return {name: partial(measure, op) for op, name in enumerate(OPERATIONS)}


COSTS = Stage("costs", "Costs of single operations, in multiply-adds", cases, end=lines, seconds=45)
