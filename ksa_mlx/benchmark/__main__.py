"""Measure a KSA model against mlx-lm's own Qwen3 of the same shape and weights, in turns.

    python -m ksa_mlx benchmark                       # decode, prefill, building steps: minutes
    python -m ksa_mlx benchmark --prefill 32768       # long prefill, many minutes on a CPU
    python -m ksa_mlx benchmark --kv-bits 8 4         # quantised caches against plain ones
    python -m ksa_mlx benchmark --shape 4b --dtype bfloat16 --contexts 16384 131072   # on a Mac
    python -m ksa_mlx benchmark --kernels --shape 4b --dtype bfloat16   # the Metal kernels

Every line is printed as soon as it is measured, and then in the file of --json, too.
"""

import argparse
import os
import platform
import sys
from typing import Any

import mlx.core as mx

from ..attention import metal
from ..errors import KSAError, exit_status
from ..model import ModelArgs
from . import building, kernels, kv, plot, speed
from .models import SHAPES, build, held_bytes, ksa_args
from .results import Results, check_files
from .timing import Table, bar, size

HELD = (1024, 16384, 65536, 131072)  # tokens


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="ksa_mlx benchmark", description=__doc__.split("\n")[0])

    def add(flag: str, **kwargs):
        p.add_argument(flag, **kwargs)

    add("--shape", choices=SHAPES, default="small", help="of the random models")
    add("--pure", action="store_true", help="windowed layers only, no full ones")
    add("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    add(
        "--contexts",
        type=int,
        nargs="*",
        default=[512, 840, 16384, 65536, 131072],
        metavar="N",
        help="tokens before the decode steps, random keys",
    )
    add("--steps", type=int, default=160, help="decode steps a context")
    add("--prefill", type=int, nargs="*", default=[1024], metavar="N", help="tokens of prefills")
    add("--turns", type=int, default=5, help="prefills (1 above 8192 tokens)")
    add("--building", type=int, default=100, help="steps whose building is timed; 0: none")
    add(
        "--kv-bits",
        type=int,
        nargs="*",
        default=[],
        choices=[4, 8],
        help="decode on quantised caches, and nothing else",
    )
    add("--kv-value-bits", type=int, choices=[4, 8], help="those of the values (--kv-bits)")
    add("--kernels", action="store_true", help="the Metal kernels, and nothing else")
    add("--json", metavar="FILE", help="keep the figures here, from the first line on")
    add("--plot", metavar="FILE.png", help="needs matplotlib (extra `plot`)")
    return p


def check(options: argparse.Namespace, args: ModelArgs, instrument: Any):
    """Refuse what cannot be measured or written before anything is built. Raises KSAError."""
    longest = args.max_position_embeddings - options.steps - 8
    for flag in ("contexts", "prefill"):
        for n in getattr(options, flag):
            if not 1 <= n <= longest:
                raise KSAError(f"--{flag}: found {n}, expected 1 to {longest} tokens")
    for flag, least in (("steps", 1), ("turns", 1), ("building", 0)):
        if getattr(options, flag) < least:
            raise KSAError(f"--{flag}: found {getattr(options, flag)}, expected at least {least}")
    check_files(json=options.json, plot=options.plot)
    if options.kv_value_bits is not None and not options.kv_bits:
        raise KSAError("--kv-value-bits: needs --kv-bits")
    if options.plot is not None:
        plot.check(options.plot)
        if options.kernels or options.kv_bits or not options.contexts:
            raise KSAError("--plot: expected --contexts, without --kernels and --kv-bits")
    choices = [x for x in metal.CHOICES if x != "metal" or mx.metal.is_available()]
    choice = os.environ.get("KSA_MLX_KERNELS", "auto")
    if choice not in choices:
        why = "" if mx.metal.is_available() else " (no Metal device here)"
        raise KSAError(f"KSA_MLX_KERNELS: found {choice!r}, expected {', '.join(choices)}{why}")
    if options.kernels:
        kernels.check_device(instrument)


def measure_models(options: argparse.Namespace, args: ModelArgs, results: Results):
    """Decode, prefill, building and held bytes, line by line."""
    dtype = getattr(mx, options.dtype)
    with bar(f"building two random models of the {options.shape} shape"):
        ksa, full = build(args, dtype)
    table = speed.decode_table()
    for n in options.contexts:
        results.add("decode", speed.decode(ksa, full, n, options.steps, dtype))
        table.add(*speed.decode_cells(results.last("decode")))
    table = speed.prefill_table()
    for n in options.prefill:
        turns = options.turns if n <= 8192 else 1
        results.add("prefill", speed.prefill(ksa, full, n, turns))
        table.add(*speed.prefill_cells(results.last("prefill")))
    if options.building:
        both, table = building.builders(), building.table()
        for batch in building.BATCHES:
            results.add("building", building.measure(both, batch, options.building))
            table.add(*building.cells(results.last("building")))
    columns = [("tokens", 8), ("full attention", 18), ("KSA", 12), ("full / KSA", 14)]
    table = Table("KV cache of the 4B's shape in bfloat16, held bytes", columns)
    for n in HELD:
        held = held_bytes("4b", n, mx.bfloat16)
        results.add("held_4b", {"context": n, **held})
        times = held["qwen3"] / held["ksa"]
        table.add(n, size(held["qwen3"]), size(held["ksa"]), f"{times:.2f}")


def run(options: argparse.Namespace, instrument: Any):
    args, dtype = ksa_args(options.shape, options.pure), getattr(mx, options.dtype)
    check(options, args, instrument)
    device = "GPU" if mx.default_device() == mx.gpu else "CPU"
    results = Results(
        options.json,
        where=f"{platform.system()} {platform.machine()}, {device}",
        mlx=mx.__version__,
        dtype=options.dtype,
        shape=f"{options.shape}{' pure' if options.pure else ''} shape",
    )
    print("{shape}, {dtype}; {where}, MLX {mlx}".format(**results.found), flush=True)
    if options.kernels:
        steps, turns = options.steps, options.turns
        kernels.run(args, options.contexts, dtype, steps, turns, results, instrument)
    elif options.kv_bits:
        with bar(f"building a random model of the {options.shape} shape"):
            ksa, _ = build(args, dtype)
        table = kv.table()
        for n in options.contexts:
            results.add(
                "kv_bits",
                kv.measure(ksa, n, options.steps, dtype, options.kv_bits, options.kv_value_bits),
            )
            for line in kv.lines(results.last("kv_bits")):
                table.add(*line)
    else:
        measure_models(options, args, results)
        if options.plot:
            plot.plot(results.found, options.plot)


def main(argv: list[str] | None = None, instrument: Any = None) -> int:
    """The command line. Returns the exit status.

    Args:
        argv: the arguments; None: those of the process.
        instrument: what executes Metal kernels where there is no Metal, for exact counts.
    """
    options = parser().parse_args(argv)
    stopped = "stopped; what was measured stands above"
    return exit_status(lambda: run(options, instrument), stopped)


if __name__ == "__main__":
    sys.exit(main())
