"""Loading KSA models: converted folders, unconverted Hub-layout folders, and repo ids."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
import mlx_lm.utils
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..config import MODEL_TYPE, ModelArgs, is_ksa
from ..errors import CheckpointError, ConfigError, one_line
from ..model import Model
from ..weights import announced, hub_plan, mlx_plan
from .muse import is_muse
from .tensors import SafetensorsFiles, read_json, shards

CONVERT_FIRST = "convert it first: python convert.py --hf-path {} --mlx-path DST"


def fetch(
    path_or_repo: str | Path,
    revision: str | None = None,
    patterns: list[str] | None = None,
) -> Path:
    """A local path as it is, or a Hub repo's files (those of `patterns`) on this machine."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        return path
    name = str(path_or_repo)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name}: no such file or folder")
    try:
        path = mlx_lm.utils._download(name, revision=revision, allow_patterns=patterns)
        if path.is_dir():
            return path
        why = f"this repo has no {' and no '.join(patterns or ['files'])}"
    except GatedRepoError:
        why = "this repo asks for your consent on the Hub; then log in with `hf auth login`"
    except RepositoryNotFoundError:
        why = "no such folder here, and no such repo on the Hub (or it is private)"
    except RevisionNotFoundError:
        why = f"this repo has no revision {revision!r}"
    except Exception as e:  # the network's and the client's many ways to fail
        why = f"no such folder here, and not to be had from the Hub ({one_line(e)})"
    raise CheckpointError(f"{name}: {why}")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's `config.json`. Raises `CheckpointError` if it is not a KSA model's."""
    file = folder / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{folder}: no config.json")
    config = read_json(file)
    check_is_ksa(config, file)
    return config


def check_is_ksa(config: dict[str, Any], file: Path):
    if is_ksa(config):
        return
    kind = config.get("model_type") or config.get("model_class") or "unknown"
    found = config.get("use_summary_attention")
    raise CheckpointError(
        f"{file}: a plain {kind} model, not a KSA model (use_summary_attention: found {found}, "
        "expected true); mlx_lm.load and mlx_lm.convert are for it"
    )


def model_args(config: dict[str, Any], file: Path) -> ModelArgs:
    """`ModelArgs.from_dict`, with the file's name in its errors."""
    try:
        return ModelArgs.from_dict(config)
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from None


def open_folder(
    path_or_repo: str | Path, revision: str | None = None
) -> tuple[Path, dict[str, Any]]:
    """The folder of a KSA model, downloaded where it is a repo's, and its config."""
    folder = fetch(path_or_repo, revision, ["config.json"])
    config = read_config(folder)
    if not Path(path_or_repo).expanduser().exists():
        # The commit that the config came from: a snapshot's folder is called after it.
        folder = fetch(path_or_repo, folder.name)
    return folder, config


def load_model(
    path_or_repo: str | Path,
    lazy: bool = False,
    strict: bool = True,
    model_config: dict[str, Any] | None = None,
    revision: str | None = None,
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a KSA model without its tokenizer.

    Args:
        path_or_repo: a folder that `convert.py` wrote, an unconverted KSA folder in the Hub's
            layout (safetensors), or the Hub id of either. No code of the folder is run.
        lazy: leave the weights on disk until they are needed.
        strict: refuse weights that are missing, unknown or of a wrong shape.
        model_config: fields that override `config.json`, such as `{"rollback": 16}`.
        revision: a branch, tag or commit of the repo.

    Returns the model and its config. Raises `CheckpointError` (a ValueError) of one line.
    """
    folder, config = open_folder(path_or_repo, revision)
    return _load_model(folder, config, model_config, lazy, strict)


def _load_model(folder, config, model_config=None, lazy=False, strict=True):
    file = folder / "config.json"
    if is_muse(config):
        raise CheckpointError(f"{file}: a Muse checkpoint; {CONVERT_FIRST.format(folder)}")
    files = shards(folder, "model*.safetensors")
    if not files:
        others = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        why = f"; {CONVERT_FIRST.format(folder)}" if others else ""
        raise CheckpointError(f"{folder}: no model*.safetensors{why}")

    found = SafetensorsFiles(folder, files).shapes()
    overrides = dict(model_config or {})
    converted = config.get("model_type") == MODEL_TYPE
    if not converted:
        overrides = {**announced(config, found), "model_type": MODEL_TYPE, **overrides}
    args = model_args({**config, **overrides}, file)
    quantized = {**config, **overrides}.keys() & {"quantization", "quantization_config"}
    if quantized and not converted:
        raise CheckpointError(
            f"{file}: quantization_config: found one, expected an unquantised checkpoint"
        )
    try:
        # Quantised shapes are the strict load's to check.
        if strict and not quantized:
            (mlx_plan if converted else hub_plan)(args).check(found)
        # Without a model_file there is no code that mlx-lm could run.
        overrides["model_file"] = None
        model, loaded = mlx_lm.utils.load_model(
            folder, lazy, strict, overrides, get_model_classes=lambda config: (Model, ModelArgs)
        )
    except (ValueError, RuntimeError, KeyError, TypeError) as e:
        raise CheckpointError(f"{folder}: {one_line(e)}") from None
    loaded.pop("model_file")
    if converted and "model_file" in config:
        loaded["model_file"] = config["model_file"]
    return model, loaded


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
    folder, config = open_folder(path_or_repo, revision)
    model, config = _load_model(folder, config, model_config, lazy)
    if adapter_path is not None:
        model = mlx_lm.utils.load_adapters(model, adapter_path)
        model.eval()
    # Said either way, so that transformers does not stop and ask.
    extra = {"trust_remote_code": trust_remote_code, **(tokenizer_config or {})}
    try:
        tokenizer = mlx_lm.utils.load_tokenizer(
            folder, extra, eos_token_ids=config.get("eos_token_id")
        )
    except Exception as e:  # transformers says "no tokenizer" in many ways
        raise CheckpointError(
            f"{folder}: no tokenizer that loads ({one_line(e)}); load_model loads the model alone"
        ) from None
    return (model, tokenizer, config) if return_config else (model, tokenizer)
