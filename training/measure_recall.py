"""Recall of the notebook assistant on names and values that its training never showed.

    python -m training.measure_recall                         # the weights of ksa_mlx/notebook
    python -m training.measure_recall FOLDER --plot FILE.png  # another checkpoint, and the curve

Runs the MLX model, greedy, exact match. Figures: recall by distance, with and without summaries;
several facts about one name; words instead of numbers. ``--quick`` asks a quarter of the
questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import ksa_mlx

from .data import Style
from .evaluate import recall
from .tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DISTANCES = (8, 64, 128, 256, 512, 1024, 2048, 4096)


def plot(rows: list[dict], window: int, longest: int, path: Path) -> None:
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    figure, axes = plt.subplots(figsize=(7, 4))
    x = [r["distance"] for r in rows]
    axes.plot(x, [r["recall"] for r in rows], "o-", color="#0b6e4f", label="with summaries")
    axes.plot(x, [r["hidden"] for r in rows], "s--", color="#b23a48", label="summaries hidden")
    axes.axvline(window, color="#888888", linewidth=1)
    axes.text(
        window * 1.05, 0.5, f"end of the window\n({window} tokens)", fontsize=8, color="#555555"
    )
    axes.axvline(longest, color="#888888", linewidth=1, linestyle=":")
    axes.text(
        longest * 1.05, 0.3, f"longest training\ntext ({longest})", fontsize=8, color="#555555"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(x, [f"{d:,}" for d in x])
    axes.set_ylim(-0.02, 1.02)
    axes.set_xlabel("distance from the value to the end of the notes, tokens")
    axes.set_ylabel("exact-match recall")
    axes.set_title("Notebook assistant: held-out names and values", fontsize=10)
    axes.grid(alpha=0.25)
    axes.legend(loc="center right")
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="training.measure_recall", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "ksa_mlx" / "notebook")
    parser.add_argument("--quick", action="store_true", help="a quarter of the questions")
    parser.add_argument(
        "--longest", type=int, default=512, help="longest training text, for the plot"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="write the curve to this file (needs matplotlib)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    file = args.folder / "tokenizer.model"
    if not file.is_file():
        print(
            f"measure_recall: {file}: no such file; expected a checkpoint of python -m training",
            file=sys.stderr,
        )
        return 1
    tokenizer = load_tokenizer(file)
    model = ksa_mlx.load(str(args.folder))[0]
    window = model.args.windows[0] * model.args.summary_chunk_size
    share = 4 if args.quick else 1
    started, rows = time.monotonic(), []

    def measure(label, distance, hide=False, **options):
        notebooks = max(4, (40 if distance < 1000 else 12 if distance < 3000 else 8) // share)
        score = recall(
            model, tokenizer, distance, notebooks=notebooks, asked=6 if distance < 1000 else 16,
            seed=args.seed + distance, hide=hide, **options,
        )  # fmt: skip
        kinds = ", ".join(f"{k} {r}/{n}" for k, (r, n) in sorted(score.by_kind.items()))
        used = time.monotonic() - started
        line = f"{label:34s} {score.recall:6.1%}  of {score.total:4d}   {kinds}   [{used:.0f} s]"
        print(line, flush=True)
        return score.recall

    for d in DISTANCES:
        on = measure(f"{d} tokens ({d / window:g} windows)", d)
        rows.append(
            {"distance": d, "recall": on, "hidden": measure("    summaries hidden", d, hide=True)}
        )
    other = {}
    base = Style(filler=0.25, held_out=True)
    d = 16 * window
    for layout, label in (
        ("same_subject", "several facts about one name"),
        ("same_attribute", "one attribute, many names"),
        ("bare", "names alone"),
    ):
        other[layout] = measure(f"{label}, {d}", d, style=replace(base, layout=layout))
    other["words"] = measure(
        f"values from word lists, {d}", d, kinds=("color", "city", "item", "word")
    )
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "other": other}, indent=2) + "\n")
    if args.plot:
        plot(rows, window, args.longest, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
