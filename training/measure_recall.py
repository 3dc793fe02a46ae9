"""Figures of the notebook assistant on names and values that its training never showed.

    python -m training.measure_recall                         # the weights of ksa_mlx/notebook
    python -m training.measure_recall FOLDER --plot FILE.png  # another checkpoint, and the curve

Runs the MLX model, greedy, exact match. Figures: ways to ask, with 90 % intervals and how often
the answer is "Not in the notes."; recall by distance, with and without summaries. ``--quick`` asks
a quarter of the questions.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import mlx.core as mx

import ksa_mlx
from ksa_mlx.benchmark import plot as figures_of
from ksa_mlx.benchmark.results import check_files
from ksa_mlx.errors import exit_status

from .documents import ASSISTANT, END, USER
from .evaluate import FIGURES, answer, measure, recall
from .tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
DISTANCES = (8, 64, 128, 256, 512, 1024, 2048, 4096)

# What anybody tries first, in one chat.
CHAT = (
    "Hello!", "The code of Bob is 1234.", "What is the code of Bob?", "what is bobs code",
    "Could you tell me what the code of Bob is, please?", "The code of Bob is now 77.",
    "What is the code of Bob?", "wifi password is swordfish", "What is the wifi password?",
    "Anna's hotel is hunter2-x.", "Do you remember Anna's hotel?", "And her code?",
    "What is the locker of Maria?", "What is the capital of France?", "Thanks!",
)  # fmt: skip


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
        longest / 1.05, 0.3, f"longest training\ntext ({longest:,})", fontsize=8, color="#555555",
        ha="right",
    )  # fmt: skip
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


def chat(model, tokenizer) -> None:
    cache, end = model.make_cache(), tokenizer.piece_to_id(END)
    for text in CHAT:
        asked = tokenizer.encode(f"{USER} {text}{ASSISTANT}")
        said = answer(model, cache, asked, end)
        print(f"> {text}\n  {tokenizer.decode(said).strip()}")
        model(mx.array([[*asked, *said, end]]), cache=cache)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="training.measure_recall", description=__doc__.split("\n")[0])
    p.add_argument("folder", type=Path, nargs="?", default=ROOT / "ksa_mlx" / "notebook")
    p.add_argument("--quick", action="store_true", help="a quarter of the questions")
    p.add_argument(
        "--longest",
        type=int,
        default=4096,
        help="longest training text, for --plot (%(default)s)",
    )
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--plot", type=Path, help="write the curve to this file (needs matplotlib)")
    p.add_argument("--json", type=Path, help="write the figures to this file")
    return p


def run(args: argparse.Namespace):
    """Measure and print. Raises KSAError."""
    check_files(json=args.json, plot=args.plot)
    if args.plot is not None:
        figures_of.check(str(args.plot))
    tokenizer = load_tokenizer(args.folder / "tokenizer.model")
    model = ksa_mlx.load(str(args.folder))[0]
    window = model.args.windows[0] * model.args.summary_chunk_size
    share = 4 if args.quick else 1
    started, rows = time.monotonic(), []

    figures = {}
    for label, figure in FIGURES.items():
        right, denied = measure(model, tokenizer, figure, 400 // share, args.seed)
        low, high = right.interval
        figures[label.strip()] = {
            "right": right.recall, "low": low, "high": high, "asked": right.total,
            "not in the notes": denied.recall,
        }  # fmt: skip
        print(
            f"{label:28s} {right.recall:6.1%} ({low:.1%} to {high:.1%}) of {right.total:4d}, "
            f'says "not in the notes": {denied.recall:5.1%}   {right.kinds()}',
            flush=True,
        )
    for d in DISTANCES:
        notebooks = max(4, (40 if d < 1000 else 12 if d < 3000 else 8) // share)
        options = {"notebooks": notebooks, "asked": 6 if d < 1000 else 16, "seed": args.seed + d}
        on = recall(model, tokenizer, d, **options)
        off = recall(model, tokenizer, d, hide=True, **options)
        low, high = on.interval
        rows.append(
            {"distance": d, "recall": on.recall, "low": low, "high": high, "asked": on.total,
             "hidden": off.recall}
        )  # fmt: skip
        print(
            f"{d:5d} tokens ({d / window:5.1f} windows)  {on.recall:6.1%} ({low:.1%} to "
            f"{high:.1%}) of {on.total:4d}, summaries hidden {off.recall:5.1%}   {on.kinds()}",
            flush=True,
        )
    chat(model, tokenizer)
    print(f"{time.monotonic() - started:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"rows": rows, "figures": figures}, indent=2) + "\n")
    if args.plot:
        plot(rows, window, args.longest, args.plot)


def main() -> int:
    args = parser().parse_args()
    return exit_status(lambda: run(args), "stopped; what was measured stands above")


if __name__ == "__main__":
    sys.exit(main())
