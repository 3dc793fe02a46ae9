"""A kernel of one test, run in the Metal instrument."""

import mlx.core as mx
import numpy as np

from . import metal_cpu

rng = np.random.default_rng(0)


def run(
    source, *inputs, shapes=((64,),), dtypes=(mx.float32,), threads=64, group=None, log=None, **more
):
    """Run a kernel with inputs x, y, z and outputs out, out2. Settings and arguments of the call go by name."""
    made = {
        k: more.pop(k) for k in ("header", "ensure_row_contiguous", "atomic_outputs") if k in more
    }
    called = {k: more.pop(k) for k in ("template", "init_value", "verbose") if k in more}
    grid = threads if isinstance(threads, tuple) else (threads, 1, 1)
    threadgroup = group or grid
    threadgroup = threadgroup if isinstance(threadgroup, tuple) else (threadgroup, 1, 1)
    with metal_cpu.running(**more) as launches:
        kernel = mx.fast.metal_kernel(
            "planted",
            ["x", "y", "z"][: len(inputs)],
            ["out", "out2"][: len(shapes)],
            source,
            **made,
        )
        outputs = kernel(
            inputs=list(inputs),
            output_shapes=shapes,
            output_dtypes=dtypes,
            grid=grid,
            threadgroup=threadgroup,
            **called,
        )
    if log is not None:
        log.append(launches.last)
    return outputs[0] if len(outputs) == 1 else outputs


def floats(*shape, dtype=mx.float32):
    return mx.array(rng.standard_normal(shape).astype(np.float32)).astype(dtype)


def same(a, b):
    a, b = (
        np.array(v.astype(mx.float32)) if isinstance(v, mx.array) else np.asarray(v, np.float32)
        for v in (a, b)
    )
    np.testing.assert_array_equal(a, b)
