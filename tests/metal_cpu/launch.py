"""Run a kernel library once, and say what it did."""

import ctypes
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from .build import code_lines
from .memory import extent
from .wrap import KernelSource

MEETINGS = (
    "threadgroup_barriers",
    "simdgroup_barriers",
    "simd_operations",
    "matrix_loads",
    "matrix_stores",
    "matrix_multiplies",
)
OPERATIONS = (
    "reductions",
    "quad_reductions",
    "votes",
    "broadcasts",
    "shuffles",
    "lane_shuffles",
    "exponentials",
)
CHECK_MEMORY, CHECK_LOCKSTEP, ALLOW_EQUAL_WRITES = 1, 2, 4


class KernelFault(Exception):
    """A kernel did something that it must not do. `kinds` holds the kind of each fault, such as "race"."""

    def __init__(self, kernel: str, report: str):
        self.kinds = [line.split(":")[0] for line in report.splitlines()]
        super().__init__(f"kernel {kernel}\n{report}")


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_uint64),
        ("touched", ctypes.c_void_p),
        ("loads", ctypes.c_uint64),
        ("loaded_bytes", ctypes.c_uint64),
        ("stores", ctypes.c_uint64),
        ("stored_bytes", ctypes.c_uint64),
        ("writable", ctypes.c_uint32),
        ("initialised", ctypes.c_uint32),
        ("itemsize", ctypes.c_uint64),
        ("name", ctypes.c_char_p),
    ]


class _Launch(ctypes.Structure):
    _fields_ = [
        ("buffers", ctypes.POINTER(_Buffer)),
        ("buffer_count", ctypes.c_uint64),
        ("grid", ctypes.c_uint32 * 3),
        ("threadgroup", ctypes.c_uint32 * 3),
        ("seed", ctypes.c_uint64),
        ("flags", ctypes.c_uint32),
        ("report_bytes", ctypes.c_uint32),
        ("report", ctypes.c_char_p),
        ("threadgroups", ctypes.c_uint64),
        ("threadgroup_bytes", ctypes.c_uint64),
        ("meetings", ctypes.c_uint64 * len(MEETINGS)),
        ("operations", ctypes.c_uint64 * len(OPERATIONS)),
    ]


@dataclass
class Traffic:
    """What a launch did with one buffer. Counted in checked runs only."""

    shape: tuple[int, ...]
    itemsize: int
    loads: int = 0  # load instructions, each of one thread; a float4 is one
    loaded_bytes: int = 0
    stores: int = 0
    stored_bytes: int = 0
    touched: np.ndarray | None = field(
        default=None, repr=False
    )  # inputs: bool, in the buffer's shape, True where a thread loaded the element

    @property
    def loaded_elements(self) -> int:
        return self.loaded_bytes // self.itemsize

    @property
    def stored_elements(self) -> int:
        return self.stored_bytes // self.itemsize

    @property
    def distinct_elements(self) -> int:
        """Elements of an input that were loaded at least once."""
        return int(self.touched.sum())


@dataclass
class Launch:
    """One call of a kernel."""

    kernel: str
    grid: tuple[int, int, int]
    threadgroup: tuple[int, int, int]
    template: dict = field(default_factory=dict)
    threadgroups: int = 0
    threadgroup_bytes: int = 0  # threadgroup memory of each threadgroup
    threadgroup_barriers: int = 0  # passed by whole threadgroups
    simdgroup_barriers: int = 0  # this and the next: passed by whole simdgroups
    simd_operations: int = 0  # the sum of the next six
    reductions: int = 0  # simd_sum, simd_max and the like, prefix sums
    quad_reductions: int = 0
    votes: int = 0  # simd_ballot, simd_any, simd_all
    broadcasts: int = 0  # also a simd_shuffle with the same index in all lanes
    shuffles: int = 0  # from lane ^ mask or lane +- delta, the same mask or delta in all lanes
    lane_shuffles: int = 0  # with an index that depends on the lane in any other way
    exponentials: int = 0  # exp, exp2, exp10; counted in checked runs only
    matrix_loads: int = 0
    matrix_stores: int = 0
    matrix_multiplies: int = 0
    buffers: dict[str, Traffic] = field(default_factory=dict)  # inputs and outputs by name
    copies: dict[str, int] = field(
        default_factory=dict
    )  # inputs that were not row-contiguous: bytes copied
    seconds: float = 0.0
    source: KernelSource | None = field(default=None, repr=False)  # what `registers` and `mix` take


@cache
def _load(library: Path):
    entry = ctypes.CDLL(str(library)).metal_cpu_launch
    entry.argtypes, entry.restype = [ctypes.POINTER(_Launch)], ctypes.c_int
    return entry


def run(
    library: Path,
    names,
    arrays,
    writable,
    record: Launch,
    *,
    seed: int,
    flags: int,
    initialised: bool,
) -> None:
    """Run with numpy arrays as buffers, in place, and add the counts to `record`. Raises KernelFault."""
    buffers = (_Buffer * len(arrays))()
    touched = {}
    for buffer, name, array, is_output in zip(buffers, names, arrays, writable, strict=True):
        buffer.data, buffer.bytes, buffer.name = array.ctypes.data, extent(array), name.encode()
        buffer.itemsize = array.itemsize
        buffer.writable, buffer.initialised = is_output, is_output and initialised
        if flags & CHECK_MEMORY and not is_output:
            touched[name] = np.zeros(buffer.bytes, np.uint8)
            buffer.touched = touched[name].ctypes.data
    report = ctypes.create_string_buffer(16384)
    request = _Launch(
        buffers, len(arrays), (ctypes.c_uint32 * 3)(*record.grid), (ctypes.c_uint32 * 3)(*record.threadgroup),
        seed, flags, len(report), ctypes.cast(report, ctypes.c_char_p),
    )  # fmt: skip
    if _load(library)(ctypes.byref(request)):
        raise KernelFault(record.kernel, _with_lines(library, report.value.decode()))
    record.threadgroups, record.threadgroup_bytes = request.threadgroups, request.threadgroup_bytes
    for kinds, counts in ((MEETINGS, request.meetings), (OPERATIONS, request.operations)):
        for name, count in zip(kinds, counts, strict=True):
            setattr(record, name, count)
    for buffer, name, array in zip(buffers, names, arrays, strict=True):
        traffic = Traffic(
            array.shape,
            array.itemsize,
            buffer.loads,
            buffer.loaded_bytes,
            buffer.stores,
            buffer.stored_bytes,
        )
        if name in touched:
            bytewise = np.lib.stride_tricks.as_strided(
                touched[name], (*array.shape, array.itemsize), (*array.strides, 1)
            )
            traffic.touched = bytewise.any(axis=-1)
        record.buffers[name] = traffic


def _with_lines(library: Path, report: str) -> str:
    places = code_lines(library, sorted(set(re.findall(r"@(0x[0-9a-f]+)", report))))
    return re.sub(r"@(0x[0-9a-f]+)", lambda m: "at " + places[m.group(1)], report)
