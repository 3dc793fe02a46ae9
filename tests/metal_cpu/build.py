"""Compile kernels with clang, and keep the libraries by content."""

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from functools import lru_cache
from pathlib import Path

HERE = Path(__file__).parent
COMPILER = os.environ.get("METAL_CPU_CXX", "clang++-19")

COMMON = shlex.split(
    "-std=c++17 -march=x86-64-v3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -fno-threadsafe-statics "
    "-fno-strict-aliasing -gline-tables-only"
)
RUNTIME = shlex.split("-O2 -fno-omit-frame-pointer")
KERNEL = shlex.split(
    "-nostdinc++ -Xclang -ffloat16-excess-precision=none -fno-math-errno "
    "-Wno-unknown-attributes -Wno-ignored-attributes -Wno-duplicate-decl-specifier -Wno-gcc-compat"
)
FAST = ["-O2"]
# Vectorised loads would be too wide for the callbacks, and would blur the counts.
CHECKED = shlex.split(
    "-O1 -DMETAL_CPU_COUNT -fsanitize=thread,bounds,alignment,integer-divide-by-zero,signed-integer-overflow,shift-exponent "
    "-mllvm -tsan-instrument-atomics=0 -mllvm -tsan-instrument-func-entry-exit=0 "
    "-mllvm -tsan-instrument-read-before-write=1"
)
# Nothing inlined: the call stack tells lanes apart that came to a simd operation by different ways.
LOCKSTEP = shlex.split("-O0 -fno-omit-frame-pointer -DMETAL_CPU_LOCKSTEP")


class CompileError(Exception):
    """clang refused a kernel; the message holds its errors."""


def run(command: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def _compile(command: list[str]) -> None:
    done = run(command)
    if done.returncode:
        raise CompileError(done.stderr[:8000])


@lru_cache
def unavailable() -> str | None:
    """Why kernels cannot run here, or None if they can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "the Metal instrument needs Linux on x86-64"
    if not shutil.which(COMPILER):
        return f"the Metal instrument needs {COMPILER} (apt install clang-19), or METAL_CPU_CXX set to it"
    version = run([COMPILER, "--version"]).stdout
    found = re.search(r"version (\d+)", version)
    if not found or int(found.group(1)) < 18:
        return f"the Metal instrument needs clang 18 or later, and {COMPILER} is: {version.splitlines()[:1]}"
    if not (flags := Path("/proc/cpuinfo")).exists() or not {"avx2", "fma", "f16c"} <= set(
        flags.read_text().split()
    ):
        return "the Metal instrument needs a CPU with AVX2, FMA and F16C"
    return None


def cache_directory() -> Path:
    """METAL_CPU_CACHE, or a folder in the user's cache directory."""
    if chosen := os.environ.get("METAL_CPU_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "metal_cpu"


@lru_cache
def _instrument_hash() -> str:
    """The compiler and every file that a kernel library is made of, besides its own source."""
    digest = hashlib.sha256(run([COMPILER, "--version"]).stdout.encode())
    for path in sorted([*HERE.glob("runtime/*"), *HERE.glob("include/**/*")]):
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _cached(suffix: str, content: str, make) -> Path:
    """The file for `content`, which make(path) writes. Several processes may want it: the last rename wins."""
    path = cache_directory() / (
        hashlib.sha256((content + _instrument_hash()).encode()).hexdigest()[:24] + suffix
    )
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".building-") as folder:
            make(Path(folder) / path.name)
            os.replace(Path(folder) / path.name, path)
    return path


def _runtime_objects() -> list[str]:
    flags = [*COMMON, *RUNTIME]

    def compile_part(source: str) -> str:
        command = [COMPILER, *flags, "-c", str(HERE / "runtime" / source), "-o"]
        return str(_cached(".o", f"{source} {flags}", lambda to: _compile([*command, str(to)])))

    return [compile_part("fibers.cpp"), compile_part("checker.cpp")]


def kernel_flags(check, contract: str, fast_noise: int) -> list[str]:
    kind = {True: CHECKED, False: FAST, "lockstep": LOCKSTEP}[check]
    arithmetic = [f"-ffp-contract={contract}", f"-DMETAL_CPU_FAST_NOISE={fast_noise}"]
    return [*COMMON, *KERNEL, *kind, *arithmetic]


def build(source: str, flags: list[str]) -> Path:
    """The shared library for a kernel's C++ source."""
    runtime = _runtime_objects()

    def compile_kernel(to: Path):
        cpp, obj = to.with_suffix(".cpp"), str(to.with_suffix(".o"))
        cpp.write_text(source)
        _compile([COMPILER, *flags, "-I", str(HERE / "include"), "-c", str(cpp), "-o", obj])
        # Without -fsanitize here: the callbacks are the runtime's.
        _compile([COMPILER, "-shared", "-Wl,-Bsymbolic", obj, *runtime, "-o", str(to), "-lm"])

    return _cached(".so", " ".join(flags) + source, compile_kernel)


def code_lines(library: Path, addresses: list[str]) -> dict[str, str]:
    """Name the source line of each code address: the innermost one outside of the shim."""
    names = {}
    for address in addresses:
        inlined = run(["addr2line", "-i", "-e", str(library), address]).stdout.splitlines()
        own = [line for line in inlined if not line.startswith(str(HERE))]
        line = (own or inlined or [address])[0]
        names[address] = os.path.basename(line.split(" (")[0])
    return names
