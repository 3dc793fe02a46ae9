"""The student, a KSA model with the arrays of a base, and the teacher, the base itself."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..config import ModelArgs
from ..errors import ConfigError
from ..model import Model
from ..weights import EMBED
from .base import Base, how_packed, plain_weight
from .config import ksa_config

__all__ = ["build", "ksa_config", "teacher"]

# Names of a layer's own parts, and of the parts of the base that they begin as.
OWN_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def build(base: Base, windows: list[int | None], chunk: int = 8, own_rank: int = 0) -> Model:
    """The KSA model of a base, before any training.

    Args:
        base: what `open_base` returns. Its arrays are the model's, not copied.
        windows: of each layer in chunks; None where it keeps full attention.
        chunk: tokens a chunk.
        own_rank: 0 for own projections in float32, begun as the base's; else each is the base's
            projection, packed or not, and a low-rank change that begins as zero: mlx-lm's
            `LoRALinear` of scale 1, whose `lora_a` (hidden, rank) and `lora_b` (rank, rows) are
            float32.

    The own norms (float32) begin as the base's, the summary embedding (1, hidden), float32, as the
    mean of the text's. Raises `ConfigError` for windows that make no sense.
    """
    if own_rank < 0:
        raise ConfigError("own_rank", own_rank, "at least 0")
    args = ModelArgs.from_dict(ksa_config(base.config, windows, chunk))
    model = Model(args)
    plain = {n: w for n, w in base.weights.items() if not n.startswith("rotary")}
    _pack(model, base)
    model.load_weights(list(plain.items()), strict=False)
    for i, layer in enumerate(model.model.layers):
        prefix = f"model.layers.{i}"
        for name in OWN_PROJECTIONS:
            own = f"{name}_summary"
            if own not in layer.self_attn:
                continue
            if own_rank:
                of_base = copy.copy(layer.self_attn[name])
                made = LoRALinear.from_base(of_base, r=own_rank, dropout=0.0, scale=1.0)
            else:
                made = _full(base, f"{prefix}.self_attn.{name}")
            layer.self_attn[own] = made
        if "input_layernorm_summary" in layer:
            norm = layer.input_layernorm.weight.astype(mx.float32)
            layer.input_layernorm_summary.weight = norm
    table = plain_weight(base.config, base.weights, EMBED.removesuffix(".weight"), mx.float32)
    model.model.summary_embedding = table.mean(axis=0, keepdims=True)
    model.eval()
    return model


def _full(base: Base, path: str) -> nn.Linear:
    """A projection of the base as a layer of its own in float32."""
    bias = base.weights.get(f"{path}.bias")
    weight = plain_weight(base.config, base.weights, path, mx.float32)
    return linear(weight, None if bias is None else bias.astype(mx.float32))


def linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    """A layer of these arrays, (rows, columns) and (rows,)."""
    made = nn.Linear(1, 1, bias=bias is not None)
    made.weight = weight
    if bias is not None:
        made.bias = bias
    return made


def _pack(model: Model, base: Base):
    """Give the layers that the base has packed their packed form."""
    settings = base.config.get("quantization")
    if settings is None:
        return

    def how(path: str, module: nn.Module) -> Any:
        return f"{path}.scales" in base.weights and how_packed(base.config, path)

    mode = settings.get("mode", "affine")
    nn.quantize(model, settings["group_size"], settings["bits"], mode=mode, class_predicate=how)


def teacher(student: Model) -> Model:
    """The base in a student: a model with full attention in all layers, of the same arrays.

    What was added to the student's layers (LoRA) it lacks; what is later trained in place of an
    array of the student's it does not see.
    """
    config = {**vars(student.args), "summary_independent_parameters": False}
    layers, context = student.args.num_hidden_layers, student.args.max_position_embeddings
    config |= {"summary_sliding_chunk_num": [context] * layers, "mix_coeff": 0}
    config |= {"summary_independent_attention_layernorm": False}
    model = Model(ModelArgs.from_dict(config))
    of_student = dict(student.named_modules())
    of_student |= {
        path: module["linear"] for path, module in of_student.items() if "linear" in module
    }
    own = {
        path: copy.copy(of_student[path])
        for path, module in model.named_modules()
        if path and not module.children()
    }
    for path, module in own.items():
        parent, _, name = path.rpartition(".")
        setattr(_at(model, parent), name, module)
    model.model.summary_embedding = student.model.summary_embedding
    model.eval()
    return model


def _at(model: nn.Module, path: str) -> Any:
    """The module at a dotted path."""
    found: Any = model
    for name in path.split(".") if path else []:
        found = found[int(name)] if name.isdigit() else found[name]
    return found
