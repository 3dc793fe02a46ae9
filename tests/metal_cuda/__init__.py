"""Compile Metal kernels for NVIDIA's GPUs with nvcc, and run them there. See README.md."""

from .compile import CompileError, ptx, unavailable
from .gen import cuda_source, entry

__all__ = ["CompileError", "cuda_source", "entry", "ptx", "unavailable"]
