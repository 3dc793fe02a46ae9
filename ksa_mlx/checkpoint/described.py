"""What a checkpoint is, told by its config and its weights together: shared by load and convert."""

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..config import MODEL_TYPE, ModelArgs, with_base
from ..errors import CheckpointError, ConfigError, in_file
from ..weights import EMBED, HEAD, TIED, Plan, announced, hub_plan, mlx_plan
from .muse import muse_plan, to_hub_config
from .source import Source
from .tensors import Checkpoint

DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Described:
    """A checkpoint's config as ours has it, its arguments, its plan, and what there is to say."""

    config: dict[str, Any]
    args: ModelArgs
    plan: Plan
    notes: tuple[str, ...] = ()


def describe(
    source: Source,
    checkpoint: Checkpoint,
    overrides: dict[str, Any] | None = None,
    strict: bool = True,
) -> Described:
    """Config and plan of a checkpoint, checked against its weights.

    `overrides` are fields that count more than `config.json`'s. With `strict`, tensors that are
    missing, unknown or of a wrong shape are refused; those of a quantised checkpoint are for the
    model to check. Raises `CheckpointError`, which names the file and the field or the weight.
    """
    shapes = checkpoint.shapes()
    with in_file(source.config_file):
        config = to_hub_config(source.config) if source.kind == "muse" else dict(source.config)
        if source.kind == "hub" and not isinstance(config.get("model_type"), str):
            raise ConfigError("model_type", config.get("model_type"), "a name")
        if source.kind != "mlx":
            config = {**with_base(announced(config, shapes)), "model_type": MODEL_TYPE}
        config = tidy({**config, **(overrides or {})})
        args, plan = _planned(source, config)
        if quantization(config) is not None:
            if source.kind != "mlx":
                raise ConfigError(
                    "quantization", config["quantization"], "an unquantised checkpoint"
                )
            return Described(config, args, plan)
        if not strict:
            return Described(config, args, plan)
        notes: tuple[str, ...] = ()
        try:
            plan.check(shapes)
        except CheckpointError as e:
            raise CheckpointError(f"{source.path}: {e}") from None
        _check_rows_behind(checkpoint, args, plan)
        if _another_head(checkpoint, args, plan):
            if source.kind == "muse":
                raise ConfigError("tie_word_embeddings", True, "false: a head of its own is saved")
            # As transformers 5 does.
            config["tie_word_embeddings"] = False
            args, plan = _planned(source, config)
            notes = (f"Kept {HEAD}: the config ties it to the embedding, but they differ",)
    return Described(config, args, plan, notes)


def _planned(source: Source, config: dict[str, Any]) -> tuple[ModelArgs, Plan]:
    args = ModelArgs.from_dict(config)
    if source.kind == "muse":
        return args, muse_plan(args, source.config)
    return args, mlx_plan(args) if source.kind == "mlx" else hub_plan(args)


def tidy(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what says nothing, and with one name for its dtype.

    Raises `ConfigError` where a field that is no model's argument makes no sense.
    """
    config = dict(config)
    for name in ("quantization", "quantization_config"):
        if config.get(name, 0) is None:
            del config[name]
        elif name in config and not isinstance(config[name], dict):
            raise ConfigError(name, config[name], "a JSON object or null")
    # transformers 5 says `dtype`, which counts where both are there.
    dtype = config.pop("dtype", None) or config.pop("torch_dtype", None)
    config.pop("torch_dtype", None)
    if dtype not in (None, "auto"):
        name = dtype.removeprefix("torch.") if isinstance(dtype, str) else dtype
        if name not in DTYPES:
            raise ConfigError("torch_dtype", dtype, f"one of {', '.join(DTYPES)}")
        config["torch_dtype"] = name
    return config


def quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """How the weights are quantised, in mlx-lm's words; None where they are not."""
    ours, theirs = config.get("quantization"), config.get("quantization_config")
    if ours is None and theirs is not None:
        raise ConfigError("quantization_config", theirs, "an unquantised checkpoint")
    if ours is None:
        return None
    for name in ("group_size", "bits"):
        if type(ours.get(name)) is not int or ours[name] < 1:
            raise ConfigError(f"quantization.{name}", ours.get(name), "an integer of at least 1")
    return ours


def _check_rows_behind(checkpoint: Checkpoint, args: ModelArgs, plan: Plan):
    """Refuse tokens that were added behind the summary ids and trained: no text can hold them."""
    table = plan.parts[EMBED].source
    count = plan.source[table][0]
    ends = [p.rows[1] if p.rows else count for p in plan.parts.values() if p.source == table]
    used = max(ends)
    if used < count and mx.any(checkpoint.read(table)[used:] != 0).item():
        raise CheckpointError(
            f"{checkpoint.tensors[table].file}: {table}: rows {used} to {count - 1} are not zero: "
            f"tokens added behind the summary ids (summary_token_begin = "
            f"{args.summary_token_begin}), which this model cannot read"
        )


def _another_head(checkpoint: Checkpoint, args: ModelArgs, plan: Plan) -> bool:
    """Whether a head is saved that differs from the embedding to which the config ties it."""
    table = plan.parts[EMBED].source
    names = [n for n, (_, why) in plan.dead.items() if why == TIED and n in checkpoint.tensors]
    if not args.tie_word_embeddings or not names:
        return False
    a, b = (checkpoint.read(n)[: args.summary_token_begin] for n in (table, names[0]))
    return a.shape != b.shape or not mx.array_equal(a, b).item()
