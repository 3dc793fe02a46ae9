"""Pack a trained SmolLM2 for the repository, and measure what packing costs.

    python -m tools.pack_smollm2 STUDENT TEXT... [--ranks 8 16 32] [--bits 4 5 6]
    python -m tools.pack_smollm2 STUDENT --ranks 16 --bits 5 --out ksa_mlx/smollm2/summaries.safetensors

STUDENT is the folder that a retrofit wrote, in float32; its base is the installed wheel's, or
--base. For each rank and bits: megabytes, and the loss (nats a token) on the texts beyond token
256, of what the file stands for against the student's own.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

import ksa_mlx
from ksa_mlx.chat.smollm2 import wheels_model
from ksa_mlx.checkpoint.source import read_json
from ksa_mlx.checkpoint.tensors import open_checkpoint
from ksa_mlx.retrofit.base import Base, open_base
from ksa_mlx.retrofit.packed import save_packed, unpack

SKIPPED = 256


def loss(model, texts: list[list[int]]) -> float:
    """Mean loss in nats a token, each text weighing the same."""
    found = []
    for ids in texts:
        x = mx.array([ids])
        each = nn.losses.cross_entropy(model(x)[:, :-1].astype(mx.float32), x[:, 1:])
        found.append(each[:, SKIPPED:].mean().item())
    return float(np.mean(found))


def read_texts(files: list[Path], base: Base, prefix: list[int], length: int) -> list[list[int]]:
    spelled = [base.tokenizer.encode(f.read_text(), add_special_tokens=False) for f in files]
    for file, ids in zip(files, spelled, strict=True):
        if len(prefix) + len(ids) <= SKIPPED + 1:
            sys.exit(f"error: {file}: found {len(ids)} tokens, expected more than {SKIPPED + 1}")
    return [[*prefix, *ids][:length] for ids in spelled]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("student", type=Path)
    parser.add_argument("texts", type=Path, nargs="*")
    parser.add_argument("--base", type=Path, help="a GGUF; the installed wheel's if left out")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 5, 6])
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path, help="keep the file; with one rank and bits")
    args = parser.parse_args()
    if args.out and len(args.ranks) * len(args.bits) > 1:
        parser.error(f"--out: found --ranks {args.ranks}, --bits {args.bits}, expected one of each")
    if args.length <= SKIPPED + 1:
        parser.error(f"--length: found {args.length}, expected more than {SKIPPED + 1}")
    base = open_base(args.base or wheels_model(), dtype=mx.float32)
    config = read_json(args.student / "config.json")
    model, checkpoint = ksa_mlx.load_model(args.student)[0], open_checkpoint(args.student)
    weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
    said = {
        "windows": model.args.windows,
        "chunk": model.args.summary_chunk_size,
        "prefix": config["prefix_token_ids"],
    }
    texts = read_texts(args.texts, base, said["prefix"], args.length)
    own = loss(model, texts) if texts else 0.0
    print(f"{'rank':>5} {'bits':>5} {'MB':>7} {'loss':>8} {'more':>8}")
    print(f"{'-':>5} {32:>5} {'':>7} {own:8.4f} {0:8.4f}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for rank in args.ranks:
            for bits in args.bits:
                file = args.out or Path(folder) / "packed.safetensors"
                file.parent.mkdir(parents=True, exist_ok=True)
                save_packed(file, weights, base, said, rank, bits)
                found = loss(unpack(file, base)[0], texts) if texts else 0.0
                size = file.stat().st_size / 1e6
                print(f"{rank:5} {bits:5} {size:7.2f} {found:8.4f} {found - own:8.4f}", flush=True)


if __name__ == "__main__":
    main()
