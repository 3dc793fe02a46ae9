"""Loading KSA models: converted folders, unconverted Hub-layout folders, and repo ids."""

import contextlib
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.tokenizer_utils
import mlx_lm.utils
from mlx.utils import tree_map
from transformers import Qwen3Config

from ..attention.tune import prepare
from ..errors import CheckpointError, one_line
from ..model import Model
from .described import describe, quantization
from .source import SAFETENSORS, Source, named_by_index, open_source, weight_files
from .stop import add_end_of_turn, has_tokenizer, load_tokenizer, stop_ids
from .tensors import SafetensorsFiles

CONVERT_FIRST = "convert it first: python convert.py --hf-path {} --mlx-path DST"


def load_model(
    path_or_repo: str | Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[Model, dict[str, Any]]:
    """Load a KSA model without its tokenizer.

    Args:
        path_or_repo: a folder that `convert.py` wrote, an unconverted KSA folder in the Hub's
            layout (safetensors), or the Hub id of either. No code of the folder is run.
        lazy: leave the weights on disk until they are needed.
        strict: refuse weights that are missing, unknown or of a wrong shape.
        model_config: fields that override `config.json`, such as `{"rollback": 16}`.
        revision: a branch, tag or commit of the repo.

    Returns the model and its config, whose `eos_token_id` names all end tokens: those of
    `generation_config.json` and, in an unconverted folder, the chat template's end of a turn.
    Raises `CheckpointError` (a ValueError) of one line.
    """
    source = open_source(path_or_repo, revision)
    model, config = build(source, model_config, lazy, strict)
    if source.kind != "mlx" and (source.folder / "tokenizer_config.json").is_file():
        # `load` says what is wrong with a tokenizer; a model needs none.
        with contextlib.suppress(Exception):
            add_end_of_turn(config, load_tokenizer(source.folder))
    return model, config


def build(
    source: Source,
    model_config: dict[str, Any] | None = None,
    lazy: bool = False,
    strict: bool = True,
) -> tuple[Model, dict[str, Any]]:
    """The model of a checkpoint on this machine, and its config; arguments as `load_model`'s."""
    folder = source.path
    if source.kind == "muse":
        raise CheckpointError(
            f"{source.config_file}: a checkpoint of Kuaishou's Muse; {CONVERT_FIRST.format(folder)}"
        )
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: found a file, expected a folder")
    if strict:
        files = weight_files(folder)
    else:  # mlx-lm reads a part of the files where others have the rest
        files = named_by_index(folder, SAFETENSORS) or sorted(folder.glob(SAFETENSORS))
        files = [f for f in files if f.is_file()]
    if not files and strict:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = f"; {CONVERT_FIRST.format(folder)}" if others else ""
        raise CheckpointError(f"{folder}: no model*.safetensors{why}")

    checkpoint = SafetensorsFiles(folder, files)
    described = describe(source, checkpoint, model_config, strict)
    config, plan = described.config, described.plan
    try:
        model = Model(described.args)
        if (settings := quantization(config)) is not None:
            weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
            _quantize(model, settings, weights, bool(config.get("quantize_activations")))
        else:
            tensors = {n: checkpoint.read(n) for n in checkpoint.tensors if n in plan.source}
            weights = {
                name: part.of(tensors[part.source])
                for name, part in plan.parts.items()
                if part.source in tensors
            }
        model.eval()
        model.load_weights(list(weights.items()), strict=strict)
        if not lazy:
            mx.eval(model.parameters())
    except (ValueError, RuntimeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: {one_line(e)}") from None
    if not lazy:
        prepare(model)
    if source.kind != "mlx":
        config.pop("model_file", None)
    if ids := stop_ids(source, described.args.summary_token_begin):
        config["eos_token_id"] = ids
    return model, config


def _quantize(
    model: nn.Module, settings: dict[str, Any], weights: dict[str, mx.array], activations: bool
):
    """Give the layers that are quantised on disk their form, as `mlx_lm.utils.load_model` does."""

    def how(path: str, module: nn.Module) -> Any:
        if path in settings:
            return settings[path]
        if not hasattr(module, "to_quantized") or f"{path}.scales" not in weights:
            return False
        return mlx_lm.utils.infer_quant_config(path, module, weights)

    mode = settings.get("mode", "affine")
    nn.quantize(model, settings["group_size"], settings["bits"], mode=mode, class_predicate=how)

    def with_activations(layer: nn.Module) -> nn.Module:
        if not isinstance(layer, nn.QuantizedLinear):
            return layer
        if layer.mode not in ("nvfp4", "mxfp8") or "bias" in layer:
            raise ValueError(
                f"quantize_activations: found a layer of mode {layer.mode}"
                f"{' with a bias' * ('bias' in layer)}, expected nvfp4 or mxfp8 without biases"
            )
        outputs, inputs = layer.weight.shape
        return nn.QQLinear(
            inputs * 32 // layer.bits, outputs, layer.group_size, layer.bits, layer.mode
        )

    if activations:
        leaves = tree_map(with_activations, model.leaf_modules(), is_leaf=nn.Module.is_module)
        model.update_modules(leaves)


def load(
    path_or_repo: str | Path,
    tokenizer_config: dict[str, Any] | None = None,
    model_config: dict[str, Any] | None = None,
    adapter_path: str | None = None,
    lazy: bool = False,
    return_config: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
):
    """Load a KSA model and its tokenizer; arguments as `mlx_lm.load`'s (see `load_model`).

    `trust_remote_code` concerns the tokenizer only: the model's own code is never run.
    Returns (model, tokenizer), or (model, tokenizer, config) with `return_config`.
    """
    source = open_source(path_or_repo, revision, python=trust_remote_code)
    model, config = build(source, model_config, lazy)
    if adapter_path is not None:
        mlx_lm.utils.load_adapters(model, adapter_path)  # in place
        model.eval()
    # Said either way, so that transformers does not stop and ask; and a config, so that it does
    # not read the folder's, which may name code of the model's.
    extra = {"trust_remote_code": trust_remote_code, "config": Qwen3Config()}
    try:
        tokenizer = mlx_lm.tokenizer_utils.load(
            source.folder, {**extra, **(tokenizer_config or {})}, config.get("eos_token_id")
        )
    except Exception as e:  # transformers says "no tokenizer" in many ways
        if not has_tokenizer(source.folder):
            raise CheckpointError(
                f"{source.folder}: no tokenizer files; load_model loads the model alone"
            ) from None
        raise CheckpointError(
            f"{source.folder}: no tokenizer that loads ({one_line(e)}); "
            "load_model loads the model alone"
        ) from None
    if source.kind != "mlx":
        for i in add_end_of_turn(config, tokenizer):
            tokenizer.add_eos_token(str(i))
    return (model, tokenizer, config) if return_config else (model, tokenizer)
