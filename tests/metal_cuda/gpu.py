"""Launch kernels on an NVIDIA GPU through the driver's C interface, libcuda."""

import ctypes
from ctypes import byref, c_int, c_size_t, c_void_p
from functools import lru_cache

from .compile import ptx
from .gen import cuda_source, entry


class CudaError(RuntimeError):
    pass


def _call(name: str, *arguments):
    """Call a function of the driver."""
    code = getattr(_driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(code, byref(text))
        raise CudaError(f"{name}: {(text.value or b'').decode()} ({code})")


@lru_cache(None)
def _driver():
    return ctypes.CDLL("libcuda.so.1")


@lru_cache(None)
def _context() -> str:
    """Make the first GPU's context current; returns its architecture, such as sm_90."""
    device, context, version = c_int(), c_void_p(), [c_int(), c_int()]
    _call("cuInit", 0)
    _call("cuDeviceGet", byref(device), 0)
    for number, attribute in zip(version, (75, 76), strict=True):  # COMPUTE_CAPABILITY_MAJOR, MINOR
        _call("cuDeviceGetAttribute", byref(number), attribute, device)
    _call("cuDevicePrimaryCtxRetain", byref(context), device)
    _call("cuCtxSetCurrent", context)
    return f"sm_{version[0].value}{version[1].value}"


@lru_cache(None)
def _function(kernel) -> c_void_p:
    """The entry point of a KernelSource, on the GPU."""
    module, function = c_void_p(), c_void_p()
    _call("cuModuleLoadData", byref(module), ptx(cuda_source([kernel]), _context()).encode())
    _call("cuModuleGetFunction", byref(function), module, entry(kernel).encode())
    return function


def launch(source, buffers, outputs, record):
    """Run a kernel on numpy arrays, each in an allocation of its own size; see stand_in.running."""
    if any(n % m for n, m in zip(record.grid, record.threadgroup, strict=True)):
        raise NotImplementedError(f"{record.kernel}: the grid is not one of whole threadgroups")
    function, held = _function(source), []
    try:
        for array in (*buffers, *outputs):
            held.append(c_void_p())
            _call("cuMemAlloc_v2", byref(held[-1]), c_size_t(max(array.nbytes, 1)))
            host = c_void_p(array.ctypes.data)
            _call("cuMemcpyHtoD_v2", held[-1], host, c_size_t(array.nbytes))
        pointers = (c_void_p * len(held))(*(ctypes.addressof(p) for p in held))
        blocks = [n // m for n, m in zip(record.grid, record.threadgroup, strict=True)]
        _call("cuLaunchKernel", function, *blocks, *record.threadgroup, 0, None, pointers, None)
        _call("cuCtxSynchronize")
        for array, pointer in zip(outputs, held[len(buffers) :], strict=True):
            host = c_void_p(array.ctypes.data)
            _call("cuMemcpyDtoH_v2", host, pointer, c_size_t(array.nbytes))
    finally:
        for pointer in held:
            _call("cuMemFree_v2", pointer)
