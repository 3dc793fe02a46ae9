"""Find the private variables of a kernel that a GPU would have to keep in memory.

Registers have no addresses: an array, or a struct that holds one, lives in them only if every index
into it is known once the loops are unrolled. Left to itself a compiler unrolls what it thinks worth it,
and an attention kernel whose sums stay in memory reads and writes them for every key. clang's optimizer,
which Apple's compiler is built on, shows what is left over after all that it was told to unroll.
"""

import re
import shlex
import tempfile
from functools import lru_cache
from pathlib import Path

from . import build, live, wrap

OPTIMIZED = shlex.split(
    "-O2 -fno-vectorize -fno-slp-vectorize -mllvm -inline-threshold=1000000 "
    "-DMETAL_CPU_FAST_NOISE=0 -S -emit-llvm"
)
# Calls of the instrument's own: operands of simd operations, 32 lanes of 1 or 2 values.
OWN = re.compile(r'%"struct\.metal(::|_)|\[(32|64) x (float|i32)\]|(float|i32|half|bfloat)$')


def in_memory(kernel: wrap.KernelSource) -> list[str]:
    """LLVM's types of the private variables that stay in memory; CompileError from clang."""
    held = re.findall(r"= alloca (.*?), align", optimized(kernel))
    return sorted({x for x in held if "simdgroup_matrix" in x or not OWN.match(x)})


def live_floats(kernel: wrap.KernelSource) -> float:
    """The most float registers a lane that live across the header of one of its loops, see live.py."""
    return live.live_floats(optimized(kernel))


@lru_cache(maxsize=64)
def optimized(kernel: wrap.KernelSource) -> str:
    """The kernel in LLVM's textual form, after clang's optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        cpp, ir = Path(folder) / "kernel.cpp", Path(folder) / "kernel.ll"
        cpp.write_text(wrap.cpu_source(kernel))
        flags = [*build.COMMON, *build.KERNEL, *OPTIMIZED, "-I", str(build.HERE / "include")]
        done = build.run([build.COMPILER, *flags, str(cpp), "-o", str(ir)])
        if done.returncode:
            raise build.CompileError(done.stderr[:8000])
        return ir.read_text()
