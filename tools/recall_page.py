"""Renew the tables and the figure of a section of docs/recall.md.

    python tools/recall_page.py notebook
    python tools/recall_page.py smollm2 --model SmolLM2-135M-Instruct SmolLM2-KSA

Stopped, it goes on with the same command. On a CPU, where products in float16 are slow, models
should be in float32; the embedded one is converted for it.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

from ksa_mlx.chat.notebook import CHECKPOINT
from ksa_mlx.convert import convert
from ksa_mlx.recall import __main__ as recall

PAGE = Path(__file__).parents[1] / "docs" / "recall.md"

# Flags of `recall`, by the section's name.
SECTIONS = {
    "notebook": "--chat bare --kinds needle digits words values --lengths 512 1024 2048 "
    "--questions 40 --kv-bits 8 4",
    "smollm2": "--kinds needle digits --lengths 1024 --questions 40 --kv-bits 8 4",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--model", nargs="+", help="(notebook: the embedded model)")
    parser.add_argument("--data", nargs="+", default=[], help="as of recall")
    args = parser.parse_args()
    if args.model is None and args.section != "notebook":
        parser.error(f"{args.section}: needs --model")
    with tempfile.TemporaryDirectory() as folder:
        models = args.model
        if models is None:
            models = [f"{folder}/notebook"]
            convert(str(CHECKPOINT), models[0], dtype="float32")
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
