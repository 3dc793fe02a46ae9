"""Convert a KSA checkpoint (the Hub's layout, or Muse's) to MLX.

One tensor is read, checked, cast, quantised and handed to a shard at a time, so that about one
output shard is in memory. All is written to a folder beside the destination, which is renamed
at the end: the destination is absent or whole, whenever the conversion dies.
"""

import argparse
import json
import shutil
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub import HfApi, ModelCard, ModelCardData
from mlx_lm.convert import (
    MODEL_CONVERSION_DTYPES,
    configure_parser,
    mixed_quant_predicate_builder,
)
from tqdm import tqdm

from .checkpoint.load import check_is_ksa, fetch, load_model, model_args
from .checkpoint.muse import is_muse, muse_plan, to_hub_config
from .checkpoint.tensors import Checkpoint, find_config, open_checkpoint, read_json
from .checkpoint.write import ShardWriter, workspace
from .config import MODEL_TYPE
from .errors import CheckpointError, ConfigError, one_line
from .model import Model
from .stock.register import MODEL_FILE
from .weights import Plan, announced, hub_plan, mlx_plan

# What is copied as it is. Upstream's Python files are not among them: nothing here runs them.
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
COPIED = (
    *TOKENIZER,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
    *("chat_template.json", "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*"),
)


def read_source(path: Path) -> tuple[dict[str, Any], dict[str, Any], Path]:
    """The checkpoint's config as it is and as a KSA config, checked, and its file."""
    file = find_config(path)
    raw = read_json(file)
    check_is_ksa(raw, file)
    try:
        return raw, to_hub_config(raw) if is_muse(raw) else dict(raw), file
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from None


def write_weights(
    source: Checkpoint,
    plan: Plan,
    writer: ShardWriter,
    dtype: mx.Dtype | None,
    quantized: dict[str, nn.Module],
):
    """Read every tensor that the plan uses, check it, cast it, quantise it and write it."""
    made_of = defaultdict(list)
    for name, part in plan.parts.items():
        made_of[part.source].append(name)
    bar = tqdm(
        total=sum(source.tensors[n].nbytes for n in made_of),
        desc="Converting",
        unit="B",
        unit_scale=True,
    )

    def check_finite(array: mx.array, origin: str, why: str):
        if not mx.isfinite(array).all().item():
            raise CheckpointError(f"{source.tensors[origin].file}: {origin}: {why}")

    def write(name: str, array: mx.array):
        writer.parameters += array.size
        path = name.removesuffix(".weight")
        if path not in quantized:
            mx.eval(array)
            writer.add(name, array)
            return
        layer = quantized[path]
        arrays = mx.quantize(array, group_size=layer.group_size, bits=layer.bits, mode=layer.mode)
        mx.eval(arrays)
        for end, part in zip(("weight", "scales", "biases"), arrays):
            writer.add(f"{path}.{end}", part)

    with bar:
        for origin in (n for n in source.tensors if n in made_of):
            tensor = source.read(origin)
            for name in made_of[origin]:
                array = plan.parts[name].of(tensor)
                check_finite(array, origin, "found NaN or Inf")
                if dtype is not None and dtype != array.dtype:
                    array = array.astype(dtype)
                    check_finite(array, origin, f"too large for {dtype}")
                write(name, array)
                del array
            del tensor
            bar.update(source.tensors[origin].nbytes)
        for name, shape in plan.zeros.items():
            write(name, mx.zeros(shape, dtype or mx.float32))


def dropped(source: Checkpoint, plan: Plan) -> dict[str, tuple[int, int]]:
    """Parameters and bytes that the converted model leaves out, by reason."""
    total: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    used = defaultdict(int)
    for part in plan.parts.values():
        rows = part.rows or (0, plan.source[part.source][0])
        used[part.source] += rows[1] - rows[0]
    for name, tensor in source.tensors.items():
        if name in plan.dead:
            why, size = plan.dead[name][1], tensor.size
        else:
            why, rows = "padding rows", tensor.shape[0] - used[name]
            size = rows * tensor.size // tensor.shape[0]
        if size:
            total[why][0] += size
            total[why][1] += size * tensor.nbytes // tensor.size
    return {why: (n, b) for why, (n, b) in total.items()}


def convert(
    hf_path: str,
    mlx_path: str = "mlx_model",
    quantize: bool = False,
    q_group_size: int | None = None,
    q_bits: int | None = None,
    q_mode: str = "affine",
    dtype: str | None = None,
    upload_repo: str | None = None,
    revision: str | None = None,
    dequantize: bool = False,
    quant_predicate: str | None = None,
    trust_remote_code: bool = False,
    max_shard_bytes: int = mlx_lm.utils.MAX_FILE_SIZE_GB << 30,
):
    """Convert a KSA checkpoint; arguments as `mlx_lm.convert`'s.

    Args:
        hf_path: a Hub id; a folder in the Hub's layout (safetensors or `pytorch_model*.bin`);
            a Muse folder or state dict with its `config.json`; or a converted folder, to
            quantise, dequantise or cast it.
        trust_remote_code: keep the tokenizer's own Python files, which load with this flag
            only; without it no Python file of the checkpoint is copied.

    Raises `CheckpointError` (a ValueError) or OSError; then `mlx_path` does not exist.
    """
    destination = Path(mlx_path).expanduser()
    if destination.exists() or destination.is_symlink():
        raise CheckpointError(f"{destination}: exists already; name a new folder")
    if quantize and dequantize:
        raise CheckpointError("choose either quantize or dequantize, not both")
    if quant_predicate and not quantize:
        raise CheckpointError("--quant-predicate: found without -q")
    if quant_predicate and q_mode != "affine":
        raise CheckpointError(f"--q-mode: found {q_mode}, expected affine with --quant-predicate")

    with workspace(destination) as folder:
        path = fetch(hf_path, revision, ["config.json"])
        raw, config, file = read_source(path)
        if not Path(hf_path).expanduser().exists():
            path = _download_all(hf_path, path.name, trust_remote_code)
        converted = config.get("model_type") == MODEL_TYPE
        if converted and not (quantize or dequantize or dtype):
            raise CheckpointError(
                f"{path}: converted already; it loads as it is (-q, -d and --dtype change it)"
            )
        if dequantize:
            config, report = _dequantize(path, config, folder)
        else:
            config, report = _convert(
                path, raw, config, file, folder, max_shard_bytes, dtype,
                {"bits": q_bits, "group_size": q_group_size, "mode": q_mode} if quantize else None,
                quant_predicate,
            )  # fmt: skip
        config = {k: v for k, v in config.items() if k != "auto_map"}
        config.update(model_type=MODEL_TYPE, model_file=MODEL_FILE)
        mlx_lm.utils.save_config(config, folder / "config.json")
        _copy_files(path if path.is_dir() else path.parent, file.parent, folder, trust_remote_code)
        repo = None if Path(hf_path).expanduser().exists() else hf_path
        _model_card(path / "README.md", repo, upload_repo).save(folder / "README.md")

    print("\n".join(report))
    print(f"Wrote {destination}")
    if upload_repo is not None:
        try:
            HfApi().create_repo(repo_id=upload_repo, exist_ok=True)
            HfApi().upload_large_folder(
                folder_path=destination, repo_id=upload_repo, repo_type="model"
            )
        except Exception as e:  # the network's and the client's many ways to fail
            raise CheckpointError(
                f"{upload_repo}: not uploaded ({one_line(e)}); {destination} is whole"
            ) from None
        print(f"Uploaded to {upload_repo}")


def _download_all(repo: str, revision: str, python: bool) -> Path:
    patterns = ["model*.safetensors", "*.json", "README.md", *COPIED, *(["*.py"] if python else [])]
    path = fetch(repo, revision, patterns)
    if not any(path.glob("model*.safetensors")):
        path = fetch(repo, revision, [*patterns, "pytorch_model*.bin"])
    return path


def _convert(path, raw, config, file, folder, limit, dtype, quantization, recipe):
    """Write the weights of a checkpoint; returns the config and what there is to say."""
    if "quantization" in config or "quantization_config" in config:
        raise CheckpointError(f"{file}: found a quantised checkpoint, expected an unquantised one")
    source = open_checkpoint(path)
    config = announced(config, source.tensors)
    config["model_type"] = MODEL_TYPE
    args = model_args(config, file)
    if is_muse(raw):
        plan = muse_plan(args, raw)
    else:
        plan = hub_plan(args) if raw.get("model_type") != MODEL_TYPE else mlx_plan(args)
    try:
        plan.check(source.shapes())
    except CheckpointError as e:
        raise CheckpointError(f"{path}: {e}") from None
    source.check_dtypes(plan.source)

    # As in mlx-lm: the config's own dtype, unless told otherwise.
    dtype = dtype or config.get("torch_dtype") or config.get("dtype")
    dtype = dtype if dtype in MODEL_CONVERSION_DTYPES else None
    if dtype:
        config["torch_dtype"] = dtype
        config.pop("dtype", None)  # transformers 5's name for the same
    model = Model(args)  # lazy: its weights are never computed
    quantized: dict[str, nn.Module] = {}
    if quantization:
        quantized, config = _quantization(model, config, quantization, recipe)

    writer = ShardWriter(folder, limit)
    write_weights(source, plan, writer, getattr(mx, dtype) if dtype else None, quantized)
    writer.finish()
    report = [
        f"Dropped {n:,} parameters ({nbytes / 1e6:,.1f} MB): {why}"
        for why, (n, nbytes) in dropped(source, plan).items()
    ]
    report.append(
        f"Kept {writer.parameters:,} parameters, {writer.nbytes / 1e6:,.1f} MB in "
        f"{len(writer.files)} file{'s' * (len(writer.files) > 1)}"
    )
    return config, report


def _quantization(model: Model, config, quantization, recipe):
    """Which layers of the model mlx-lm would quantise, and how; and the config that says so."""
    predicate = None
    if recipe:
        predicate = mixed_quant_predicate_builder(recipe, model, quantization["group_size"] or 64)
    try:
        model, config = mlx_lm.utils.quantize_model(
            model, config, **quantization, quant_predicate=predicate
        )
    except ValueError as e:
        raise CheckpointError(f"-q: {one_line(e)}") from None
    layers = {path: m for path, m in model.named_modules() if hasattr(m, "bits")}
    if not layers:
        size = config["quantization"]["group_size"]
        raise CheckpointError(f"--q-group-size: found {size}, expected a divisor of hidden_size")
    return layers, config


def _dequantize(path: Path, config, folder: Path):
    if "quantization" not in config:
        raise CheckpointError(f"{path}: not quantised, there is nothing to dequantise")
    model, config = load_model(path, lazy=True)
    for name in ("quantization", "quantization_config"):
        config.pop(name, None)
    model = mlx_lm.utils.dequantize_model(model)
    mlx_lm.utils.save_model(folder, model, donate_model=True)
    return config, ["Dequantised the weights"]


def _copy_files(source: Path, beside_config: Path, folder: Path, python: bool):
    """The tokenizer and its like, and the file through which mlx-lm finds the model."""
    for place in dict.fromkeys((beside_config, source)):
        patterns = COPIED
        if python and (place / "tokenizer_config.json").is_file():
            named = read_json(place / "tokenizer_config.json").get("auto_map") or {}
            named = json.dumps(named)
            patterns += tuple(f.name for f in place.glob("*.py") if f.stem in named)
        for file in (f for pattern in patterns for f in place.glob(pattern)):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
    shutil.copyfile(Path(__file__).parent / "stock" / "model_file.py", folder / MODEL_FILE)
    if not any(any(folder.glob(pattern)) for pattern in TOKENIZER):
        print(f"warning: {source}: no tokenizer; converting without one", file=sys.stderr)


def _model_card(readme: Path, repo: str | None, upload_repo: str | None) -> ModelCard:
    """A README with the metadata of the source's, as mlx-lm makes it, and how to use this."""
    try:
        card = ModelCard.load(readme)
    except Exception:  # no README, or none with metadata: it is not worth a failure
        card = ModelCard.from_template(ModelCardData())
    card.data.library_name, card.data.pipeline_tag = "mlx", "text-generation"
    card.data.tags = [*(t for t in card.data.tags or [] if t != "mlx"), "mlx"]
    if repo:
        card.data.base_model = repo
    card.text = f"""
# {upload_repo or f"{repo or readme.parent.name}, converted to MLX"}

A model with Kwai Summary Attention, in MLX's format, for ksa-mlx (`pip install ksa-mlx`):

```python
import ksa_mlx, mlx_lm

model, tokenizer = ksa_mlx.load("{upload_repo or "FOLDER"}")
print(mlx_lm.generate(model, tokenizer, prompt="Hello", verbose=True))
```
"""
    return card


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
    args = parser.parse_args(argv)
    if not args.hf_path:
        parser.error("--hf-path is required")
    try:
        convert(**vars(args))
    except KeyboardInterrupt:
        print("error: interrupted; nothing was written", file=sys.stderr)
        return 130
    except (CheckpointError, ConfigError) as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        print(f"error: {e.filename or args.mlx_path}: {e.strerror or one_line(e)}", file=sys.stderr)
    else:
        return 0
    return 1
