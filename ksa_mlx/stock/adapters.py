"""`--train-summaries` of mlx-lm's `lora`, and the adapters that hold what it has trained.

mlx-lm trains adapters, or whole layers. What only the summaries use lies beside both: their
embedding, and projections and norms of their own. They are few, and train as they are, in all
layers; only quantised projections cannot, and get adapters as others do.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.lora
import mlx_lm.tuner.utils
from mlx.utils import tree_flatten

from ..checkpoint.source import read_json
from ..errors import CheckpointError, KSAError
from ..model import Model
from ..weights import some

FLAG = "--train-summaries"
ADAPTERS = {"lora_a", "lora_b", "m"}  # the last part of their weights' names

_build_parser, _train_model = mlx_lm.lora.build_parser, mlx_lm.lora.train_model
_load_adapters = mlx_lm.tuner.utils.load_adapters


def own_projections(model: Model) -> tuple[set[str], set[str]]:
    """Names, within a layer, of the summaries' own projections: as they are in all layers, and
    quantised in some."""
    plain: set[str] = set()
    quantised: set[str] = set()
    for layer in model.layers:
        for name, module in layer.named_modules():
            if name.endswith("_proj_summary"):
                (plain if isinstance(module, nn.Linear) else quantised).add(name)
    return plain - quantised, quantised


def summary_weights(model: Model) -> dict[str, list[str]]:
    """What only the summaries use, but for quantised projections, of a model without adapters.

    Returns weights by the name of their module, such as `model.layers.0.self_attn.k_proj_summary`.
    """
    plain, _ = own_projections(model)
    found = {"model": ["summary_embedding"]}
    for name, module in model.named_modules():
        if name.endswith("norm_summary") or any(name.endswith(f".{own}") for own in plain):
            found[name] = list(module.parameters())
    return found


def unfreeze_summaries(model: Model):
    """Let these weights train; all others stay as they are."""
    modules = dict(model.named_modules())
    for name, weights in summary_weights(model).items():
        modules[name].unfreeze(recurse=False, keys=weights)


def install():
    """Make mlx-lm, in this process, load adapters that hold trained summaries. Idempotent."""
    mlx_lm.tuner.utils.load_adapters = mlx_lm.lora.load_adapters = load_adapters


def install_flag():
    """Give mlx-lm's `lora` the flag. Idempotent."""
    mlx_lm.lora.build_parser, mlx_lm.lora.train_model = build_parser, train_model


def build_parser() -> argparse.ArgumentParser:
    """mlx-lm's, and our flag; a YAML file may say `train_summaries: true`."""
    parser = _build_parser()
    parser.add_argument(
        FLAG,
        action="store_true",
        default=None,
        help="Train the summary embedding and the summaries' own projections and norms too, in all "
        "layers; saved with the adapters.",
    )
    return parser


def train_model(args: Any, model: nn.Module, *rest: Any, **more: Any):
    """mlx-lm's, with the summaries' weights among those that train, if asked."""
    if args.train_summaries:
        _prepare(args, model)
    return _train_model(args, model, *rest, **more)


def _prepare(args: Any, model: nn.Module):
    if not isinstance(model, Model) or model.args.last_windowed < 0:
        raise KSAError(f"{FLAG}: {args.model}: found no KSA model with layers that read summaries")
    plain, quantised = own_projections(model)
    if quantised and args.fine_tune_type == "full":
        raise KSAError(
            f"{FLAG}: {args.model}: found quantised {some(sorted(quantised))}, which cannot train; "
            "expected --fine-tune-type lora or dora, or a model without quantisation"
        )
    if quantised and 0 <= args.num_layers < len(model.layers):
        print(
            f"warning: {FLAG}: {some(sorted(quantised))} are quantised: they get adapters, in the "
            f"last {args.num_layers} layers (--num-layers -1: in all)",
            file=sys.stderr,
        )
    if args.fine_tune_type != "full":
        keys = args.lora_parameters.get("keys") or {
            name
            for layer in model.layers
            for name, module in layer.named_modules()
            if isinstance(module, nn.Linear | nn.QuantizedLinear)
        }
        # Saved with the adapters, so that whoever loads them puts them in the same places.
        args.lora_parameters = {**args.lora_parameters, "keys": sorted(set(keys) - plain)}

    def freeze(*some: Any, **more: Any) -> nn.Module:
        del model.freeze
        model.freeze(*some, **more)
        unfreeze_summaries(model)
        return model

    # mlx-lm freezes the model before it adds what trains.
    setattr(model, "freeze", freeze)  # noqa: B010 (a method, for once)


def load_adapters(model: nn.Module, adapter_path: str) -> nn.Module:
    """mlx-lm's, which takes adapters only, or with them the summaries' weights that were trained.

    Raises `CheckpointError` where the weights are not those that the model has or needs.
    """
    folder = Path(adapter_path)
    file = folder / "adapter_config.json"
    config = read_json(file) if file.is_file() else {}
    kind = config.get("fine_tune_type", "lora")
    if not config.get("train_summaries") or kind == "full" or not isinstance(model, Model):
        return _load_adapters(model, adapter_path)
    own = summary_weights(model)
    names = {f"{module}.{weight}" for module, weights in own.items() for weight in weights}
    mlx_lm.tuner.utils.linear_to_lora_layers(
        model, config["num_layers"], config["lora_parameters"], use_dora=kind == "dora"
    )
    file = folder / "adapters.safetensors"
    weights: Any = mx.load(str(file))
    held: Any = tree_flatten(model.parameters())
    expected = {
        name: w.shape for name, w in held if name in names or name.rpartition(".")[2] in ADAPTERS
    }
    for what, wrong in (
        ("missing weights", expected.keys() - weights.keys()),
        ("weights that this model does not have", weights.keys() - expected.keys()),
        ("another shape", {n for n in weights if weights[n].shape != expected.get(n)}),
    ):
        if wrong:
            raise CheckpointError(f"{file}: {what}: {some(sorted(wrong))}")
    model.load_weights(list(weights.items()), strict=False)
    return model
