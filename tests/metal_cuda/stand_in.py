"""Another stand-in for mx.fast.metal_kernel, which leaves the launch to a function."""

import importlib
from contextlib import contextmanager

import mlx.core as mx

from .. import metal_cpu
from ..metal_cpu import kernel as cpu
from ..metal_cpu import memory


@contextmanager
def running(launch, reload=()):
    """Let kernels be launched inside the block by launch(source, buffers, outputs, record).

    source: a metal_cpu KernelSource. buffers, outputs: numpy arrays, in the order of its arguments;
    outputs are poisoned. record: a metal_cpu Launch with grid and threadgroup. reload: as in
    `metal_cpu.running`. Yields metal_cpu's Log, without counts.
    """

    class metal_kernel(metal_cpu.metal_kernel):
        def _run(self, source, buffers, output_shapes, output_dtypes, init_value, record):
            given = zip(output_shapes, output_dtypes, strict=True)
            outputs = [memory.new_output(s, d, init_value) for s, d in given]
            launch(source, buffers, outputs, record)
            arrays = zip(map(mx.array, outputs), output_dtypes, strict=True)
            return [x.view(d) if d == mx.bfloat16 else x for x, d in arrays]

    real, cpu._log = mx.fast.metal_kernel, metal_cpu.Log()
    mx.fast.metal_kernel = metal_kernel
    try:
        for module in reload:
            importlib.reload(module)
        yield cpu._log
    finally:
        mx.fast.metal_kernel = real
        for module in reload:
            importlib.reload(module)
