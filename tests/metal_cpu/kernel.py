"""A stand-in for mx.fast.metal_kernel that runs kernels on the CPU."""

import importlib
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import mlx.core as mx
import numpy as np

from . import build, launch, lint, memory, wrap


@dataclass(frozen=True)
class Settings:
    """How kernels run inside `running`.

    check: True checks memory, races and divergence, and counts; False only runs, several times faster; "lockstep"
        checks only that lanes meet by the same path: the same calls, the same loop iterations (do-while loops do
        not compile).
    orders: run each launch in so many orders of its threads (ascending, descending, then shuffled); the outputs
        must be the same to the bit, or it is a fault.
    seed: the first order; 0 ascending, 1 descending, others shuffled.
    contract: "off" or "fast", whether a * b + c may become one fused operation.
    fast_noise: fast:: functions are off by up to so many units in the last place.
    allow_equal_writes: let threads race to write the value that is already there.
    lint: refuse what clang takes and Metal does not, before the first launch of each kernel.
    """

    check: bool | str = True
    orders: int = 1
    seed: int = 0
    contract: str = "off"
    fast_noise: int = 0
    allow_equal_writes: bool = False
    lint: bool = False


@dataclass
class Log:
    """The launches inside a `running` block, in order."""

    launches: list[launch.Launch] = field(default_factory=list)

    def of(self, kernel: str) -> list[launch.Launch]:
        """The launches of kernels whose name starts so."""
        return [one for one in self.launches if one.kernel.startswith(kernel)]

    @property
    def last(self) -> launch.Launch:
        return self.launches[-1]

    def clear(self) -> None:
        self.launches.clear()


_settings = Settings()
_log = Log()


class metal_kernel:  # in lower case, as it takes the place of a function
    """Same constructor and call as mx.fast.metal_kernel; see `running` for how kernels run."""

    def __init__(
        self,
        name,
        input_names,
        output_names,
        source,
        header="",
        ensure_row_contiguous=True,
        atomic_outputs=False,
        compile_options=None,
    ):
        if not output_names:
            raise ValueError("[metal_kernel] Must specify at least one output.")
        self.name, self.source, self.header = name, source, header
        self.input_names, self.output_names = list(input_names), list(output_names)
        self.ensure_row_contiguous, self.atomic_outputs = ensure_row_contiguous, atomic_outputs
        self._sources, self._linted = {}, set()

    def __call__(
        self,
        *,
        inputs,
        output_shapes,
        output_dtypes,
        grid,
        threadgroup,
        template=None,
        init_value=None,
        verbose=False,
        stream=None,
    ):
        for given, wanted, what in (
            (inputs, self.input_names, "inputs"),
            (output_shapes, self.output_names, "output_shapes"),
            (output_dtypes, self.output_names, "output_dtypes"),
        ):
            if len(given) != len(wanted):
                raise ValueError(
                    f"[metal_kernel] Expected `{what}` to have size {len(wanted)} but got size {len(given)}."
                )
        if np.prod(threadgroup) > 1024:
            raise ValueError(
                f"Thread group size ({np.prod(threadgroup)}) is greater than the maximum allowed (1024)."
            )
        began = time.perf_counter()
        inputs = [x if isinstance(x, mx.array) else mx.array(x) for x in inputs]
        mx.eval(inputs)
        kernel = self.for_types(inputs, output_dtypes, template)
        if verbose:
            print(
                f"Generated source code for `{self.name}`:\n```\n{wrap.metal_source(kernel)}\n```"
            )

        record = launch.Launch(
            self.name, tuple(grid), tuple(threadgroup), dict(template or ()), source=kernel
        )
        given = dict(
            zip(
                self.input_names,
                (self._buffer(x, n, record) for x, n in zip(inputs, self.input_names, strict=True)),
                strict=True,
            )
        )
        buffers = []
        for argument in kernel.arguments:
            array = given.get(argument.of)  # None for outputs
            if argument.what == "data":
                buffers.append(array)
            elif argument.what == "shape":
                buffers.append(np.array(array.shape, np.int32))
            elif argument.what == "strides":
                buffers.append(np.array([s // array.itemsize for s in array.strides], np.int64))
            elif argument.what == "ndim":
                buffers.append(np.array(array.ndim, np.int32))
        outputs = self._run(kernel, buffers, output_shapes, output_dtypes, init_value, record)
        record.seconds = time.perf_counter() - began
        _log.launches.append(record)
        return outputs

    def for_types(self, inputs, output_dtypes, template) -> wrap.KernelSource:
        """The kernel for inputs of these types and sizes; `wrap` and `lint` take it."""
        return wrap.kernel_source(
            self.name, self.header, self.source, self.input_names, inputs, self.output_names, output_dtypes,
            template, self.atomic_outputs,
        )  # fmt: skip

    def _buffer(self, x: mx.array, name: str, record: launch.Launch) -> np.ndarray:
        array = memory.to_numpy(x)
        if self.ensure_row_contiguous and not array.flags.c_contiguous:
            record.copies[name] = array.nbytes
            return memory.place(np.ascontiguousarray(array), offset=0)
        return memory.place(array, memory.offset(array))

    def _run(self, kernel, buffers, output_shapes, output_dtypes, init_value, record):
        settings = _settings
        if settings.lint and kernel not in self._linted:
            lint.check(kernel)
            self._linted.add(kernel)
        source = self._sources.get(kernel) or self._sources.setdefault(
            kernel, wrap.cpu_source(kernel)
        )
        library = build.build(
            source, build.kernel_flags(settings.check, settings.contract, settings.fast_noise)
        )
        flags = {True: launch.CHECK_MEMORY, False: 0, "lockstep": launch.CHECK_LOCKSTEP}[
            settings.check
        ]
        flags |= launch.ALLOW_EQUAL_WRITES * settings.allow_equal_writes
        names = [a.name for a in kernel.arguments]
        writable = [a.what == "output" for a in kernel.arguments]
        first = None
        for seed in range(settings.seed, settings.seed + settings.orders):
            outputs = [
                memory.new_output(s, d, init_value)
                for s, d in zip(output_shapes, output_dtypes, strict=True)
            ]
            launch.run(
                library, names, buffers + outputs, writable, record,
                seed=seed, flags=flags, initialised=init_value is not None,
            )  # fmt: skip
            for name, a, b in zip(self.output_names, outputs, first or outputs, strict=True):
                if a.tobytes() != b.tobytes():
                    raise launch.KernelFault(
                        self.name,
                        f"order: output {name} depends on the order of threads (seed {seed})",
                    )
            first = outputs
        return [
            mx.array(o).view(d) if d == mx.bfloat16 else mx.array(o)
            for o, d in zip(first, output_dtypes, strict=True)
        ]


@contextmanager
def running(reload=(), pretend_gpu: bool = True, **settings):
    """Let mx.fast.metal_kernel run on the CPU inside the block, as Settings(**settings) says. Yields the Log.

    reload: modules that made kernels when they were imported; they are reloaded now, and again at the end. Their
        functions stay valid, also where others imported them by name.
    pretend_gpu: mx.metal.is_available() is True and mx.default_device() is the GPU, for code that asks.
    """
    if reason := build.unavailable():
        raise RuntimeError(reason)
    global _settings, _log
    saved = _settings, _log
    _settings, _log = Settings(**settings), Log()
    patches = [(mx.fast, "metal_kernel", metal_kernel)]
    if pretend_gpu:
        gpu = mx.Device(mx.gpu)
        patches += [(mx.metal, "is_available", lambda: True), (mx, "default_device", lambda: gpu)]
    originals = [(where, name, getattr(where, name)) for where, name, _ in patches]
    for where, name, value in patches:
        setattr(where, name, value)
    try:
        for module in reload:
            importlib.reload(module)
        yield _log
    finally:
        for where, name, value in originals:
            setattr(where, name, value)
        _settings, _log = saved
        for module in reload:
            importlib.reload(module)


@contextmanager
def settings(**changes):
    """Change some settings for a while, inside `running`."""
    global _settings
    saved, _settings = _settings, replace(_settings, **changes)
    try:
        yield
    finally:
        _settings = saved
