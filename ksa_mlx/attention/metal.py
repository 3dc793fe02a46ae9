"""The Metal kernels' sources, and when a kernel runs instead of MLX's operations.

The sources are in `metal/`; each is the body of one `mx.fast.metal_kernel`. Operations, kernel and
the one that chooses stand side by side in `decode.py` and `prefill.py`. Summary rows need none:
MLX's attention computes all chunks in one launch (`summaries.py`).
"""

import functools
import os
import platform
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Bits and group sizes of quantised caches.
FORMATS = [(bits, group) for bits in (4, 8) for group in (32, 64)]

CHOICES = ("auto", "metal", "ops")


def source(name: str) -> str:
    """A file of `metal/`, which is in the installed package, or beside it in the repository."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here / "metal", here.parent / "metal"):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(
        f"{name}: not found in {here / 'metal'} or {here.parent / 'metal'}; reinstall ksa-mlx"
    )


@functools.lru_cache(None)
def kernel(name: str, inputs: str, headers: str = "common.h"):
    """The kernel in `name`.metal, with one output, `out`; inputs, headers: names with blanks."""
    return mx.fast.metal_kernel(
        name=f"ksa_{name}",
        input_names=inputs.split(),
        output_names=["out"],
        header="\n".join(source(header) for header in headers.split()),
        source=source(f"{name}.metal"),
    )


_override: str | None = None
_warned = False


@contextmanager
def using(choice: str):
    """Inside the block "metal" forces the kernels, "ops" MLX's operations, and "auto" chooses.

    The environment variable KSA_MLX_KERNELS does the same for a process; this wins over it.
    """
    global _override
    saved, _override = _override, _checked("kernels", choice)
    try:
        yield
    finally:
        _override = saved


def _checked(name: str, choice: str) -> str:
    if choice not in CHOICES:
        raise ValueError(f"{name}: found {choice!r}, expected auto, metal or ops")
    return choice


def wanted() -> str | None:
    """ "metal" or "auto" where a kernel may run, None where MLX's operations must.

    Raises ValueError for a KSA_MLX_KERNELS that is none of the choices.
    """
    choice = _override or os.environ.get("KSA_MLX_KERNELS", "auto")
    if choice == "metal":
        return choice
    if choice not in CHOICES:
        _checked("KSA_MLX_KERNELS", choice)
    if choice == "ops" or not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return None
    return choice


def takes(queries: mx.array, kv_heads: int, *dtypes: mx.Dtype) -> bool:
    """Whether the kernels take queries (B, heads, L, head_dim) on keys of these dtypes."""
    heads, dim = queries.shape[1], queries.shape[3]
    same = all(dtype == queries.dtype for dtype in dtypes) and queries.dtype in DTYPES
    return same and dim in HEAD_DIMS and heads <= 16 * kv_heads


@functools.lru_cache(None)
def agrees(name: str, dtype: mx.Dtype, difference: Callable, *key) -> bool:
    """Whether a kernel, once compiled, computes what MLX's operations do; warns if not.

    `difference(dtype, *key)`: the largest one on a small input; key: what makes the compiled
    kernel, head_dim first, then query heads a KV head.
    """
    try:
        worst = difference(dtype, *key)
        # MLX's own attention may use TF32 for float32 (M5).
        if worst <= {mx.float32: 5e-3, mx.float16: 1e-2, mx.bfloat16: 6e-2}[dtype]:
            return True
        found = f"differs from MLX's operations by {worst:.2g}"
    except (RuntimeError, ValueError) as error:
        found = f"does not run: {error}"
    dim, group, *rest = key
    _warn(f"{name} {found} ({dtype}, head_dim {dim}, {group} query heads a KV head, {rest})")
    return False


def _warn(found: str):
    """Say once in a process that a kernel is not used."""
    global _warned
    if _warned:
        return
    _warned = True
    info = mx.device_info() if hasattr(mx, "device_info") else {}
    warnings.warn(
        f"ksa-mlx: the Metal kernel {found}. MLX's operations are used instead: correct, but "
        f"slower. Please report this with: device {info.get('device_name', 'unknown')}, macOS "
        f"{platform.mac_ver()[0] or 'none'}, MLX {mx.__version__}",
        RuntimeWarning,
        stacklevel=2,
    )


def random(dtype: mx.Dtype, *shapes: tuple) -> list[mx.array]:
    """The same normal numbers at each call."""
    keys = mx.random.split(mx.random.key(0), len(shapes))
    return [
        mx.random.normal(shape, key=k).astype(dtype) for shape, k in zip(shapes, keys, strict=True)
    ]


def distance(queries: mx.array, keys: mx.array, values: mx.array, mask, got: mx.array) -> float:
    """The largest difference of `got` from MLX's attention; NaN if it is not all numbers."""
    expected = mx.fast.scaled_dot_product_attention(
        queries, keys, values, scale=queries.shape[-1] ** -0.5, mask=mask
    )
    return mx.abs(got.astype(mx.float32) - expected.astype(mx.float32)).max().item()
