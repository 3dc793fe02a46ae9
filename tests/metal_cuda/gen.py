"""Write a Metal kernel as CUDA: the same text without address spaces, over metal.cuh."""

import re
from collections.abc import Iterable
from pathlib import Path

from ..metal_cpu.wrap import KernelSource, place_threadgroup_variables

HERE = Path(__file__).parent

_GRID = "dim3(gridDim.x * blockDim.x, gridDim.y * blockDim.y, gridDim.z * blockDim.z)"
_INDEX = "(threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z))"
# Thread attributes by name, for grids of whole threadgroups, as CUDA has them.
ATTRIBUTES = {
    "simdgroup_index_in_threadgroup": ("uint", f"{_INDEX} / 32"),
    "thread_index_in_simdgroup": ("uint", f"{_INDEX} % 32"),
    "thread_index_in_threadgroup": ("uint", _INDEX),
    "thread_position_in_grid": (
        "uint3",
        "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, "
        "blockIdx.z * blockDim.z + threadIdx.z)",
    ),
    "thread_position_in_threadgroup": ("uint3", "threadIdx"),
    "threadgroup_position_in_grid": ("uint3", "blockIdx"),
    "threadgroups_per_grid": ("uint3", "gridDim"),
    "threads_per_grid": ("uint3", _GRID),
    "threads_per_threadgroup": ("uint3", "blockDim"),
}


def translate(metal: str) -> str:
    """Metal's text as CUDA's."""
    text = place_threadgroup_variables(metal, storage="threadgroup_variable<{type}, __COUNTER__>()")
    text = re.sub(r"^[ \t]*#include.*$|\busing namespace metal;", "", text, flags=re.MULTILINE)
    text = re.sub(r"\b(device|constant|thread|threadgroup)\s+(?=\w)", "", text)
    return re.sub(r"\binline\b", "__device__ __forceinline__", text)


def entry(kernel: KernelSource) -> str:
    """The name of a kernel's entry point."""
    return "cuda_" + re.sub(r"\W", "_", kernel.function)


def cuda_source(kernels: Iterable[KernelSource]) -> str:
    """One CUDA file with an entry point for each kernel, which takes a pointer for each buffer."""
    shim = (HERE / "metal.cuh").read_text(encoding="utf-8")
    parts = [shim.replace("// matrix.h", translate((HERE / "matrix.h").read_text("utf-8")))]
    for number, kernel in enumerate(kernels):
        if unknown := set(kernel.attributes) - set(ATTRIBUTES):
            raise NotImplementedError(f"thread attributes without a CUDA form: {sorted(unknown)}")
        values = [f"{'*' if a.reference else ''}{a.name}" for a in kernel.arguments]
        values += [ATTRIBUTES[name][1] for name in kernel.attributes]
        pointers = ", ".join(
            f"{'' if a.what == 'output' else 'const '}{a.pointee}* {a.name}"
            for a in kernel.arguments
        )
        function = re.sub(r"\[\[(?!kernel).*?\]\]", "", kernel.signature())
        function = function.replace("[[kernel]] void", "inline void")
        call = f"{kernel.function}{kernel.template_arguments()}({', '.join(values)})"
        parts.append(
            f"namespace metal {{ namespace kernel{number} {{\n"
            f'#line 1 "{kernel.name} header"\n{translate(kernel.header)}\n'
            f'#line 1 "{kernel.name} signature"\n{translate(function)}'
            f'#line 1 "{kernel.name}"\n{translate(kernel.body)}\n}}\n'
            f'extern "C" __global__ void {entry(kernel)}({pointers}) {{\n  {call};\n}}\n}}}}\n'
        )
    return "\n".join(parts)
