"""Where a checkpoint is: a Hub id or a path as files on this machine, its config, and its kind."""

import glob
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..config import MODEL_TYPE, is_ksa
from ..errors import CheckpointError, one_line
from ..weights import some
from .muse import is_muse

SAFETENSORS, PICKLES = "model*.safetensors", "pytorch_model*.bin"
# What may lie beside the weights; none of it is needed to build a model.
SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*", "NOTICE*")
_OFFLINE = (
    "the Hub cannot be reached (no network, or HF_HUB_OFFLINE is set), and its cache here has no "
    "{} of this repo"
)


@dataclass(frozen=True)
class Source:
    """A KSA checkpoint on this machine.

    `path` is its folder, or one file of weights; `config` is its `config.json` as it stands;
    `repo` the Hub id that it was downloaded from.
    """

    path: Path
    config_file: Path
    config: dict[str, Any]
    repo: str | None = None

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def kind(self) -> str:
        """Whose names the weights have: "mlx" (ours), "hub" or "muse" (the trainer's)."""
        if is_muse(self.config):
            return "muse"
        return "mlx" if self.config.get("model_type") == MODEL_TYPE else "hub"


def open_source(
    path_or_repo: str | Path,
    revision: str | None = None,
    python: bool = False,
    pickles: bool = False,
    check: Callable[[dict[str, Any], Path], Any] | None = None,
) -> Source:
    """A KSA checkpoint: a path as it is, a Hub repo downloaded as far as it is needed.

    With `python`, Python files are downloaded too, which some tokenizers need; with `pickles`,
    `pytorch_model*.bin` where the repo has no safetensors. `check` raises for the config, in its
    file, of another model than is wanted, which else is a KSA model. Raises `CheckpointError` of
    one line, before any weights are downloaded if it can.
    """
    path, repo, online = local(path_or_repo, revision), None, False
    if path is None:
        repo = str(path_or_repo)
        path, online = _snapshot(repo, revision)
    elif path.is_file() and path.suffix == ".json":
        raise CheckpointError(f"{path}: found a JSON file, expected a folder or a file of weights")
    file = find_config(path)
    config = read_json(file)
    (check or check_is_ksa)(config, file)
    if repo is not None:
        download = partial(_download, repo, path, online)
        download([*SMALL, *(["*.py"] if python else [])])
        for pattern in (SAFETENSORS, PICKLES) if pickles else (SAFETENSORS,):
            names = [glob.escape(f.name) for f in named_by_index(path, pattern) or ()]
            download(names or [pattern], need=names)
            if any(path.glob(names[0] if names else pattern)):
                break
        else:  # without a network, that is why
            download([SAFETENSORS], need=[SAFETENSORS])
    return Source(path, file, config, repo)


def fetch_config(path_or_repo: str | Path) -> dict[str, Any]:
    """The `config.json` of any model: a folder's, or a Hub repo's. Raises `CheckpointError`."""
    path = local(path_or_repo) or _snapshot(str(path_or_repo))[0]
    return read_json(find_config(path))


def local(path_or_repo: str | Path, revision: str | None = None) -> Path | None:
    """A path that is there; None for the name of a Hub repo. Raises `CheckpointError`."""
    path, name = Path(path_or_repo).expanduser(), str(path_or_repo)
    if path.exists() and name:
        if revision is not None:
            raise CheckpointError(f"revision: found {revision!r} with {path}, expected a Hub id")
        return path
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name or repr(name)}: no such file or folder")
    return None


def _snapshot(repo: str, revision: str | None = None) -> tuple[Path, bool]:
    """The folder of a repo's snapshot, with its `config.json`, and whether the Hub was reached.

    Where it was not, a snapshot in the Hub's cache will do.
    """
    try:
        # Asked first, as the client turns to its cache without a word, and later tries for long.
        HfApi().repo_info(repo, revision=revision or "main")
        path = Path(snapshot_download(repo, revision=revision, allow_patterns=["config.json"]))
        if path.is_dir():
            return path, True
        why = "this repo has no config.json"
    except GatedRepoError:
        why = "this repo asks for your consent on the Hub; then log in with `hf auth login`"
    except RepositoryNotFoundError:
        why = "no such folder here, and no such repo on the Hub (or it is private)"
    except RevisionNotFoundError:
        why = f"this repo has no revision {revision!r}"
    except (HfHubHTTPError, HFValidationError) as e:
        why = f"no such folder here, and not to be had from the Hub ({one_line(e)})"
    except Exception:  # the network's many ways to fail
        why = f"no such folder here, and {_OFFLINE.format('config.json')}"
    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    if isinstance(config, str):
        return Path(config).parent, False
    raise CheckpointError(f"{repo}: {why}")


def _download(
    repo: str, snapshot: Path, online: bool, patterns: list[str], need: Iterable[str] = ()
):
    """Add files to a snapshot, whose folder is called after its commit.

    Without a network they may be missing, but for a file of each pattern in `need`.
    """
    if online:
        try:
            snapshot_download(repo, revision=snapshot.name, allow_patterns=patterns)
        except Exception as e:  # the network's and the client's many ways to fail
            raise CheckpointError(f"{repo}: not to be had from the Hub ({one_line(e)})") from None
    elif missing := [pattern for pattern in need if not any(snapshot.glob(pattern))]:
        raise CheckpointError(f"{repo}: {_OFFLINE.format(some(missing))}")


def check_is_ksa(config: dict[str, Any], file: Path):
    """Raise `CheckpointError` for the config of any other model."""
    if is_ksa(config):
        return
    kind = config.get("model_type") or config.get("model_class") or "unknown"
    found = config.get("use_summary_attention")
    raise CheckpointError(
        f"{file}: a plain {kind} model, not a KSA model (use_summary_attention: found {found!r}, "
        "expected true); mlx_lm.load and mlx_lm.convert are for it"
    )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `CheckpointError`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: not readable as JSON ({one_line(e)})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: found a {type(value).__name__}, expected a JSON object")
    return value


def find_config(path: Path) -> Path:
    """The `config.json` of a checkpoint: in its folder, beside its file, or above a DCP folder."""
    folder = path if path.is_dir() else path.parent
    places = [folder] if not (folder / ".metadata").exists() else [folder, folder.parent]
    for place in places:
        if (place / "config.json").is_file():
            return place / "config.json"
    raise CheckpointError(f"{folder}: no config.json")


def weight_files(folder: Path, pattern: str = SAFETENSORS) -> list[Path]:
    """The files that a folder's model is made of; empty if there is none of the pattern's kind.

    With an index, exactly the files that it names. Without one, all of the pattern, and where
    they are numbered (-00001-of-00003) the whole series. Raises `CheckpointError` if one lacks.
    """
    files = named_by_index(folder, pattern)
    if files is None:
        files = sorted(folder.glob(pattern))
        for file in list(files):
            if shard := re.fullmatch(r"(.*)-(\d+)-of-(\d+)(\.\w+)", file.name):
                stem, number, count, end = shard.groups()
                if int(count) > 10_000:
                    raise CheckpointError(f"{file}: found {count} shards, expected at most 10000")
                width = len(number)
                names = [f"{stem}-{i:0{width}}-of-{count}{end}" for i in range(1, int(count) + 1)]
                if not any(f.name == names[0] for f in files):  # some count from 0
                    names = [f"{stem}-{i:0{width}}-of-{count}{end}" for i in range(int(count))]
                files += [folder / n for n in names if folder / n not in files]
    missing = [f.name for f in files if not f.is_file()]
    if missing:
        raise CheckpointError(f"{folder}: missing files: {some(missing)}")
    return files


def named_by_index(folder: Path, pattern: str) -> list[Path] | None:
    """The files that the index of a folder names, there or not; None without an index."""
    stem, end = pattern.split("*")
    index = folder / f"{stem}{end}.index.json"
    if not index.is_file():
        others = sorted(folder.glob(f"*{end}.index.json"))
        if not others:
            return None
        if len(others) > 1:
            raise CheckpointError(
                f"{folder}: found {some(f.name for f in others)}, expected {index.name}"
            )
        index = others[0]
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map: found none, expected a JSON object")
    names = sorted({str(n) for n in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(end):
            raise CheckpointError(f"{index}: found {name!r}, expected a plain file name, *{end}")
    return [folder / name for name in names]
