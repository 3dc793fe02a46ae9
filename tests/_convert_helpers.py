"""What the tests of the converter and the loader share: golden checkpoints, tampered with."""

import json
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from ksa_mlx.convert import main

GOLDENS = Path(__file__).parent / "goldens"
# Ours, of bases without q/k norms (make_goldens.py); the others are the official code's.
BASES = ("llama_hybrid", "qwen2_two_summaries")
HUB = (
    "hybrid_mix0",
    "hybrid_mix1",
    "pure_small",
    "two_summaries",
    "shared_params",
    "hybrid_outgrown",
    *BASES,
)
MUSE = ("muse_bypass", "muse_bypass_mid")
WEIGHTS = "model.safetensors"


def read_config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def hub_folder(folder: Path, case: str = "hybrid_mix1", weights=None, **fields) -> Path:
    """A copy of a golden Hub checkpoint; `weights` changes the dict of tensors in place, and
    `fields` the config (None removes a field)."""
    folder.mkdir()
    tensors = load_file(GOLDENS / case / WEIGHTS)
    if weights is not None:
        weights(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    config = {**read_config(GOLDENS / case), **fields}
    config = {k: v for k, v in config.items() if v is not None or k not in fields}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def sharded(
    folder: Path,
    count: int = 3,
    case: str = "hybrid_mix1",
    name: str = "model-{:05d}-of-{:05d}.safetensors",
) -> Path:
    """A golden Hub checkpoint in `count` files, called `name`, with an index."""
    folder.mkdir()
    tensors = load_file(GOLDENS / case / WEIGHTS)
    weight_map = {}
    for i in range(count):
        file = name.format(i + 1, count)
        part = dict(list(tensors.items())[i::count])
        save_file(part, folder / file)
        weight_map.update(dict.fromkeys(part, file))
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    shutil.copy(GOLDENS / case / "config.json", folder)
    return folder


def add_tokenizer(folder: Path, vocabulary: int = 96):
    """A tokenizer of one word an id: `w5` is id 5."""
    words = {f"w{i}": i for i in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "w95"})
    )


def convert(source, destination, *flags) -> int:
    """Run the command line; returns the exit status."""
    return main(["--hf-path", str(source), "--mlx-path", str(destination), *flags])


def refused(capsys, source, destination, *flags) -> str:
    """Run a conversion that must fail without a trace; returns its one line."""
    before = sorted(Path(destination).parent.iterdir())
    capsys.readouterr()
    assert convert(source, destination, *flags) == 1
    assert sorted(Path(destination).parent.iterdir()) == before
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def nan_in(name: str, value: float = np.nan):
    """A change to a checkpoint: one bad number in a tensor."""

    def change(tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[3] = value

    return change
