"""Convert a KSA checkpoint (the Hub's layout, or that of Kuaishou's Muse) to MLX.

One tensor is read, checked, cast, quantised and handed to a shard at a time, so that about one
output shard is in memory. All is written to a folder beside the destination, which is renamed
at the end: the destination is absent or whole, whenever the conversion dies.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from mlx_lm.convert import configure_parser, mixed_quant_predicate_builder

from .checkpoint.described import Described, describe, quantization
from .checkpoint.source import Source, open_source, read_json
from .checkpoint.stop import (
    TOKENIZER,
    add_end_of_turn,
    has_tokenizer,
    load_tokenizer,
    stop_ids,
)
from .checkpoint.tensors import Checkpoint, Dequantized, open_checkpoint
from .checkpoint.write import ShardWriter, dropped, new_folder, workspace, write_weights
from .config import MODEL_TYPE, ModelArgs
from .errors import CheckpointError, exit_status, in_file, one_line
from .model import Model
from .stock.register import MODEL_FILE
from .weights import expected_shapes

# What is copied as it is. Upstream's Python files are not among them: nothing here runs them.
COPIED = (
    *TOKENIZER,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.json", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*"),
)
# Group size and bits that a mode of MLX's has unless told otherwise.
MODES = {"affine": (64, 4), "mxfp4": (32, 4), "nvfp4": (16, 4), "mxfp8": (32, 8)}


@dataclass(frozen=True)
class Quantization:
    """How to quantise: a mode of MLX's with its sizes, or a recipe of mlx-lm's."""

    mode: str
    group_size: int
    bits: int
    recipe: str | None = None


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str | None = None,
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = mlx_lm.utils.MAX_FILE_SIZE_GB << 30,
    report: Callable[[str], Any] | None = None,
):
    """Convert a KSA checkpoint; arguments as `mlx_lm.convert`'s, and:

    `hf_path` is a Hub id; a folder in the Hub's layout (safetensors or `pytorch_model*.bin`); a
    Muse folder or state dict with its `config.json`; or a converted folder, to quantise,
    dequantise or cast it. `trust_remote_code` keeps the tokenizer's own Python files, which load
    with this flag only; without it no Python file of the checkpoint is copied. `report` is
    called with each line that there is to say; without it nothing is said or shown.

    Raises `CheckpointError` (a ValueError) or OSError; then `mlx_path` does not exist.
    """
    wanted = _wanted(quantize, q_group_size, q_bits, q_mode, quant_predicate)
    if quantize and dequantize:
        raise CheckpointError("choose either quantize or dequantize, not both")
    destination = new_folder(mlx_path)
    if upload_repo is not None:
        check_upload(upload_repo)
    say = report or (lambda line: None)
    with workspace(destination) as folder:
        source = open_source(hf_path, revision, python=trust_remote_code, pickles=True)
        if source.kind == "mlx" and not (wanted or dequantize or dtype):
            raise CheckpointError(
                f"{source.path}: converted already; it loads as it is "
                "(-q, -d and --dtype change it)"
            )
        original, checkpoint = source, open_checkpoint(source.path)
        if dequantize:
            source, checkpoint = _dequantized(source, checkpoint)
        described = describe(source, checkpoint)
        if described.config.get("quantization"):
            raise CheckpointError(
                f"{source.config_file}: quantization: found one, expected an unquantised "
                "checkpoint; -d makes one"
            )
        stops = stop_ids(original, described.args.summary_token_begin)
        writer = ShardWriter(folder, max_shard_bytes)
        config, lines = _write(checkpoint, described, writer, dtype, wanted, report is None)
        lines = [*described.notes, *lines, *_copy_files(original, folder, trust_remote_code)]
        lines += _stop_at_turns(original, stops, config, folder)
        mlx_lm.utils.save_config(config, folder / "config.json")
        _model_card(original, upload_repo).save(folder / "README.md")
    for line in (*lines, f"Wrote {destination}"):
        say(line)
    if upload_repo is not None:
        upload(destination, upload_repo)
        say(f"Uploaded to {upload_repo}")


def _wanted(quantize, group_size, bits, mode, recipe) -> Quantization | None:
    """The quantisation that the flags ask for. Raises where one of them would have no effect."""
    flags = {"--q-group-size": group_size, "--q-bits": bits, "--q-mode": mode}
    flags["--quant-predicate"] = recipe
    for name, value in flags.items():
        if value is None:
            continue
        if not quantize:
            raise CheckpointError(f"{name}: found without -q, which it is about")
        if name in ("--q-group-size", "--q-bits") and value < 1:
            raise CheckpointError(f"{name}: found {value}, expected at least 1")
    if not quantize:
        return None
    if recipe and mode not in (None, "affine"):
        raise CheckpointError(f"--q-mode: found {mode}, expected affine with --quant-predicate")
    if recipe and bits is not None:
        raise CheckpointError("--q-bits: found with --quant-predicate, which says the bits")
    mode = mode or "affine"
    if mode not in MODES:
        raise CheckpointError(f"--q-mode: found {mode}, expected one of {', '.join(MODES)}")
    return Quantization(mode, group_size or MODES[mode][0], bits or MODES[mode][1], recipe)


def _dequantized(source: Source, checkpoint: Checkpoint) -> tuple[Source, Checkpoint]:
    """The checkpoint that a quantised one stands for."""
    with in_file(source.config_file):
        settings = quantization(source.config)
        if settings is None:
            raise CheckpointError(f"{source.path}: not quantised, there is nothing to dequantise")
        config = {k: v for k, v in source.config.items() if not k.startswith("quantization")}
        shapes = expected_shapes(ModelArgs.from_dict(config))
    return replace(source, config=config), Dequantized(checkpoint, settings, shapes)


def _write(
    checkpoint: Checkpoint,
    described: Described,
    writer: ShardWriter,
    dtype: str | None,
    wanted: Quantization | None,
    quiet: bool,
) -> tuple[dict[str, Any], list[str]]:
    """Write the weights; returns the config that goes with them, and what there is to say."""
    plan, lines = described.plan, []
    checkpoint.check_dtypes(plan.source)
    # As in mlx-lm: the config's own dtype, unless told otherwise.
    dtype = dtype or described.config.get("torch_dtype")
    config = {k: v for k, v in described.config.items() if k != "auto_map"}
    config.update(model_type=MODEL_TYPE, model_file=MODEL_FILE)
    if dtype:
        config["torch_dtype"] = dtype
    quantized: dict[str, nn.Module] = {}
    if wanted:
        quantized, config["quantization"], left = _layers(described.args, wanted)
        config["quantization_config"] = config["quantization"]
        if left:
            lines.append(
                f"Left {left} layers unquantised: no multiples of a group of {wanted.group_size}"
            )
    write_weights(checkpoint, plan, writer, getattr(mx, dtype) if dtype else None, quantized, quiet)
    writer.finish()
    lines += [
        f"Dropped {n:,} parameters ({nbytes / 1e6:,.1f} MB): {why}"
        for why, (n, nbytes) in dropped(checkpoint, plan).items()
    ]
    bits = f", {writer.nbytes * 8 / writer.parameters:.3f} bits a weight" if wanted else ""
    files = f"{len(writer.files)} file{'s' * (len(writer.files) > 1)}"
    lines.append(
        f"Kept {writer.parameters:,} parameters, {writer.nbytes / 1e6:,.1f} MB in {files}{bits}"
    )
    return config, lines


def _layers(
    args: ModelArgs, wanted: Quantization
) -> tuple[dict[str, nn.Module], dict[str, Any], int]:
    """Which layers to quantise, and how, as `mlx_lm.utils.quantize_model` does; the config's
    `quantization`; and how many layers are of no fitting width."""
    model = Model(args)  # lazy: its weights are never computed
    settings: dict[str, Any] = {
        "group_size": wanted.group_size,
        "bits": wanted.bits,
        "mode": wanted.mode,
    }
    recipe: Any = None
    if wanted.recipe:
        recipe = mixed_quant_predicate_builder(wanted.recipe, model, wanted.group_size)
    left = 0

    def how(path: str, module: nn.Module) -> bool | dict[str, Any]:
        nonlocal left
        if not hasattr(module, "to_quantized"):
            return False
        if module.weight.shape[-1] % wanted.group_size:
            left += 1
            return False
        choice = recipe(path, module) if recipe else True
        if isinstance(choice, dict):
            settings[path] = choice
        return choice

    try:
        nn.quantize(model, wanted.group_size, wanted.bits, mode=wanted.mode, class_predicate=how)
    except ValueError as e:
        raise CheckpointError(f"-q: {one_line(e)}") from None
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "bits")}
    if not layers:
        raise CheckpointError(
            f"--q-group-size: found {wanted.group_size}, expected a divisor of hidden_size"
        )
    return layers, settings, left


def _copy_files(source: Source, folder: Path, python: bool) -> list[str]:
    """The tokenizer and its like, and the file through which mlx-lm finds the model."""
    for place in dict.fromkeys((source.config_file.parent, source.folder)):
        patterns: tuple[str, ...] = COPIED
        if python and (place / "tokenizer_config.json").is_file():
            named = read_json(place / "tokenizer_config.json").get("auto_map") or {}
            named = json.dumps(named)
            patterns += tuple(f.name for f in place.glob("*.py") if f.stem in named)
        for file in (f for pattern in patterns for f in place.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    shutil.copyfile(Path(__file__).parent / "stock" / "model_file.py", folder / MODEL_FILE)
    if has_tokenizer(folder):
        return []
    return [f"warning: {source.folder}: no tokenizer; converted without one"]


def _stop_at_turns(
    source: Source, ids: list[int], config: dict[str, Any], folder: Path
) -> list[str]:
    """Add the token with which the chat template ends a turn to the end tokens of the config,
    and of the generation config that was copied to `folder`; returns what there is to say."""
    if not (folder / "tokenizer_config.json").is_file():
        return []
    try:
        tokenizer = load_tokenizer(folder)
    except Exception as e:  # transformers says "no tokenizer" in many ways
        return [f"warning: {source.folder}: no tokenizer that loads ({one_line(e)})"]
    stops = {"eos_token_id": ids}
    added = add_end_of_turn(stops, tokenizer)
    if added:
        config.update(stops)
        generation = folder / "generation_config.json"
        if generation.is_file():
            generation.write_text(json.dumps({**read_json(generation), **stops}, indent=4))
    return [
        f"Added {token} ({i}) to eos_token_id: the chat template ends a turn with it"
        for i, token in added.items()
    ]


def _model_card(source: Source, upload_repo: str | None) -> ModelCard:
    """A README with the metadata of the source's, as mlx-lm makes it, and how to use this."""
    try:
        card = ModelCard.load(source.folder / "README.md")
    except Exception:  # no README, or none with metadata: it is not worth a failure
        card = ModelCard.from_template(ModelCardData())
    card.data.library_name, card.data.pipeline_tag = "mlx", "text-generation"
    card.data.tags = [*(t for t in card.data.tags or [] if t != "mlx"), "mlx"]
    if source.repo:
        card.data.base_model = source.repo
    card.text = f"""
# {upload_repo or f"{source.repo or source.folder.name}, converted to MLX"}

A model with Kwai Summary Attention, in MLX's format, for ksa-mlx (in a clone of its repository:
`pip install .`):

```python
import ksa_mlx, mlx_lm

model, tokenizer = ksa_mlx.load("{upload_repo or "FOLDER"}")
print(mlx_lm.generate(model, tokenizer, prompt="Hello", verbose=True))
```
"""
    return card


def check_upload(repo: str):
    """Raise `CheckpointError` unless this user can upload to a Hub repo of that name."""
    try:
        validate_repo_id(repo)
        user = HfApi().whoami()
    except HFValidationError as e:
        why = one_line(e)
    except LocalTokenNotFoundError:
        why = "not logged in on the Hub; log in with `hf auth login`"
    except Exception as e:  # the network's and the client's many ways to fail
        why = f"the Hub does not let us in ({one_line(e)})"
    else:
        places = [user["name"], *(org["name"] for org in user.get("orgs", []))]
        place = repo.rpartition("/")[0] or user["name"]
        if place in places:
            return
        why = f"found the namespace {place}, expected one of yours ({', '.join(places)})"
    raise CheckpointError(f"--upload-repo: {repo}: {why}")


def upload(folder: Path, repo: str):
    """Upload a converted folder. Raises `CheckpointError`; the folder stays."""
    try:
        HfApi().create_repo(repo_id=repo, exist_ok=True)
        HfApi().upload_folder(folder_path=folder, repo_id=repo)
    except Exception as e:  # the network's and the client's many ways to fail
        raise CheckpointError(f"{repo}: not uploaded ({one_line(e)}); {folder} is whole") from None


def main(argv: list[str] | None = None) -> int:
    """The command line, with mlx-lm's flags. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="convert.py",
        description=__doc__.splitlines()[0],
        parents=[configure_parser()],
        add_help=False,
        conflict_handler="resolve",
    )
    parser.add_argument("--revision", help="The branch, tag or commit of the Hub repo.")
    parser.add_argument(
        "--trust-remote-code",
        help="Keep the tokenizer's own Python files.",
        action="store_true",
    )
    parser.set_defaults(q_mode=None)  # so that one without -q is seen
    args = parser.parse_args(argv)
    if not args.hf_path:
        parser.error("--hf-path is required")
    stopped = "error: interrupted; nothing was written"
    return exit_status(lambda: convert(**vars(args), report=print), stopped, where=args.mlx_path)


if __name__ == "__main__":
    sys.exit(main())
