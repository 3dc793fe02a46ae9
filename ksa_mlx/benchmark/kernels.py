"""Measure the Metal kernels against MLX's operations, or count what they do.

On a Mac: times, in turns and on the same caches, with GB/s beside a measured copy. Without Metal
an instrument that executes the kernels can be handed in: no times, but exact counts.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.base import quantized_scaled_dot_product_attention

from ..attention import metal
from ..attention.kernel import decode_kernel
from ..attention.plan import Step
from ..attention.prefill import layout, prefill_kernel, prefill_ops
from ..cache.storage import PLAIN, Affine, Segment
from ..errors import KSAError
from ..model import ModelArgs
from .results import Results
from .timing import Table, bar, in_turns, ratio, size, spread

# Decode goes through caches of so many layers, so that they are read from memory.
LAYERS = 8
ROWS = 2048  # new rows of a prefill
COUNTED_ROWS = 64  # the same, where each thread is executed on a CPU
COPY_BYTES = 1 << 28
WARMUP = 3
ERROR = "Error: largest difference from attention in float32, as a share of the largest value."
GROUP = 64  # numbers that share a scale and a bias in quantised caches

Attend = Callable[[mx.array], mx.array]


@dataclass
class Case:
    """A kernel and MLX's operations on the same caches.

    queries (1, heads, L, head_dim); kernel, ops: attention of one layer each; exact: of the last
    layer in float32, from what its cache stands for. visible: bytes of keys and values that a
    layer's threadgroups need, each once a threadgroup; affine: of these, scales and biases. pairs:
    query-key pairs.
    """

    name: str
    context: int
    queries: mx.array
    kernel: list[Attend]
    ops: list[Attend]
    exact: Attend
    visible: int
    pairs: int
    affine: int = 0


def windowed(args: ModelArgs):
    """Chunk, summaries a chunk and window of a windowed layer."""
    window = min(w for w in args.windows if w is not None)
    return args.summary_chunk_size, args.summary_token_num, window


def random(heads: int, rows: int, args: ModelArgs, dtype: mx.Dtype) -> mx.array:
    return mx.random.normal((1, heads, rows, args.head_dim), dtype)


def decode(args: ModelArgs, n: int, dtype: mx.Dtype, bits: int, layers: int) -> Case:
    """One query after n tokens, on caches that are plain (16 bits or more) or quantised."""
    chunk, s, window = windowed(args)
    heads, kv_heads, dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    seen = n - max(0, (n - 1) // chunk - window) * (chunk - s)
    start, stop, row, affine = 32, 32 + seen, dim * dtype.size, 0
    if bits < 16:
        affine = dim // GROUP * 2 * dtype.size
        row = dim * bits // 8 + affine
    sdpa = partial(mx.fast.scaled_dot_product_attention, scale=dim**-0.5)
    kernel: list[Attend] = []
    ops: list[Attend] = []
    for _ in range(layers):
        cache = [random(kv_heads, stop + 32, args, dtype) for _ in range(2)]
        if bits < 16:
            cache = [mx.quantize(x, GROUP, bits) for x in cache]
            k, v = ([y[:, :, start:stop] for y in x] for x in cache)
            attend = partial(quantized_scaled_dot_product_attention, scale=dim**-0.5, mask=None)
            ops.append(partial(attend, q_keys=k, q_values=v, group_size=GROUP, bits=bits))
        else:
            k, v = (x[:, :, start:stop] for x in cache)
            ops.append(partial(sdpa, k=k, v=v))
        mx.eval(cache)
        keys, values = cache
        form = Affine(bits, GROUP) if bits < 16 else PLAIN
        segment = Segment(keys, values, start, stop, form)
        kernel.append(partial(decode_kernel, rows=[[segment]]))
    if bits < 16:
        floats = ([x[0], *(y.astype(mx.float32) for y in x[1:])] for x in cache)
        cache = [mx.dequantize(*x, GROUP, bits) for x in floats]
    k, v = (x[:, :, start:stop].astype(mx.float32) for x in cache)
    return Case(
        "decode" if bits >= 16 else f"decode, {bits} bit",
        n,
        random(heads, 1, args, dtype),
        kernel,
        ops,
        partial(sdpa, k=k, v=v),
        2 * kv_heads * seen * row,
        heads * seen,
        2 * kv_heads * seen * affine,
    )


def prefill(args: ModelArgs, n: int, dtype: mx.Dtype, rows: int) -> Case:
    """The last `rows` of n tokens, in one windowed layer."""
    k, s, window = windowed(args)
    heads, kv_heads, dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    rows = min(rows, n)
    offset, chunks = n - rows, max(0, (n - 1) // k - window)
    start, left = max(0, offset // k - window) * k, chunks * s
    step = Step.plan(args, offset, rows, chunks)
    keys, values = (random(kv_heads, n - start, args, dtype) for _ in range(2))
    held_k, held_v = (random(kv_heads, left + 32, args, dtype) for _ in range(2))
    visible = held_k[:, :, :left], held_v[:, :, :left]
    exact_k, exact_v, seen_k, seen_v = (x.astype(mx.float32) for x in (keys, values, *visible))
    where = layout([rows], [offset], [start], [left], k, s, window)
    mx.eval(keys, values, held_k, held_v, where)

    def seen(first, last):
        """Keys that some of the rows first .. last see."""
        return max(0, last // k - window) * s + last + 1 - max(0, first // k - window) * k

    tiles = ((a, min(a + 32, n) - 1) for a in range(offset, n, 32))
    return Case(
        f"prefill of {rows}",
        n,
        random(heads, rows, args, dtype),
        [lambda q: prefill_kernel(q, keys, values, held_k, held_v, where)],
        [lambda q: prefill_ops(q, keys, values, start, visible, step, window)],
        lambda q: prefill_ops(q, exact_k, exact_v, start, (seen_k, seen_v), step, window),
        2 * heads * dim * dtype.size * sum(seen(a, b) for a, b in tiles),
        heads * sum(seen(p, p) for p in range(offset, n)),
    )


def cases(
    args: ModelArgs, contexts: Sequence[int], dtype: mx.Dtype, layers: int, rows: int
) -> Iterator[Case]:
    """All kernels at each context; prefill where text has left the window, MLX's before."""
    k, _, window = windowed(args)
    for n in contexts:
        for bits in (16, 8, 4):
            yield decode(args, n, dtype, bits, layers)
        if n > (window + 1) * k:
            yield prefill(args, n, dtype, rows)


def chain(layers: list[Attend], x: mx.array) -> mx.array:
    for layer in layers:
        x = layer(x)
    return x


def error(case: Case) -> float:
    """The kernel's largest difference from float32 attention, a share of the largest value."""
    got = case.kernel[-1](case.queries).astype(mx.float32)
    expected = case.exact(case.queries.astype(mx.float32))
    return (mx.abs(got - expected).max() / mx.abs(expected).max()).item()


def measure(case: Case, steps: int, turns: int) -> dict[str, Any]:
    """Seconds of a layer by the kernel, by MLX's operations, and of a copy, in turns."""
    block = mx.ones(COPY_BYTES // 4)
    runs = {
        "kernel": lambda: mx.eval(chain(case.kernel, case.queries)),
        "ops": lambda: mx.eval(chain(case.ops, case.queries)),
        "copy": lambda: mx.eval(-block),
    }
    turns = steps if case.queries.shape[2] == 1 else turns
    with bar(f"{case.name} at {case.context} tokens", WARMUP + turns) as tick:
        seconds = in_turns(runs, turns, WARMUP, tick)
    layer, ops = (float(np.median(seconds[r])) / len(case.kernel) for r in ("kernel", "ops"))
    return {
        "kernel": case.name,
        "context": case.context,
        "error": error(case),
        "kernel_ms": layer * 1e3,
        "ops_ms": ops * 1e3,
        "faster": ratio(seconds["ops"], seconds["kernel"]),
        "gb_s": case.visible / layer / 1e9,
        "copy_gb_s": 2 * block.nbytes / float(np.median(seconds["copy"])) / 1e9,
        "gflops": 4 * case.pairs * case.queries.shape[-1] / layer / 1e9,
    }


def count(case: Case, log) -> dict[str, Any]:
    """What the launches of one layer's attention do, as the instrument saw it."""
    log.clear()
    mx.eval(case.kernel[0](case.queries))
    launches = list(log.launches)
    loaded = {
        f"{launch.kernel} {name}": traffic.loaded_bytes
        for launch in launches
        for name, traffic in launch.buffers.items()
        if traffic.loaded_bytes and not name.endswith("_shape")
    }

    def total(what):
        return sum(getattr(launch, what) for launch in launches)

    def of_cache(*kinds):
        return sum(n for name, n in loaded.items() if any(kind in name for kind in kinds))

    return {
        "kernel": case.name,
        "context": case.context,
        "error": error(case),
        "visible": case.visible,
        "visible_affine": case.affine,
        "keys": of_cache("keys"),
        "values": of_cache("values"),
        "affine": of_cache("scales", "biases"),
        "loaded_by_buffer": loaded,
        "launches": len(launches),
        "threadgroups": total("threadgroups"),
        "barriers": total("threadgroup_barriers"),
        "matrix_loads": total("matrix_loads"),
        "matrix_multiplies": total("matrix_multiplies"),
        "threadgroup_bytes": max(launch.threadgroup_bytes for launch in launches),
    }


def times_table() -> Table:
    return Table(
        "Medians, one layer; MLX / kernel: ratio of the times of MLX's operations and the kernel,\n"
        "turn by turn (quartiles). GB/s: keys and values that the queries see, once a KV head in\n"
        "decode, once for 32 rows of a head in prefill (whose threadgroups may find them in a\n"
        f"cache). A copy reads and writes.\n{ERROR}",
        [
            ("kernel", 16),
            ("context,\ntokens", 9),
            ("kernel,\nms", 9),
            ("MLX,\nms", 9),
            ("MLX / kernel", 18),
            ("kernel,\nGB/s", 9),
            ("copy,\nGB/s", 8),
            ("kernel,\nGFLOP/s", 10),
            ("error", 9),
        ],
    )


def times_cells(r: dict[str, Any]) -> list[str]:
    return [
        r["kernel"],
        str(r["context"]),
        f"{r['kernel_ms']:.3f}",
        f"{r['ops_ms']:.3f}",
        spread(r["faster"]),
        f"{r['gb_s']:.1f}",
        f"{r['copy_gb_s']:.1f}",
        f"{r['gflops']:.0f}",
        f"{r['error']:.1e}",
    ]


def counts_table() -> Table:
    return Table(
        "Exact counts of one layer's attention, executed on the CPU: no times. Visible: bytes of\n"
        "keys and values that the queries see, once a KV head in decode, once for 32 rows of a\n"
        "head in prefill; loaded / visible without scales and biases, which many lanes share.\n"
        "Barriers: passed by whole threadgroups.\n" + ERROR,
        [
            ("kernel", 16),
            ("context,\ntokens", 9),
            ("visible", 10),
            ("loaded /\nvisible", 9),
            ("launches", 9),
            ("thread-\ngroups", 8),
            ("barriers", 9),
            ("matrix\nloads", 8),
            ("matrix\nproducts", 9),
            ("error", 9),
        ],
    )


def counts_cells(r: dict[str, Any]) -> list[str]:
    names = ("launches", "threadgroups", "barriers", "matrix_loads", "matrix_multiplies")
    return [
        r["kernel"],
        str(r["context"]),
        size(r["visible"]),
        f"{(r['keys'] + r['values']) / (r['visible'] - r['visible_affine']):.3f}",
        *(str(r[name]) for name in names),
        f"{r['error']:.1e}",
    ]


def on_metal() -> bool:
    return mx.metal.is_available() and mx.default_device() == mx.gpu


def check_device(instrument: Any):
    """Raises KSAError if there is neither Metal nor an instrument that runs."""
    if on_metal():
        return
    needs = "--kernels: no Metal device here; expected a Mac"
    if instrument is None:
        raise KSAError(
            f"{needs}. In a clone with clang, python -m tests.count_kernels counts what they do"
        )
    if not instrument.available():
        raise KSAError(f"{needs}, or what executes kernels on a CPU: {instrument.unavailable()}")


def run(
    args: ModelArgs,
    contexts: Sequence[int],
    dtype: mx.Dtype,
    steps: int,
    turns: int,
    results: Results,
    instrument: Any = None,
):
    """Measure or count all kernels at these contexts: lines printed, rows added to the results.

    Args:
        args: the shape.
        contexts: tokens.
        dtype: of queries and plain caches.
        steps: turns of decode.
        turns: turns of prefill.
        results: gets a row a kernel and context, as "kernels".
        instrument: without Metal, what executes kernels, as tests/metal_cpu does.
    """
    if on_metal():
        table = times_table()
        for case in cases(args, contexts, dtype, LAYERS, ROWS):
            row = measure(case, steps, turns)
            results.add("kernels", row)
            table.add(*times_cells(row))
        return
    table = counts_table()
    with instrument.running(reload=[metal]) as log:
        for case in cases(args, contexts, dtype, 1, COUNTED_ROWS):
            with bar(f"executing {case.name} at {case.context} tokens"):
                row = count(case, log)
            results.add("kernels", row)
            table.add(*counts_cells(row))
