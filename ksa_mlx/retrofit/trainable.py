"""What a retrofit trains: the summaries' embedding, projections and norms, and LoRA on the base."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.lora import LoRALinear

Params = dict[str, mx.array]

# What LoRA adapts: attention, which now also reads summaries.
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")


def is_summary(name: str) -> bool:
    """Whether a parameter of a KSA model, by its dotted name, is the summaries' own, and not
    the base's under a low-rank change."""
    parts = name.split(".")
    return "linear" not in parts and any("summary" in part for part in parts)


def is_adapter(name: str) -> bool:
    """Whether it is an adapter's."""
    return name.rpartition(".")[2] in ("lora_a", "lora_b")


def trainable(model, which: Callable[[str], bool]) -> Params:
    """A model's parameters of these names, in float32."""
    named: Params = dict(tree_flatten(model.parameters()))
    return {name: x.astype(mx.float32) for name, x in named.items() if which(name)}


def put(model, params: Params, dtype: Any = None):
    """Set parameters of a model by their dotted names, cast to `dtype` if given."""
    cast = {k: v if dtype is None else v.astype(dtype) for k, v in params.items()}
    model.update(tree_unflatten(list(cast.items())))


def adapt(model, rank: int, scale: float = 2.0, seed: int = 0):
    """Wrap the attention projections of all layers in LoRA of a rank (0: leave them)."""
    if not rank:
        return
    mx.random.seed(seed)
    for layer in model.model.layers:
        attn = layer.self_attn
        for name in ADAPTED:
            attn[name] = LoRALinear.from_base(attn[name], r=rank, scale=scale)
