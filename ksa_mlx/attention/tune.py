"""What is found out about the attention of a model before its first token, on a Mac.

Forms of caches that are not known yet (quantised, several rows a step) are tried before their first
use.
"""

import warnings
from typing import Any

import mlx.core as mx

from ..cache.storage import PLAIN, Segment
from . import choice, decode, metal, prefill, record
from .choice import Key
from .trial import DECODE

# Keys at which MLX's own attention is looked at: beyond 1,024 it works in two passes.
LENGTHS = (1024, 4096, 32768)
ISSUE = "https://github.com/ml-explore/mlx/issues/4022"


def prepare(model: Any):
    """Check MLX's attention at a model's shape, and choose what decodes and prefills on plain
    caches. Where there is no Metal it does nothing. Raises KSAError for a wrong KSA_MLX_KERNELS."""
    kernels = metal.wanted()
    if not choice.can_time():
        return
    layers = zip(model.layers, model.model.windows, strict=True)
    shapes = {(_shape(layer), window is not None) for layer, window in layers}
    for shape in sorted({shape for shape, _ in shapes}, key=str):
        check_attention(*shape, kernels == "retune")
        if kernels in ("auto", "retune") and (shape, True) in shapes:
            _choose(kernels, *shape)


def _choose(kernels: str, dtype: mx.Dtype, heads: int, kv_heads: int, dim: int):
    """Decode of one row, and prefill. Nothing is computed with the arrays that stand for them."""
    keys = mx.zeros((1, kv_heads, 16, dim), dtype)
    queries = mx.zeros((1, heads, 1, dim), dtype)
    decode.arm(kernels, queries, [[Segment(keys, keys, 0, 16, PLAIN)]])
    prefill.arm(kernels, queries, keys)


def _shape(layer: Any) -> tuple[mx.Dtype, int, int, int]:
    attention = layer.self_attn
    dtype = layer.input_layernorm.weight.dtype
    return dtype, attention.n_heads, attention.n_kv_heads, attention.head_dim


def check_attention(
    dtype: mx.Dtype, heads: int, kv_heads: int, dim: int, retune: bool = False
) -> dict[str, float | str]:
    """Compare MLX's own attention of one query with plain operations, once on a machine.

    Returns the largest difference by number of keys, a share of the largest value, or why there is
    none. Warns where it is more than is allowed: full layers, and models of mlx-lm, rely on it.
    """
    key = Key("attention", dtype, dim, kv_heads, heads // kv_heads, 1, (PLAIN,), 0)
    case, kept = str(key), record.here()
    found = kept.find("attention", case)
    if found is None or set(found) != {str(n) for n in LENGTHS} or retune:
        trials = {n: choice.Trial(DECODE.make, (n,), ()) for n in LENGTHS}
        found = {
            str(n): choice.difference(key, decode.decode_rows_ops, trial)
            for n, trial in trials.items()
        }
        kept.keep("attention", case, found)
    off = {n: x for n, x in found.items() if isinstance(x, str) or x > choice.ALLOWED}
    if off:
        (n, worst), *_ = off.items()
        by = worst if isinstance(worst, str) else f"is off by {worst:.2g} of the largest value"
        warnings.warn(
            f"ksa-mlx: MLX's own attention {by} at {n} keys ({heads} query heads, {kv_heads} KV "
            f"heads, head_dim {dim}, {choice.name_of(dtype)}; {choice.this_machine()}): answers "
            f"may be wrong, mlx-lm's too. See {ISSUE}, and try another version of MLX",
            RuntimeWarning,
            stacklevel=2,
        )
    return found
