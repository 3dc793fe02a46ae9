"""What a retrofit trained, as a small file: changes of the base's layers, packed.

Own projections are kept as what they differ from the base's projection of the same kind, and
adapted ones as what they differ from the base's. A difference (rows, columns) is b.T @ a, its
factors a (rank, columns) and b (rank, rows) in 8 bits. Where that leaves much, as it does of own
keys and values, the rest is kept in fewer bits. All else is float16.
"""

import json
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from ..errors import CheckpointError, one_line
from ..files import replaced
from ..model import Model
from ..weights import some
from .base import Base, plain_weight
from .build import build, linear

FACTORS = {"group_size": 32, "bits": 8}
GROUP = 64  # of a rest
# A rest of more than this share of the base's weight, by their norms, is kept.
LARGE = 0.1
# Rows of the factors beside a rest, which tells the rest anyway.
FEW = 8
_ENDS = ("weight", "scales", "biases")
_PART = re.compile(r"\.(a|b|rest)\.(weight|scales|biases)$")
# Singular values below this share of the first are noise of float32.
_NOISE = 1e-3


def pack(weights: dict[str, mx.array], base: Base, rank: int, bits: int) -> dict[str, mx.array]:
    """The arrays of a packed retrofit.

    Args:
        weights: of the student, as `write` names them, unpacked.
        base: which the student was made of.
        rank: at most so many rows a factor.
        bits: of a rest's numbers.

    Raises `CheckpointError` for a weight that changed and cannot be told so.
    """
    packed: dict[str, mx.array] = {}
    for name, w in weights.items():
        path, _, end = name.rpartition(".")
        before = path.replace("_summary", "")
        if "_proj" in path and end == "weight":
            was = plain_weight(base.config, base.weights, before, mx.float32)
            if _same(w, was):
                continue
            change = w.astype(mx.float32) - was
            factors = _factors(change, rank)
            told, left = _told(path, change, factors)
            if mx.linalg.norm(left).item() > LARGE * mx.linalg.norm(was).item():
                told, left = _told(path, change, {k: x[:FEW] for k, x in factors.items()})
                packed |= _packed(f"{path}.rest", left, {"group_size": GROUP, "bits": bits})
            packed |= told
        elif "summary" in name:
            packed[name] = _half(w)
        elif not _same(w, _of_base(base, name)):
            raise CheckpointError(f"{name}: found another one than the base's, which is not packed")
    return packed


def _told(
    path: str, change: mx.array, factors: dict[str, mx.array]
) -> tuple[dict[str, mx.array], mx.array]:
    """The packed factors of a change, and what they, as they will be read, leave of it."""
    packed: dict[str, mx.array] = {}
    for part, factor in factors.items():
        packed |= _packed(f"{path}.{part}", factor, FACTORS)
    a, b = (_read(packed, f"{path}.{part}", FACTORS) for part in ("a", "b"))
    return packed, change - b.T @ a


def _packed(name: str, w: mx.array, how: dict[str, int]) -> dict[str, mx.array]:
    arrays = mx.quantize(w, **how)
    return {f"{name}.{end}": _half(x) for end, x in zip(_ENDS, arrays, strict=True)}


def _read(packed: dict[str, mx.array], name: str, how: dict[str, int]) -> mx.array:
    w, scales, biases = (packed[f"{name}.{end}"] for end in _ENDS)
    return mx.dequantize(w, scales.astype(mx.float32), biases.astype(mx.float32), **how)


def _of_base(base: Base, name: str) -> mx.array:
    path, _, end = name.rpartition(".")
    if end == "weight":
        return plain_weight(base.config, base.weights, path, mx.float32)
    return base.weights[name]


def _same(a: mx.array, b: mx.array) -> bool:
    """Whether they are the same but for the rounding of 16 bits, entry by entry: beside one large
    number small changes count, and in a large table a single one."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return bool((mx.abs(a - b) <= 4e-3 * mx.abs(b) + 1e-7).all().item())


def _half(x: mx.array) -> mx.array:
    return x.astype(mx.float16) if mx.issubdtype(x.dtype, mx.floating) else x


def _factors(change: mx.array, rank: int) -> dict[str, mx.array]:
    """Factors of a change, as many columns as it needs."""
    u, s, v = np.linalg.svd(np.array(change), full_matrices=False)
    kept = min(rank, int((s > _NOISE * s[0]).sum()))
    root = np.sqrt(s[:kept])
    return {"a": mx.array(v[:kept] * root[:, None]), "b": mx.array((u[:, :kept] * root).T)}


def unpack(file: Path, base: Base) -> tuple[Model, dict[str, Any]]:
    """The student that a file of `save_packed` stands for, and what the file says of it.

    Its base weights are float32 where they changed, else the base's own arrays. Raises
    `CheckpointError`.
    """
    try:
        packed, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
        said = json.loads(metadata["ksa"])
        student = build(base, said["windows"], said["chunk"])
        changes: dict[str, mx.array] = {}
        for path in [n.removesuffix(".a.weight") for n in packed if n.endswith(".a.weight")]:
            a, b = (_read(packed, f"{path}.{part}", FACTORS) for part in ("a", "b"))
            changes[path] = b.T @ a
            if f"{path}.rest.weight" in packed:
                how = {"group_size": GROUP, "bits": said["bits"]}
                changes[path] += _read(packed, f"{path}.rest", how)
        for path, change in changes.items():
            w = _of_base(base, path.replace("_summary", "") + ".weight") + change
            layer, name = path.removeprefix("model.layers.").split(".self_attn.")
            attn = student.model.layers[int(layer)].self_attn
            attn[name] = linear(w, attn[name].get("bias"))
        rest = [(n, w.astype(mx.float32)) for n, w in packed.items() if not _PART.search(n)]
        known = dict(tree_flatten(student.parameters()))
        if unknown := [name for name, _ in rest if name not in known]:
            raise KeyError(some(unknown))
        student.load_weights(rest, strict=False)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise CheckpointError(
            f"{file}: not a packed retrofit of this base ({one_line(e)})"
        ) from None
    student.eval()
    return student, said


def save_packed(
    file: Path, weights: dict[str, mx.array], base: Base, said: dict[str, Any], rank: int, bits: int
):
    """Write a packed retrofit. `said`: at least `windows`, of each layer in chunks or None,
    `chunk`, and `prefix`, the ids of every text's beginning."""
    said = {**said, "bits": bits}
    with replaced(file) as part:
        metadata = {"format": "mlx", "ksa": json.dumps(said)}
        mx.save_safetensors(str(part), pack(weights, base, rank, bits), metadata)
