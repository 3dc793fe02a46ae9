"""Text between the facts: what is given, or sentences made here; and facts spread in it."""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from .splits import Split

# Where given text can be cut: behind a sentence or a line, and behind a blank where neither comes.
_UNIT = re.compile(r"[^\n]{1,160}?(?:[.!?;:,]\s+|\n+)|[^\n]{1,160}(?:\s+|$)|[^\n]{160}|\n+", re.S)
# Characters a token, at most, of the part of a given text that is looked at.
_CHARACTERS = 8


class Unit(NamedTuple):
    """A piece of text that ends in white space, and about how many tokens it has."""

    text: str
    tokens: int


def made(split: Split, rng: random.Random, count: Callable[[str], int]) -> Iterator[Unit]:
    """Sentences of a split without end, a line each."""
    while True:
        parts = (rng.choice(x) for x in (split.subjects, split.verbs, split.circumstances))
        line = " ".join(parts) + ".\n"
        yield Unit(line, max(1, count(line)))


def given(
    text: str, length: int, rng: random.Random, count: Callable[[str], int]
) -> Iterator[Unit]:
    """Pieces of a text from some place in it on, and from its beginning again at its end."""
    start = rng.randrange(max(1, len(text) - length * _CHARACTERS))
    start = text.find("\n", start) + 1  # 0 where no line begins behind
    while True:
        for found in _UNIT.finditer(text, start):
            yield Unit(found[0], max(1, count(found[0])))
        start = 0


def as_text(filler: str | Sequence[int], tokenizer: Any) -> str:
    """Filler as text, whether text or ids; it ends a line."""
    text = filler if isinstance(filler, str) else tokenizer.decode([int(i) for i in filler])
    return text if text.endswith("\n") else f"{text}\n"


def take(units: Iterator[Unit], tokens: int) -> list[Unit]:
    """The first units that have at most so many tokens."""
    found: list[Unit] = []
    for unit in units:
        tokens -= unit.tokens
        if tokens < 0:
            return found
        found.append(unit)
    return found


def spread(units: Sequence[Unit], facts: Sequence[tuple[float, str]]) -> str:
    """Text of units with facts in lines of their own, each at its depth: 0 is the beginning, 1 the
    end. Facts of equal places keep their order."""
    ends = list(accumulate((u.tokens for u in units), initial=0))
    behind: dict[int, list[str]] = {}
    for depth, fact in facts:
        place = min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
        behind.setdefault(place, []).append(fact)
    text = ""
    for i in range(len(ends)):
        for fact in behind.get(i, ()):
            text += ("" if not text or text.endswith("\n") else "\n") + f"{fact}\n"
        if i < len(units):
            text += units[i].text
    return text if text.endswith("\n") else f"{text}\n"
