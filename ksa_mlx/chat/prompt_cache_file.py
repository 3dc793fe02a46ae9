"""Conversations on disk: mlx-lm's prompt cache files, and what they have read, and whose."""

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import (
    KVCache,
    QuantizedKVCache,
    load_prompt_cache,
    save_prompt_cache,
)
from safetensors import SafetensorError, safe_open

from ..cache.rolling import RollingSummaryCache
from ..cache.storage import segments_of
from ..errors import SessionError, one_line
from ..files import replaced

# The entry in the file's metadata that tells what the cache has read.
ENTRY = "ksa_mlx"


def write(file: Path, model, name: str, cache: list[Any], about: dict[str, Any]):
    """Write a cache and what it has read; a file that is there is replaced whole or not at all.

    Args:
        file: where to.
        model: whose cache it is.
        name: what that model is called.
        cache: one a layer.
        about: "tokens" of a `Session`, and its conversation's attributes.
    """
    file = cache_file(file)
    if not file.parent.is_dir():
        raise SessionError(f"{file.parent}: no such folder")
    if file.exists() and cache_owner(file) is None:
        raise SessionError(f"{file}: found another kind of file, which stays as it is")
    if not os.access(file.parent, os.W_OK):
        raise SessionError(f"{file.parent}: not writable")
    about = {**about, "fingerprint": fingerprint(model)}
    # The first two are what mlx_lm.generate reads.
    metadata = {"model": name, "tokenizer_config": "{}", ENTRY: json.dumps(about)}
    try:
        with replaced(file) as part:
            save_prompt_cache(str(part), cache, metadata)
    except (OSError, RuntimeError) as e:
        raise SessionError(f"{file}: cannot be written ({one_line(e)})") from None


def read(file: Path, model, name: str) -> tuple[list[Any], dict[str, Any] | None]:
    """A saved cache and what it has read; None for a cache of `mlx_lm.cache_prompt`.

    Raises SessionError if the file is damaged or another model's.
    """
    file = cache_file(file)
    cache, metadata = open_cache(file)
    try:
        owner, entry = str(metadata.get("model")), metadata.get(ENTRY)
        about = None if entry is None else _parse(entry)
        offset = cache[0].offset if about is None else len(about["tokens"])
    except Exception as e:
        raise _damaged(file, e) from None
    if about is None:
        own = owner == name or (
            Path(owner).exists() and Path(owner).resolve() == Path(name).resolve()
        )
    else:
        own = about["fingerprint"] == fingerprint(model)
    if not own:
        raise SessionError(
            f"{file}: found a cache of another model ({owner}), expected one of {name}"
        )
    check(file, model, cache, offset)
    return cache, about


def open_cache(file: Path) -> tuple[list[Any], dict[str, Any]]:
    """A prompt cache file's caches and metadata. Raises SessionError if it is damaged."""
    if "1.0" not in _metadata(file):  # the first layer's class
        raise SessionError(f"{file}: found no prompt cache, or a damaged one")
    try:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
        mx.eval([c.state for c in cache])
        if not all(type(c.offset) is int for c in cache) or not cache:
            raise ValueError("no layers")
        return cache, metadata
    except Exception as e:  # whatever a damaged file makes of the reader
        raise _damaged(file, e) from None


def _damaged(file: Path, error: Exception) -> SessionError:
    return SessionError(f"{file}: found a damaged prompt cache ({one_line(error)})")


def _parse(entry: str) -> dict[str, Any]:
    found = json.loads(entry)
    return {
        "fingerprint": str(found["fingerprint"]),
        "messages": [{k: str(m[k]) for k in ("role", "content")} for m in found["messages"]],
        "plain": [int(t) for t in found["plain"]],
        # Files of earlier versions lack these.
        "asked": [(str(text), int(begin)) for text, begin in found.get("asked", [])],
        "documents": [(str(name), str(text)) for name, text in found.get("documents", [])],
        "tokens": [int(t) for t in found["tokens"]],
    }


def check(file: Path, model, cache: list[Any], offset: int):
    """Whether a cache has the model's layers and has read `offset` tokens in all of them.

    Raises SessionError if not. A cache may be quantised.
    """
    args, expected = model.args, model.make_cache()
    if len(cache) != len(expected):
        raise SessionError(
            f"{file}: found a cache of {len(cache)} layers, expected {len(expected)}"
        )
    for layer, (c, e) in enumerate(zip(cache, expected, strict=True)):
        if isinstance(e, RollingSummaryCache):
            same = isinstance(c, RollingSummaryCache) and c.place[:3] == e.place[:3]
        else:
            same = isinstance(c, (KVCache, QuantizedKVCache))
        same = same and c.offset == offset and not c.empty()
        for one in segments_of(c) if same else ():
            pair: Any = one.keys, one.values
            for x in pair:
                dim = args.head_dim
                if one.form.bits:  # (packed, scales, biases): a scale a group
                    x, dim = x[1], dim // one.form.group_size
                same = same and x.ndim == 4
                same = same and (*x.shape[:2], x.shape[3]) == (1, args.num_key_value_heads, dim)
        if not same:
            raise SessionError(
                f"{file}: layer {layer} does not hold {offset:,} tokens of this model"
            )


def cache_file(file: Path) -> Path:
    """The name with the ending that MLX asks for."""
    return file if file.suffix == ".safetensors" else file.with_name(file.name + ".safetensors")


def cache_owner(file: Path) -> str | None:
    """The name of the model that a saved cache belongs to, if it says."""
    return _metadata(cache_file(file)).get("0.model")


def is_conversation(file: Path) -> bool:
    """Whether a saved cache says what it has read, as `write`'s do."""
    return f"0.{ENTRY}" in _metadata(cache_file(file))


def _metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it is none, or not whole."""
    if not file.is_file():
        raise SessionError(f"{file}: no such file")
    try:
        with safe_open(file, framework="np") as f:
            return f.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def fingerprint(model) -> str:
    """A digest of the config and of a sample of every weight: two models rarely share it."""
    config = {k: v for k, v in asdict(model.args).items() if k != "rollback"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    weights: Any = tree_flatten(model.parameters())
    for name, w in sorted(weights):
        digest.update(f"{name} {w.shape} {w.dtype}".encode())
        digest.update(np.array(w.reshape(-1)[:64].view(mx.uint8)).tobytes())
    return digest.hexdigest()
