"""The flags of the command."""

import argparse
from pathlib import Path
from typing import Any

from ..benchmark import plot
from ..benchmark.results import check_file
from ..errors import KSAError
from ..memory.room import parse_size
from .stages import CHUNK, QUERIES, Settings


def parser() -> argparse.ArgumentParser:
    """Of `python -m ksa_mlx retrofit`."""
    p = argparse.ArgumentParser(
        prog="python -m ksa_mlx retrofit",
        description="Make a KSA model of a pretrained Qwen3, Qwen2, Llama or Mistral.",
    )
    own = Settings()
    p.add_argument("--model", required=True, help="the base: a Hub id, a folder or a GGUF file")
    p.add_argument("--revision", help="branch, tag or commit of the Hub repo")
    p.add_argument(
        "--data",
        required=True,
        help="training texts: .txt, .md, or mlx-lm's jsonl; a file or a folder",
    )
    p.add_argument(
        "--eval-data",
        help="texts to measure with, *.txt, named KIND-NUMBER; else held-out ones of --data",
    )
    p.add_argument("--mlx-path", required=True, help="a new folder for the KSA model")
    p.add_argument("--hf-path", help="a new folder for the same in the Hub's PyTorch layout")
    p.add_argument(
        "--window",
        type=int,
        default=own.window,
        help="chunks of 8 tokens that windowed layers read as text (%(default)s)",
    )
    p.add_argument(
        "--full-layers",
        default="auto:25%",
        help="layers that keep full attention: auto:PERCENT%% measures which; a list such as "
        "7,8,15; or none (%(default)s)",
    )
    p.add_argument(
        "--stage1-tokens",
        type=count,
        default=own.regression_tokens,
        help="visits of layerwise regression, such as 2M (%(default)s)",
    )
    p.add_argument(
        "--stage2-tokens",
        type=count,
        default=own.distillation_tokens,
        help="visits of distillation (%(default)s)",
    )
    p.add_argument(
        "--length", type=int, default=own.length, help="tokens of a training text (%(default)s)"
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=own.batch_size,
        help="texts a step on this machine (%(default)s)",
    )
    p.add_argument(
        "--lora-rank",
        type=int,
        default=own.lora_rank,
        help="of the base's attention in stage 2, fused at the end; 0: none (%(default)s)",
    )
    p.add_argument(
        "--own-rank",
        type=int,
        help="of the summaries' own projections, 0: full (a quantised base's: 64, else 0)",
    )
    p.add_argument("--learning-rate", type=float, default=own.rate, help="of stage 1 (%(default)s)")
    p.add_argument(
        "--stage2-learning-rate",
        type=float,
        default=own.distillation_rate,
        help="of stage 2 (%(default)s)",
    )
    p.add_argument(
        "--lora-learning-rate",
        type=float,
        default=own.lora_rate,
        help="of LoRA in stage 2 (%(default)s)",
    )
    p.add_argument(
        "--recall",
        type=float,
        default=0.2,
        help="share of training texts that ask for facts put into them (%(default)s)",
    )
    p.add_argument(
        "--questions",
        type=int,
        default=200,
        help="recall questions a length in the evaluation, whole texts of 8 (%(default)s)",
    )
    p.add_argument(
        "--grad-checkpoint",
        action="store_true",
        help="compute layers again in the backward; turned on where memory needs it",
    )
    p.add_argument(
        "--memory-limit",
        type=parse_size,
        help="bytes to stay below, such as 12GB (the device's own limit)",
    )
    p.add_argument(
        "--plot", help="a file for a figure of the training (MLX_PATH.training/training.png)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument(
        "--resume", action="store_true", help="go on with the run of the same --mlx-path"
    )
    return p


def count(text: str) -> int:
    """An argparse type: tokens, such as 500K or 2M."""
    return parse_size(text)


def check(o: argparse.Namespace):
    """Raises KSAError for values that make no sense."""
    least = {"window": 1, "length": 1, "batch_size": 1, "lora_rank": 0, "own_rank": 0, "seed": 0}
    least |= {"stage1_tokens": 1, "stage2_tokens": 1, "questions": 0}
    for name, low in least.items():
        value = getattr(o, name)
        if value is not None and value < low:
            raise KSAError(f"--{name.replace('_', '-')}: found {value}, expected at least {low}")
    for name in ("learning_rate", "stage2_learning_rate", "lora_learning_rate"):
        value = getattr(o, name)
        if not 0 < value < 1:
            raise KSAError(
                f"--{name.replace('_', '-')}: found {value}, expected more than 0, below 1"
            )
    if not 0 <= o.recall < 1:
        raise KSAError(f"--recall: found {o.recall}, expected 0 to 1, without 1")
    least_length = 2 * ((o.window + 1) * CHUNK + QUERIES)
    if o.length < least_length:
        raise KSAError(
            f"--length: found {o.length}, expected at least {least_length} for a window of "
            f"{o.window} chunks"
        )
    for name in ("mlx_path", "hf_path"):
        path = getattr(o, name)
        if path is not None and (not path or Path(path).expanduser().exists()):
            flag = name.replace("_", "-")
            raise KSAError(f"--{flag}: {path or repr(path)}: exists already; name a new folder")
    if o.hf_path and Path(o.hf_path).expanduser() == Path(o.mlx_path).expanduser():
        raise KSAError(f"--hf-path: {o.hf_path}: the same folder as --mlx-path; name another")
    if o.plot is not None:
        plot.check(o.plot)
        check_file("--plot", o.plot)


# What a run that goes on must say as it began.
KEPT = (
    *("model", "revision", "data", "eval_data", "window", "full_layers", "length", "batch_size"),
    *("stage1_tokens", "stage2_tokens", "lora_rank", "own_rank", "learning_rate"),
    *("stage2_learning_rate", "lora_learning_rate", "recall", "questions", "seed"),
)


def kept(o: argparse.Namespace) -> dict[str, Any]:
    """The values of KEPT, by flag."""
    return {f"--{name.replace('_', '-')}": getattr(o, name) for name in KEPT}


def full_layers(text: str, layers: int) -> int | list[int]:
    """How many layers to choose by measurement, or which; of a model of `layers`."""
    wrong = KSAError(
        f"--full-layers: found {text!r}, expected auto:PERCENT%, none, or numbers below {layers} "
        "such as 7,8,15"
    )
    if text == "none":
        return []
    if text.startswith("auto:") and text.endswith("%"):
        try:
            share = float(text[5:-1]) / 100
        except ValueError:
            raise wrong from None
        if not 0 <= share < 1:
            raise wrong
        return min(round(share * layers), layers - 1)
    try:
        found = sorted({int(i) for i in text.split(",")})
    except ValueError:
        raise wrong from None
    if not found or found[0] < 0 or found[-1] >= layers or len(found) == layers:
        raise wrong
    return found
