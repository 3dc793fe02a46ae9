"""Do the references of an answer point at what it was drawn from?

    python -m training.measure_references                 # the weights that ship with the project
    python -m training.measure_references FOLDER --quick  # another checkpoint, fewer notebooks

Held-out notes, two to forty windows of them, and questions about them, greedy. Two figures:
- containment: of the right answers, how many have the answer in their top reference;
- deletion: how many answers change once the words of the top reference are replaced by as many
  tokens of prose, and how many once the words of a random passage of the same length are.
"""

import argparse
import copy
import random
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path

import mlx.core as mx

import ksa_mlx
from ksa_mlx.errors import exit_status
from ksa_mlx.references.trace import trace_answer

from .data import Writer
from .documents import END
from .evaluate import KNOWN, answer, notebook
from .tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (64, 160, 320, 640, 1280)  # tokens of notes


@dataclass
class Figures:
    """Counts over questions."""

    asked: int = 0
    right: int = 0
    contained: int = 0  # right, and the answer's text is in the top reference
    touched: int = 0  # right, and the heaviest chunk has part of the answer's value
    changed: int = 0  # other answers without the top reference
    changed_random: int = 0  # other answers without a random passage
    tokens: int = 0  # of all top references
    weight: float = 0.0  # of all top references

    def add(self, other: "Figures"):
        for f in fields(self):
            setattr(self, f.name, getattr(self, f.name) + getattr(other, f.name))

    def line(self, label: str) -> str:
        right, asked = max(1, self.right), max(1, self.asked)
        return (
            f"{label:>14}: {self.right:3d} of {self.asked:3d} right; top reference contains the "
            f"answer {self.contained / right:6.1%}, heaviest chunk holds part of it "
            f"{self.touched / right:6.1%}; answer changes without the top reference "
            f"{self.changed / asked:6.1%}, without a random passage "
            f"{self.changed_random / asked:6.1%}"
        )


def measure(model, tokenizer, lengths=LENGTHS, notebooks=10, asked=6, seed=1):
    """Yield (length, Figures) for each length of notes.

    model: a KSA model; tokenizer: its SentencePieceProcessor.
    """
    style = KNOWN
    for length in lengths:
        rng, figures = random.Random(seed + length), Figures()
        writer = Writer(rng, style)
        for _ in range(notebooks):
            notes = notebook(tokenizer, rng, length, 0, length, style)
            cache = read(model, notes.ids)
            questions = list(notes.questions)
            rng.shuffle(questions)
            for question in questions[:asked]:
                found = ask(model, tokenizer, notes, cache, question, writer, rng)
                if found is not None:
                    figures.add(found)
        yield length, figures


def ask(model, tokenizer, notes, cache, question, writer, rng) -> Figures | None:
    """Figures of one question about notes that the cache has read; None without a reference."""
    k, end = model.args.summary_chunk_size, tokenizer.piece_to_id(END)
    ids = tokenizer.encode(question.text)
    said = answer(model, cache, ids, end)
    if not said:
        return None
    trace = trace_answer(model, notes.ids + ids, said, len(notes.ids), copy.deepcopy(cache))
    found = trace.references(_Decoder(tokenizer), top=1)
    if not found:
        return None
    top, value = found[0], question.fact.value
    size = top.stop - top.start
    at = len(notes.ids) - question.distance
    stop = at + len(tokenizer.encode(" " + value))
    heaviest = int(trace.weights().argmax()) * k
    right = tokenizer.decode(said).strip() == value + "."

    def without(start):
        """The answer if other words stood in a passage as long as the top one."""
        other = list(notes.ids)
        other[start : start + size] = prose(tokenizer, writer, size)
        return answer(model, read(model, other), ids, end)

    places = range(0, len(notes.ids) - size + 1, k)
    starts = [a for a in places if a >= top.stop or a + size <= top.start]
    changed_random = without(rng.choice(starts)) != said if starts else False
    return Figures(
        asked=1,
        right=right,
        contained=right and value in top.text,
        touched=right and heaviest < stop and at < heaviest + k,
        changed=without(top.start) != said,
        changed_random=changed_random,
        tokens=size,
        weight=top.weight,
    )


class _Decoder:
    """What `pieces` asks of a tokenizer, by a SentencePieceProcessor."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def decode(self, ids, skip_special_tokens=False):
        return self.tokenizer.decode(ids)


def read(model, ids):
    """A cache that has read these tokens."""
    cache = model.make_cache()
    model.model(mx.array([ids]), cache=cache)
    return cache


def prose(tokenizer, writer, size):
    """`size` tokens of sentences that hold no fact."""
    ids = []
    while len(ids) < size:
        ids += tokenizer.encode(" " + writer.filler())
    return ids[:size]


def run(args: argparse.Namespace):
    """Measure and print. Raises KSAError."""
    tokenizer = load_tokenizer(args.folder / "tokenizer.model")
    model = ksa_mlx.load_model(args.folder)[0]
    started, total = time.monotonic(), Figures()
    notebooks = 2 if args.quick else 10
    for length, figures in measure(model, tokenizer, notebooks=notebooks, seed=args.seed):
        print(figures.line(f"{length} tokens"), flush=True)
        total.add(figures)
    print(total.line("all"))
    asked = max(1, total.asked)
    print(
        f"a top reference: {total.tokens / asked:.1f} tokens, "
        f"{total.weight / asked:.0%} of the weight; {time.monotonic() - started:.0f} s"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="training.measure_references", description=__doc__.split("\n")[0]
    )
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "ksa_mlx" / "notebook")
    parser.add_argument("--quick", action="store_true", help="a fifth of the notebooks")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    return exit_status(lambda: run(args), "stopped; what was measured stands above")


if __name__ == "__main__":
    sys.exit(main())
