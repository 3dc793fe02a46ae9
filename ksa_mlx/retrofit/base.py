"""Opening a base: a pretrained model with full attention, of which a KSA model is made."""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx_lm.tokenizer_utils
from transformers import Qwen3Config

from ..checkpoint.source import Source, local, open_source, weight_files
from ..checkpoint.stop import add_end_of_turn, has_tokenizer, stop_ids
from ..checkpoint.tensors import SafetensorsFiles
from ..config import ModelArgs
from ..errors import CheckpointError, ConfigError, in_file, one_line
from ..weights import EMBED, HEAD, SUMMARY, Shape, expected_shapes, misnamed
from .config import base_config, check_kind, ksa_config
from .gguf import read_gguf
from .gguf_tokenizer import write_tokenizer


@dataclass
class Base:
    """A pretrained Qwen3, Qwen2, Llama or Mistral.

    `config` has the Hub's field names, each said once; `eos_token_id` is a list of all end tokens.
    `weights` have the Hub's names and are read when they are evaluated; packed layers have
    `.scales` and `.biases`, and `config["quantization"]` says how. `tokenizer` is mlx-lm's
    wrapper; its files lie in `folder`. `name` is what the user calls it.
    """

    config: dict[str, Any]
    weights: dict[str, mx.array]
    tokenizer: Any
    folder: Path
    name: str
    # Holds the folder of a tokenizer that was made of a GGUF's metadata.
    keep: TemporaryDirectory | None = None


def open_base(
    model: str | Path, revision: str | None = None, dtype: mx.Dtype | None = None
) -> Base:
    """Open a base.

    Args:
        model: a Hub id, a folder (safetensors, quantised by mlx-lm or not), or a GGUF file.
        revision: a branch, tag or commit of the Hub's repo.
        dtype: of all weights, which are dequantised for it; None keeps them as they are.

    Raises `CheckpointError` (a ValueError) of one line that names the file and the field.
    """
    path = Path(model).expanduser()
    if path.suffix == ".gguf" or path.is_file():
        if path.suffix != ".gguf" or local(path, revision) is None or not path.is_file():
            raise CheckpointError(f"{path}: found no GGUF file, expected one, a folder or a Hub id")
        base = _gguf(path, str(model))
    else:
        base = _folder(open_source(model, revision, check=_check), str(model))
    if dtype is not None:
        _cast(base, dtype)
    return base


def _check(config: dict[str, Any], file: Path):
    with in_file(file):
        check_kind(config)


def _folder(source: Source, name: str) -> Base:
    folder = source.path
    files = weight_files(folder) if folder.is_dir() else []
    if not files:
        raise CheckpointError(f"{folder}: no model*.safetensors")
    checkpoint = SafetensorsFiles(folder, files)
    weights = {n: checkpoint.read(n) for n in checkpoint.tensors if "rotary_emb" not in n}
    with in_file(source.config_file):
        config = base_config(source.config, tied=HEAD not in weights)
    _check_head(config, weights)
    _check_weights(folder, config, weights)
    ids = stop_ids(source, config["vocab_size"])
    tokenizer = _tokenizer(folder, ids)
    return Base(_with_stops(config, ids, tokenizer), weights, tokenizer, folder, name)


def _gguf(file: Path, name: str) -> Base:
    found, weights, metadata = read_gguf(file)
    keep = TemporaryDirectory(prefix="ksa-mlx-")
    folder = Path(keep.name)
    with in_file(file):
        config = base_config(found, tied=HEAD not in weights)
        _check_weights(file, config, weights)
        write_tokenizer(metadata, folder)
    ids = [i for i in [config.get("eos_token_id")] if i is not None]
    tokenizer = _tokenizer(folder, ids)
    return Base(_with_stops(config, ids, tokenizer), weights, tokenizer, folder, name, keep)


def _tokenizer(folder: Path, ids: list[int]) -> Any:
    if not has_tokenizer(folder):
        raise CheckpointError(f"{folder}: no tokenizer (tokenizer.json or tokenizer.model)")
    # A config given, so that transformers does not read the folder's, which may name code.
    settings = {"trust_remote_code": False, "config": Qwen3Config()}
    try:
        return mlx_lm.tokenizer_utils.load(folder, settings, ids or None)
    except Exception as e:  # transformers' many ways to say so
        raise CheckpointError(f"{folder}: no tokenizer that loads ({one_line(e)})") from None


def _with_stops(config: dict[str, Any], ids: list[int], tokenizer: Any) -> dict[str, Any]:
    """The config with all end tokens: its own, and the end of a turn of the chat template."""
    config["eos_token_id"] = ids
    for i in add_end_of_turn(config, tokenizer):
        tokenizer.add_eos_token(str(i))
    return config


def _check_head(config: dict[str, Any], weights: dict[str, mx.array]):
    """A head that the config ties to the embedding is dropped, or, if it differs, kept."""
    if not config["tie_word_embeddings"] or HEAD not in weights or EMBED not in weights:
        return
    a, b = weights[EMBED], weights[HEAD]
    if a.shape == b.shape and mx.array_equal(a, b).item():
        for name in [n for n in weights if n.startswith("lm_head.")]:
            del weights[name]
    else:  # as transformers 5 does
        config["tie_word_embeddings"] = False


def _check_weights(place: Path, config: dict[str, Any], weights: dict[str, mx.array]):
    """Raise `CheckpointError` unless the weights are those that the config announces."""
    layers = config["num_hidden_layers"]
    args = ModelArgs.from_dict(ksa_config(config, [None] * layers, own=False))
    expected = {n: shape for n, shape in expected_shapes(args).items() if n != SUMMARY}
    packed: set[str] = set()
    for path in (n.removesuffix(".scales") for n in weights if n.endswith(".scales")):
        packed |= {f"{path}.{end}" for end in ("scales", "biases")}
    missing = [n for n in expected if n not in weights]
    extra = [n for n in weights if n not in expected and n not in packed]
    if why := misnamed(missing, extra):
        raise CheckpointError(f"{place}: {why}")
    for name, shape in expected.items():
        w, found = weights[name], plain_shape(config, weights, name)
        if w.dtype not in (mx.float32, mx.float16, mx.bfloat16) and found == w.shape:
            raise CheckpointError(f"{place}: {name}: found dtype {w.dtype}, expected a float")
        if found != shape:
            raise CheckpointError(f"{place}: {name}: found {list(found)}, expected {list(shape)}")


def how_packed(config: dict[str, Any], path: str) -> dict[str, Any]:
    """The arguments of `mx.dequantize` for a packed layer."""
    settings = config.get("quantization")
    if settings is None:
        raise ConfigError("quantization", None, f"a JSON object: {path} is packed")
    own = settings.get(path)
    chosen = own if isinstance(own, dict) else settings
    return {name: chosen[name] for name in ("group_size", "bits", "mode") if name in chosen}


def plain_shape(config: dict[str, Any], weights: dict[str, mx.array], name: str) -> Shape:
    """The shape of a weight, unpacked."""
    path, w = name.removesuffix(".weight"), weights[name]
    if f"{path}.scales" not in weights:
        return w.shape
    return (w.shape[0], w.shape[-1] * 32 // how_packed(config, path)["bits"])


def plain_weight(config: dict[str, Any], weights: dict[str, mx.array], path: str, dtype: mx.Dtype):
    """The weight of a layer (rows, columns), unpacked and cast; packed ones in full precision."""
    w, scales = weights[f"{path}.weight"], weights.get(f"{path}.scales")
    if scales is None:
        return w.astype(dtype)
    biases = weights.get(f"{path}.biases")
    if biases is not None:  # else they are 8-bit floats
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(w, scales, biases, **how_packed(config, path)).astype(dtype)


def _cast(base: Base, dtype: mx.Dtype):
    """Give all weights of a base one dtype, packed ones unpacked."""
    for name in [n for n in base.weights if n.endswith(".weight")]:
        path = name.removesuffix(".weight")
        base.weights[name] = plain_weight(base.config, base.weights, path, dtype)
        for end in ("scales", "biases"):
            base.weights.pop(f"{path}.{end}", None)
    for name in [n for n in base.weights if n.endswith(".bias")]:
        base.weights[name] = base.weights[name].astype(dtype)
    base.config.pop("quantization", None)
    base.config["torch_dtype"] = str(dtype).removeprefix("mlx.core.")
