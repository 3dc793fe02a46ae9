"""The Metal kernels' sources, and whether a kernel may run instead of MLX's operations.

The sources are in `metal/`; each is the body of one `mx.fast.metal_kernel`. Operations and kernel
stand side by side in `decode.py` and `prefill.py`; `choice.py` says which is taken. Summary rows
need none: MLX's attention computes all chunks in one launch (`summaries.py`).
"""

import functools
import os
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

from ..cache.storage import Form
from ..errors import KSAError

HEAD_DIMS = (32, 64, 80, 96, 128, 256)
DTYPES = (mx.float32, mx.float16, mx.bfloat16)

# Head dims for which MLX's attention of few rows has a kernel of its own.
VECTOR_DIMS = (64, 96, 128, 256)

# What KSA_MLX_KERNELS may say, and what it says then.
CHOICES = {
    "auto": "whichever was found to be right, and then the fastest",
    "metal": "always the kernels",
    "ops": "always MLX's operations",
    "retune": "as auto, measured anew",
}


def folders() -> tuple[Path, Path]:
    """Where `metal/` may be: in the installed package, or beside it in the repository."""
    here = Path(__file__).resolve().parents[1]
    return here / "metal", here.parent / "metal"


def source(name: str) -> str:
    """A file of `metal/`."""
    some, others = folders()
    for folder in (some, others):
        if (folder / name).is_file():
            return (folder / name).read_text(encoding="utf-8")
    raise FileNotFoundError(f"{name}: not found in {some} or {others}; reinstall ksa-mlx")


def files() -> list[Path]:
    """All sources and headers."""
    folder = next(x for x in folders() if x.is_dir())
    return sorted(x for x in folder.iterdir() if x.suffix in (".metal", ".h"))


@functools.lru_cache(None)
def kernel(
    name: str, inputs: str, headers: str = "common.h", variant: str | None = None, before: str = ""
):
    """The kernel in `name`.metal, with one output, `out`; inputs, headers: names with blanks.

    variant: its name with these declarations, which come before the body.
    """
    return mx.fast.metal_kernel(
        name=f"ksa_{variant or name}",
        input_names=inputs.split(),
        output_names=["out"],
        header="\n".join(source(header) for header in headers.split()),
        source=before + source(f"{name}.metal"),
    )


_override: str | None = None
_warned = False


@contextmanager
def using(choice: str):
    """Inside the block "metal" forces the kernels, "ops" MLX's operations; "auto" chooses, and
    "retune" too, by what it measures now.

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
        raise KSAError(f"{name}: found {choice!r}, expected auto, metal, ops or retune")
    return choice


def wanted() -> str | None:
    """ "metal", "auto" or "retune" where a kernel may run, None where MLX's operations must.

    Raises KSAError for a KSA_MLX_KERNELS that is none of the choices.
    """
    choice = _override or os.environ.get("KSA_MLX_KERNELS", "auto")
    if choice == "metal":
        return choice
    if choice not in CHOICES:
        _checked("KSA_MLX_KERNELS", choice)
    if choice == "ops" or not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return None
    return choice


def takes(dtype: mx.Dtype, heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernels take queries of such a shape."""
    return dtype in DTYPES and head_dim in HEAD_DIMS and heads <= 16 * kv_heads


def reads(form: Form) -> bool:
    """Whether the decode kernel reads keys and values of this form."""
    return not form.bits or ({form.bits, form.value_bits} <= {4, 8} and form.group_size in (32, 64))
