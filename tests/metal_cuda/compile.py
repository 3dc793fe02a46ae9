"""Compile CUDA sources to PTX, NVIDIA's assembly."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

NVCC = os.environ.get("NVCC", "nvcc")


class CompileError(Exception):
    """nvcc refused a source; the message holds its errors."""


def unavailable() -> str | None:
    """Why nothing can be compiled here, or None."""
    return (
        None
        if shutil.which(NVCC)
        else f"{NVCC} (of the CUDA toolkit; NVCC names another) not found"
    )


def ptx(source: str, arch: str = "sm_80") -> str:
    """The PTX of a CUDA source, with products and sums fused as nvcc likes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernels.cu"
        file.write_text(source, encoding="utf-8")
        # constexpr functions of the kernels' header run on the GPU as well.
        options = ["-std=c++17", f"-arch={arch}", "--expt-relaxed-constexpr", "-lineinfo", "-ptx"]
        command = [NVCC, *options, "-o", str(file.with_suffix(".ptx")), str(file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError((done.stdout + done.stderr)[:8000])
        return file.with_suffix(".ptx").read_text(encoding="utf-8")
