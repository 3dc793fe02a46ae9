"""Buffers: between mx.array and the memory that a kernel sees."""

import ctypes
from functools import lru_cache

import mlx.core as mx
import numpy as np

ALIGNMENT = 256
POISON = 0xFF  # a NaN, or a large number, in every type


def to_numpy(x: mx.array) -> np.ndarray:
    """The memory of an evaluated array, without a copy; bfloat16 as uint16."""
    return np.array(x.view(mx.uint16) if x.dtype == mx.bfloat16 else x, copy=False)


@lru_cache
def _allocation_offset() -> int:
    """Where MLX's CPU allocator puts a new array, modulo 16. On a GPU it would be 0."""
    return to_numpy(mx.contiguous(mx.ones((64,)) + 1)).ctypes.data % 16


def offset(array: np.ndarray) -> int:
    """How far from 16-byte alignment the array would start on a GPU: a slice may start anywhere."""
    return (array.ctypes.data - _allocation_offset()) % 16


def extent(array: np.ndarray) -> int:
    """Bytes from the first element to the end of the last one."""
    if min(array.strides, default=0) < 0:
        raise NotImplementedError("inputs with negative strides and ensure_row_contiguous=False")
    if array.size == 0:
        return 0
    return (
        sum((n - 1) * s for n, s in zip(array.shape, array.strides, strict=True)) + array.itemsize
    )


def _room(nbytes: int, offset: int) -> np.ndarray:
    """Poisoned bytes, `offset` after an aligned address, with poison around them."""
    room = np.empty(nbytes + 3 * ALIGNMENT, np.uint8)
    start = ALIGNMENT + -room.ctypes.data % ALIGNMENT + offset
    room[:start], room[start + nbytes :] = POISON, POISON
    return room[start : start + nbytes]


def place(array: np.ndarray, offset: int) -> np.ndarray:
    """A copy of the array with its strides, in memory of its own."""
    nbytes = extent(array)
    room = _room(nbytes, offset)
    ctypes.memmove(room.ctypes.data, array.ctypes.data, nbytes)
    return np.lib.stride_tricks.as_strided(room.view(array.dtype), array.shape, array.strides)


def new_output(shape, dtype: mx.Dtype, init_value) -> np.ndarray:
    """A row-contiguous output: filled with init_value, or poisoned, as MLX leaves outputs uninitialised."""
    like = to_numpy(mx.array([init_value or 0.0]).astype(dtype))
    size = int(np.prod(shape, dtype=np.int64))
    output = _room(size * like.itemsize, 0).view(like.dtype).reshape(shape)
    if init_value is None:
        output.reshape(-1).view(np.uint8)[:] = POISON
    else:
        output[...] = like[0]
    return output
