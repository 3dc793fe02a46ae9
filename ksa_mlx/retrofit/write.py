"""Writing a trained student: an MLX folder, and the Hub's PyTorch layout."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils

from ..checkpoint.write import ShardWriter, new_folder, workspace
from ..config import ModelArgs
from ..errors import CheckpointError
from ..model import Model
from ..stock import model_file
from ..stock.register import MODEL_FILE
from ..weights import EMBED, HEAD, SUMMARY, hub_plan
from .base import Base
from .config import ksa_config
from .prefix import choose_prefix, save, with_prefix

__all__ = ["choose_prefix", "write"]

# Where transformers finds the official code, once its two files lie beside the weights.
_CODE = {
    "AutoModel": "modeling_qwen3sa.Qwen3Model",
    "AutoModelForCausalLM": "modeling_qwen3sa.Qwen3ForCausalLM",
}
_SHARD = mlx_lm.utils.MAX_FILE_SIZE_GB << 30


def write(
    student: Model,
    base: Base,
    folder: str | Path,
    prefix: list[int],
    hf_path: str | Path | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = _SHARD,
) -> list[str]:
    """Write a student as a folder that every command takes; it appears whole or not at all.

    Low-rank changes are added to what they change, in float32. Layers of the base that are packed
    and were left alone stay packed in `folder`; `hf_path` is never packed.

    Args:
        student: what `build` returned, trained.
        base: of which it was built.
        folder: a new folder, MLX's layout.
        prefix: ids of the beginning of every text, one chunk; see `choose_prefix`.
        hf_path: a new folder in the Hub's layout, which `convert` makes `folder` of.
        dtype: "float16", "bfloat16" or "float32"; None for the base's own.
        max_shard_bytes: of a file of weights.

    Returns what there is to say, a line each. Raises `CheckpointError`, `KSAError` or OSError.
    """
    chunk = student.args.summary_chunk_size
    if len(prefix) != chunk:
        raise CheckpointError(f"prefix: found {len(prefix)} tokens, expected a chunk, {chunk}")
    dtype = dtype or base.config.get("torch_dtype") or "float32"
    config = {
        **ksa_config(base.config, student.args.windows, chunk),
        "torch_dtype": dtype,
        "prefix_token_ids": list(prefix),
    }
    tokenizer = with_prefix(base.tokenizer, prefix)
    places = [new_folder(folder)]
    if hf_path is not None:
        places.append(new_folder(hf_path, "--hf-path"))
    with ExitStack() as stack:
        # Both or none, but for a machine that dies between two renamings.
        made = [stack.enter_context(workspace(place)) for place in places]
        _write_mlx(student, base, config, made[0], max_shard_bytes)
        if hf_path is not None:
            _write_hub(student, base, config, made[1], max_shard_bytes)
        for place in made:
            save(tokenizer, place)
            generation = {
                name: config[name] for name in ("bos_token_id", "eos_token_id") if name in config
            }
            (place / "generation_config.json").write_text(json.dumps(generation, indent=4))
            for pattern in ("LICENSE*", "NOTICE*"):
                for file in base.folder.glob(pattern):
                    shutil.copyfile(file, place / file.name)
            (place / "README.md").write_text(_readme(base, config, place == made[0]))
    lines = [f"Wrote {place}" for place in places]
    if hf_path is not None:
        lines.append(
            f"{hf_path}: the official code runs it with its modeling_qwen3sa.py and "
            "summary_context.py in it"
            if student.args.use_qk_norm
            else f"{hf_path}: for convert.py; the official code has no model without q/k norms"
        )
    return lines


def _write_mlx(student: Model, base: Base, config: dict[str, Any], place: Path, limit: int):
    writer, packed = ShardWriter(place, limit), set()
    dtype = getattr(mx, config["torch_dtype"])
    for name, w, whole in _parts(student):
        if not whole:
            packed.add(name.rpartition(".")[0])
        _add(writer, name, w.astype(dtype) if whole else w)
    writer.finish()
    config = {**config, "model_file": MODEL_FILE}
    if packed:
        # Entries of layers that are packed no more would have them packed when they are loaded.
        settings = {
            name: value
            for name, value in base.config["quantization"].items()
            if name in packed or not isinstance(value, dict)
        }
        config |= {"quantization": settings, "quantization_config": settings}
    mlx_lm.utils.save_config(config, place / "config.json")
    shutil.copyfile(str(model_file.__file__), place / MODEL_FILE)


def _write_hub(student: Model, base: Base, config: dict[str, Any], place: Path, limit: int):
    kind = base.config["model_type"]
    config = {**config, "model_type": kind}
    config["architectures"] = [f"{kind.capitalize()}ForCausalLM"]
    if config["use_qk_norm"]:
        config["auto_map"] = _CODE
    args = ModelArgs.from_dict(config)
    plan, dtype = hub_plan(args), getattr(mx, config["torch_dtype"])
    ours = {name: (w, whole) for name, w, whole in _parts(student)}

    def plain(name: str) -> mx.array:
        w, whole = ours[name]
        return (w if whole else _unpacked(student, name)).astype(dtype)

    writer = ShardWriter(place, limit)
    # The official model has own parameters in every layer; where none can be read, the base's.
    dead = {n: shape for n, (shape, _) in plan.dead.items() if shape is not None}
    for name in [*plan.source, *dead]:
        if name == EMBED:
            w = mx.concatenate([plain(EMBED), plain(SUMMARY)])
        elif name == HEAD:
            w = plain(HEAD)
            rows = mx.zeros((args.vocab_size - w.shape[0], w.shape[1]), dtype)
            w = mx.concatenate([w, rows])
        else:
            w = plain(name if name in ours else name.replace("_summary", ""))
        _add(writer, name, w)
    writer.finish()
    mlx_lm.utils.save_config(config, place / "config.json")


def _add(writer: ShardWriter, name: str, w: mx.array):
    mx.eval(w)
    if mx.issubdtype(w.dtype, mx.floating) and not mx.isfinite(w).all().item():
        raise CheckpointError(f"{name}: found NaN or Inf, or numbers too large for {w.dtype}")
    writer.parameters += w.size
    writer.add(name, w)


def _parts(student: Model) -> Iterator[tuple[str, mx.array, bool]]:
    """Names and arrays of a student, low-rank changes fused; and whether an array is a plain
    weight, not part of a packed one."""
    yield SUMMARY, student.model.summary_embedding, True
    for path, module in _layers(student):
        if "lora_a" in module:
            yield f"{path}.weight", _fused(module), True
            if "bias" in module["linear"]:
                yield f"{path}.bias", module["linear"].bias, True
            continue
        # A bias is of no packing.
        packed = "scales" in module
        for name, w in module.parameters().items():
            yield f"{path}.{name}", w, not packed or name == "bias"


def _layers(student: Model) -> list[tuple[str, nn.Module]]:
    """Modules that hold weights, an adapted one with what it adapts."""
    found = [(path, m) for path, m in student.named_modules() if path]
    adapted = tuple(f"{path}." for path, m in found if "lora_a" in m)
    unknown = [path for path, m in found if "linear" in m and ("lora_a" not in m or "m" in m)]
    if unknown:
        raise CheckpointError(f"{unknown[0]}: found an adapter that is not LoRA")
    return [
        (path, m)
        for path, m in found
        if "lora_a" in m or (not m.children() and m.parameters() and not path.startswith(adapted))
    ]


def _fused(layer: nn.Module) -> mx.array:
    """The weight (rows, hidden), float32, of an adapted layer."""
    change = (layer.scale * layer.lora_b.astype(mx.float32).T) @ layer.lora_a.astype(mx.float32).T
    return _plain(layer["linear"]) + change


def _plain(layer: nn.Module) -> mx.array:
    """The weight of a layer, unpacked, in float32."""
    if "scales" not in layer:
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales, layer.get("biases")
    if biases is not None:  # else they are 8-bit floats
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    w = mx.dequantize(layer.weight, scales, biases, layer.group_size, layer.bits, layer.mode)
    return w.astype(mx.float32)


def _unpacked(student: Model, name: str) -> mx.array:
    path = name.rpartition(".")[0]
    return _plain(dict(student.named_modules())[path])


def _readme(base: Base, config: dict[str, Any], mlx: bool) -> str:
    """A model card."""
    full = sum(w is None for w in ModelArgs.from_dict(config).windows)
    text = base.tokenizer.decode(config["prefix_token_ids"])
    what = "in MLX's format" if mlx else "in the Hub's layout"
    library = "library_name: mlx\n" if mlx else ""
    return f"""---
{library}pipeline_tag: text-generation
tags: [ksa{", mlx" * mlx}]
---

# {Path(base.name).stem}, retrofitted with Kwai Summary Attention

A KSA model made of {base.name} by ksa-mlx, {what}: {full} of {config["num_hidden_layers"]} layers
have full attention, the others read old text through summaries, one for every
{config["summary_chunk_size"]} tokens. Every text begins with {json.dumps(text)}, which its
tokenizer and its chat template write.

```python
import ksa_mlx, mlx_lm

model, tokenizer = ksa_mlx.load("FOLDER")
print(mlx_lm.generate(model, tokenizer, prompt="Hello", verbose=True))
```
"""
