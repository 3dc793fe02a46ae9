"""What the decode kernel would cost on Apple's GPUs: its counts in the instrument, and a table of costs.

    python -m tests.kernel_cycles [--context 16384]

Computed, not measured: nobody has timed this project on Apple hardware yet. Needs clang.
"""

import argparse
import math
from collections.abc import Iterator
from typing import NamedTuple

import mlx.core as mx

from ksa_mlx.attention import metal
from ksa_mlx.benchmark import kernels
from ksa_mlx.benchmark.models import ksa_args

from . import metal_cpu
from .metal_cpu import mix, registers

# Cycles of one of a core's four schedulers for an instruction of 32 lanes on M1 and M2, by
# https://github.com/philipturner/metal-benchmarks; a lane-dependent shuffle is several instructions.
# That the sum and the exponential cost as much on M5 is what MLX's published rates there say (mlx#4076).
COSTS = {
    "arithmetic": 1, "convert": 4, "shift": 4, "divide": 8, "branch": 2, "loads": 1,
    "reductions": 14.5, "quad_reductions": 6, "votes": 2, "broadcasts": 2.04, "shuffles": 2.04,
    "lane_shuffles": 28, "exponentials": 4, "matrix_multiplies": 18,
}  # fmt: skip
STATIC = ("arithmetic", "convert", "shift", "divide", "branch")


class Chip(NamedTuple):
    cores: int
    ghz: float  # of the GPU; of M4 Pro and M5 assumed
    bandwidth: float  # GB/s, by Apple's specifications

    def available(self, bytes_a_key: float) -> float:
        """Cycles of a scheduler there are for a key, if keys come as fast as memory is read."""
        return self.cores * 4 * self.ghz / (self.bandwidth / bytes_a_key)


CHIPS = {
    "M1": Chip(8, 1.28, 68.25),
    "M2 Max": Chip(38, 1.40, 400),
    "M4 Pro": Chip(20, 1.58, 273),
    "M5": Chip(10, 1.60, 153),
}


class Row(NamedTuple):
    """One key of one KV head, and the query rows that share it."""

    name: str
    bytes_a_key: float
    counts: dict[str, float]
    live_floats: float

    @property
    def cycles(self) -> float:
        return sum(COSTS[name] * count for name, count in self.counts.items() if name in COSTS)


def rows(context: int) -> Iterator[Row]:
    """Plain, 8 and 4 bit at the 4B's shape after so many tokens, all that a launch does shared out over the keys."""
    args = ksa_args("4b")
    for bits in (16, 8, 4):
        with metal_cpu.running(reload=[metal]) as log:
            case = kernels.decode(args, context, mx.float16, bits, 1)
            mx.eval(case.kernel[0](case.queries))
        keys = case.pairs // args.num_attention_heads * args.num_key_value_heads
        counts = metal_cpu.per_key([], log.launches, keys)
        source = log.of("ksa_decode")[0].source
        loop = mix.busiest_loop(registers.optimized(source))
        # Every meeting is a simd operation, matrix product or barrier, in the loop as in the launch.
        met = sum(
            counts[x] for x in ("simd_operations", "matrix_multiplies", "threadgroup_barriers")
        )
        # Tiles are powers of two; what a launch does besides its loop blurs the ratio.
        iteration = 2 ** max(0, round(math.log2(loop["meetings"] / met)))
        counts |= {name: loop[name] / iteration for name in STATIC}
        yield Row(case.name, case.visible / keys, counts, registers.live_floats(source))


def table(found: list[Row]) -> str:
    """Two tables in Markdown: counts a key, and cycles a key."""
    kinds = (
        "reductions",
        "lane_shuffles",
        "shuffles",
        "broadcasts",
        "votes",
        "exponentials",
        "threadgroup_barriers",
    )
    titles = (
        "sums",
        "lane-dependent shuffles",
        "shuffles",
        "broadcasts",
        "ballots",
        "exp2",
        "barriers",
    )
    lines = [
        ["a key", "bytes", *titles, "arithmetic", "conversions", "shifts", "live floats"],
        *(
            [
                row.name, f"{row.bytes_a_key:.0f}", *(f"{row.counts[x]:.2f}" for x in kinds),
                *(f"{row.counts[x]:.1f}" for x in ("arithmetic", "convert", "shift")), f"{row.live_floats:.0f}",
            ]
            for row in found
        ),
    ]  # fmt: skip
    costs = [
        ["computed", "cycles a key", *(f"{name}: available, share of bandwidth" for name in CHIPS)]
    ]
    for row in found:
        there = [chip.available(row.bytes_a_key) for chip in CHIPS.values()]
        costs.append(
            [
                row.name,
                f"{row.cycles:.0f}",
                *(f"{a:.0f}, {100 * a / row.cycles:.0f} %" for a in there),
            ]
        )
    return "\n\n".join(_markdown(some) for some in (lines, costs))


def _markdown(lines: list[list[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, ["---"] * len(head), *rest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--context", type=int, default=16384, help="tokens in the cache")
    print(table(list(rows(parser.parse_args().context))))


if __name__ == "__main__":
    main()
