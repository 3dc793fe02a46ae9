"""Measure a KSA model against mlx-lm's own Qwen3 of the same shape and weights, in turns.

    python -m ksa_mlx.benchmark                       # the table of the README, some minutes
    python -m ksa_mlx.benchmark --prefill 32768       # long prefill, many minutes on a CPU
    python -m ksa_mlx.benchmark --shape 4b --dtype bfloat16 --contexts 16384 131072   # on a Mac
    python -m ksa_mlx.benchmark --kernels             # the Metal kernels: benchmark_kernels.py

Decode runs on caches filled with random keys, so that 128K needs no hour of prefill. Besides
Qwen3 it is held against its limit: Qwen3 on caches cut to the keys that KSA reads.
"""

import argparse
import importlib.util
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

from ..cache.rolling import RollingSummaryCache, make_cache
from ..config import MODEL_TYPE
from ..model import Model, ModelArgs

SHAPES = {
    # The released 4B has one full layer after three of 128 chunks; so has the small one.
    "small": {
        "hidden_size": 512,
        "intermediate_size": 1536,
        "num_hidden_layers": 8,
        "vocab_size": 4097,
    }
    | {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 64},
    "4b": {
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "vocab_size": 151937,
    }
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}
PREFILL_STEP = 2048  # tokens, as in mlx_lm.generate


def ksa_args(shape: str, pure: bool = False) -> ModelArgs:
    """The configuration of a benchmark model; `pure` has no full layers."""
    dims = SHAPES[shape]
    blocks = dims["num_hidden_layers"] // 4
    return ModelArgs.from_dict(
        dict(
            dims,
            model_type=MODEL_TYPE,
            rms_norm_eps=1e-6,
            max_position_embeddings=131072 + 4096,
            rope_theta=1e6,
            tie_word_embeddings=True,
            use_summary_attention=True,
            summary_chunk_size=8,
            summary_token_num=1,
            summary_token_begin=dims["vocab_size"] - 1,
            summary_sliding_chunk_num=[128, 128, 128, 128 if pure else 17408] * blocks,
            summary_chunk_position_ids_type="origin",
            summary_token_position_ids_type="last_chunk_slice_right",
            summary_independent_parameters=True,
            mix_coeff=0,
        )
    )


def build(args: ModelArgs, dtype: mx.Dtype):
    """A random KSA model and mlx-lm's Qwen3 with the same weights."""
    ksa = Model(args)
    ksa.update(tree_map(lambda w: w.astype(dtype), ksa.parameters()))
    shared = {k: getattr(args, k) for k in qwen3.ModelArgs.__dataclass_fields__ if hasattr(args, k)}
    shared.update(model_type="qwen3", vocab_size=args.summary_token_begin)
    full = qwen3.Model(qwen3.ModelArgs(**shared))
    weights = [(k, w) for k, w in tree_flatten(ksa.parameters()) if "summary" not in k]
    full.load_weights(weights)
    ksa.eval(), full.eval()
    mx.eval(ksa.parameters(), full.parameters())
    return ksa, full


def filled(cache, args: ModelArgs, n: int, dtype: mx.Dtype, random: bool = True):
    """Fill one layer's cache as after n tokens, with random keys and values, or with zeros."""
    like = mx.zeros((1, args.num_key_value_heads, 1, args.head_dim), dtype)
    if isinstance(cache, RollingSummaryCache):
        chunks = max(0, (n - 1) // cache.chunk - cache.window)
        cache.reserve(chunks, n, like, like)
        cache.offset, cache.summarised, cache._oldest = n, chunks, chunks
    else:
        cache.keys = cache.values = mx.zeros(
            (*like.shape[:2], -(-n // 256) * 256, args.head_dim), dtype
        )
        cache.offset = n
    if random:
        cache.keys = mx.random.normal(cache.keys.shape, dtype)
        cache.values = mx.random.normal(cache.values.shape, dtype)
    mx.eval(cache.keys, cache.values)
    return cache


def cut(args: ModelArgs, n: int, dtype: mx.Dtype) -> list[KVCache]:
    """Plain caches of as many keys as a KSA model reads after n tokens: its limit."""
    caches = []
    for window in args.windows:
        size = n
        if window is not None:
            chunk = (n - 1) // args.summary_chunk_size
            first = max(0, chunk - window)
            size = n - first * args.summary_chunk_size + first * args.summary_token_num
        caches.append(filled(KVCache(), args, size, dtype))
    return caches


def in_turns(runs: dict[str, Callable[[], Any]], turns: int, warmup: int = 3) -> dict[str, Any]:
    """Seconds of each run, taken in turns: {name: array of `turns`}."""
    seconds = {name: [] for name in runs}
    for turn in range(warmup + turns):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: np.array(s) for name, s in seconds.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The median of a / b turn by turn, and its quartiles."""
    low, median, high = np.percentile(a / b, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def decode(ksa, full, n: int, steps: int, dtype: mx.Dtype) -> dict[str, Any]:
    """Time decode steps after n tokens: KSA, Qwen3, and Qwen3 cut to the keys that KSA reads."""
    args = ksa.args
    caches = {
        "ksa": [filled(c, args, n, dtype) for c in make_cache(ksa)],
        "qwen3": [filled(KVCache(), args, n, dtype) for _ in args.windows],
        "limit": cut(args, n, dtype),
    }
    held = {name: sum(c.nbytes for c in cs) for name, cs in caches.items()}

    def step(name):
        model, token = (ksa if name == "ksa" else full), mx.array([[7]])
        return lambda: mx.eval(model(token, cache=caches[name]))

    seconds = in_turns({name: step(name) for name in caches}, steps)
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


def prefill(ksa, full, n: int, turns: int) -> dict[str, Any]:
    """Time the reading of n random tokens, in steps as mlx-lm takes them, with peak memory."""
    text = mx.random.randint(0, ksa.args.summary_token_begin, (1, n))
    peak = {}

    def read(name, model):
        def run():
            mx.clear_cache()
            mx.reset_peak_memory()
            cache = model.make_cache() if name == "ksa" else [KVCache() for _ in model.layers]
            for at in range(0, n, PREFILL_STEP):
                out = model(text[:, at : at + PREFILL_STEP], cache=cache)
                mx.eval(out[:, -1] if at + PREFILL_STEP >= n else [], [c.state for c in cache])
            peak[name] = mx.get_peak_memory()

        return run

    runs = {"ksa": read("ksa", ksa), "qwen3": read("qwen3", full)}
    seconds = in_turns(runs, turns, warmup=1 if n <= 4096 else 0)
    return {
        "tokens": n,
        "median_s": {k: float(np.median(s)) for k, s in seconds.items()},
        "speedup": ratio(seconds["qwen3"], seconds["ksa"]),
        "peak_bytes": peak,
    }


def held_bytes(shape: str, n: int, dtype: mx.Dtype) -> dict[str, int]:
    """KV bytes after n tokens for a shape, by `nbytes` of zero-filled caches, one a layer kind."""
    args, totals = ksa_args(shape), {}
    for name, windows in (("ksa", args.windows), ("qwen3", [None] * len(args.windows))):
        one = {}
        for window in set(windows):
            cache = KVCache()
            if window is not None:
                cache = RollingSummaryCache(args.summary_chunk_size, args.summary_token_num, window)
            one[window] = filled(cache, args, n, dtype, random=False).nbytes
        totals[name] = sum(one[w] for w in windows)
    return totals


def spread(r: dict[str, float]) -> str:
    """A ratio with its quartiles, if there was more than one turn."""
    if r["low"] == r["high"]:
        return f"{r['median']:.2f}"
    return f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def size(n: float) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.1f} MB"


def report(results: dict[str, Any]) -> str:
    """The results as Markdown tables."""
    out = ["{machine}, {device}, {dtype}, {shape} model\n".format(**results)]
    if results["decode"]:
        out.append("Decode, ms a token; ratios are medians over turns (quartiles)\n")
        head = ["context", "KV Qwen3", "KV KSA", "Qwen3", "KSA", "limit"]
        head += ["faster than Qwen3", "limit, faster", "share of the limit", "of means"]
        out.append(
            table(
                head,
                [
                    [str(r["context"]), size(r["kv_bytes"]["qwen3"]), size(r["kv_bytes"]["ksa"])]
                    + [f"{r['median_ms'][k]:.2f}" for k in ("qwen3", "ksa", "limit")]
                    + [spread(r[k]) for k in ("speedup", "limit", "of_limit")]
                    + [f"{r['of_limit_mean']:.2f}"]
                    for r in results["decode"]
                ],
            )
        )
    if results["prefill"]:
        out.append("Prefill, seconds\n")
        head = ["tokens", "Qwen3", "KSA", "faster than Qwen3", "peak Qwen3", "peak KSA"]
        out.append(
            table(
                head,
                [
                    [
                        str(r["tokens"]),
                        f"{r['median_s']['qwen3']:.2f}",
                        f"{r['median_s']['ksa']:.2f}",
                    ]
                    + [spread(r["speedup"])]
                    + [size(r["peak_bytes"][k]) for k in ("qwen3", "ksa")]
                    for r in results["prefill"]
                ],
            )
        )
    out.append("KV cache of the 4B's shape in bfloat16, held bytes\n")
    out.append(
        table(
            ["context", "full attention", "KSA", "ratio"],
            [
                [str(n), size(b["qwen3"]), size(b["ksa"]), f"{b['qwen3'] / b['ksa']:.2f}"]
                for n, b in results["held_4b"].items()
            ],
        )
    )
    return "\n".join(out)


def plot(results: dict[str, Any], path: str):
    """Decode time and KV bytes against context, as a PNG. Needs matplotlib (extra `plot`)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = results["decode"]
    contexts = [r["context"] for r in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    names = {"qwen3": "Qwen3", "ksa": "KSA", "limit": "limit: Qwen3 on KSA's keys"}
    for name, style in (("qwen3", "o-"), ("ksa", "s-"), ("limit", "x--")):
        left.plot(contexts, [r["median_ms"][name] for r in rows], style, label=names[name])
        if name != "limit":
            held = [r["kv_bytes"][name] / 1e6 for r in rows]
            right.plot(contexts, held, style, label=names[name])
    left.set(ylabel="ms a token, median", title="Decode")
    right.set(ylabel="MB", title="KV cache")
    for axis in (left, right):
        axis.set(xlabel="context, tokens", xscale="log", ylim=(0, None))
        axis.set_xticks(contexts, [f"{n // 1024}K" if n >= 1024 else str(n) for n in contexts])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("{machine}, {device}, {dtype}, {shape} model".format(**results))
    figure.savefig(path, dpi=120)


def write(results: dict[str, Any], path: str | None):
    if path:
        with open(path, "w") as f:
            json.dump(results, f, indent=1)


def check_outputs(options: argparse.Namespace):
    """Refuse files that cannot be written before anything is measured."""
    for flag, path in (("--json", options.json), ("--plot", options.plot)):
        if path and not (Path(path).absolute().parent.is_dir() and not Path(path).is_dir()):
            raise SystemExit(f"{flag}: {path}: found no folder for it, expected a file's path")
    if options.plot:
        if not options.plot.endswith((".png", ".pdf", ".svg")):
            raise SystemExit(f"--plot: found {options.plot}, expected a .png, .pdf or .svg file")
        if importlib.util.find_spec("matplotlib") is None:
            raise SystemExit("--plot: needs matplotlib; pip install 'ksa-mlx[plot]'")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="ksa_mlx.benchmark", description=__doc__.split("\n")[0])
    p.add_argument("--shape", choices=SHAPES, default="small")
    p.add_argument("--kernels", action="store_true", help="the Metal kernels instead of models")
    p.add_argument("--pure", action="store_true", help="windowed layers only, no full ones")
    p.add_argument("--dtype", choices=["float32", "float16", "bfloat16"], default="float32")
    p.add_argument(
        "--contexts",
        type=int,
        nargs="*",
        default=[512, 840, 16384, 65536, 131072],
        metavar="N",
        help="contexts for decode, filled with random keys",
    )
    p.add_argument("--prefill", type=int, nargs="*", default=[1024], metavar="N")
    p.add_argument(
        "--kv-bits",
        type=int,
        nargs="*",
        default=[],
        choices=[4, 8],
        help="quantised caches instead",
    )
    p.add_argument("--steps", type=int, default=160, help="decode steps a context")
    p.add_argument("--turns", type=int, default=5, help="prefills (1 above 8192 tokens)")
    p.add_argument("--json", metavar="FILE")
    p.add_argument("--plot", metavar="FILE.png", help="needs matplotlib (extra `plot`)")
    return p


def main(argv=None):
    options = parser().parse_args(argv)
    dtype = getattr(mx, options.dtype)
    args = ksa_args(options.shape, options.pure)
    longest = args.max_position_embeddings - options.steps - 8
    for n in [*options.contexts, *options.prefill]:
        if not 1 <= n <= longest:
            raise SystemExit(f"context: found {n}, expected 1 to {longest} tokens")
    for name in ("steps", "turns"):
        if getattr(options, name) < 1:
            raise SystemExit(f"--{name}: found {getattr(options, name)}, expected at least 1")
    check_outputs(options)
    results = {
        "machine": f"{platform.system()} {platform.machine()}",
        "device": str(mx.default_device()),
        "mlx": mx.__version__,
        "dtype": options.dtype,
        "shape": options.shape + (" pure" if options.pure else ""),
    }
    if options.kernels:
        from .kernels import run

        text, results["kernels"] = run(args, options.contexts, dtype, options.steps, options.turns)
        print("{machine}, {device}, {dtype}, {shape} shape\n".format(**results) + text)
        return write(results, options.json)
    results["held_4b"] = {n: held_bytes("4b", n, mx.bfloat16) for n in (1024, 16384, 65536, 131072)}
    ksa, full = build(args, dtype)
    if options.kv_bits:
        from ..benchmark import kv

        results["kv_bits"] = [
            kv.run(ksa, n, options.steps, dtype, options.kv_bits) for n in options.contexts
        ]
        print("{machine}, {device}, {dtype}, {shape} model\n".format(**results))
        print(kv.report(results["kv_bits"]))
        return write(results, options.json)
    results["decode"] = [decode(ksa, full, n, options.steps, dtype) for n in options.contexts]
    results["prefill"] = [
        prefill(ksa, full, n, options.turns if n <= 8192 else 1) for n in options.prefill
    ]
    print(report(results))
    write(results, options.json)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
