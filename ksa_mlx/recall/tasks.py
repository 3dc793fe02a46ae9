"""Texts with facts and questions about them, by kind, length, seed and split.

`questions` makes them; `score.py` says what a model answers. Texts of the split "train" share no
sentence, no name and no filler with those of "test".
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

from ..errors import KSAError
from .filler import as_text, given, made, spread, take
from .kinds import MAKE, Plan
from .prompts import Prompt, Prompts, shared
from .splits import SPLITS

KINDS = tuple(MAKE)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
FACTS = 8  # of the kinds "digits" and "words"
SLACK, ROUNDS = 8, 5  # tokens that a text may be too short; tries to come that near


@dataclass(frozen=True)
class Question:
    """A text with a question and its answer, or with several in a row.

    kind: one of KINDS. text: its number; questions of one text are asked each by itself, and share
    the first `shared` ids. ids: text, question and answer. answers: start, stop of each answer in
    ids. depth: where in the text the first fact lies, 0 the beginning, 1 the end; distance: from
    there to the answer, in tokens; None where the whole text holds the answer.
    """

    kind: str
    text: int
    ids: list[int]
    answers: list[tuple[int, int]]
    shared: int
    depth: float | None
    distance: int | None


def questions(
    kind: str,
    length: int,
    count: int,
    seed: int,
    tokenizer: Any,
    split: str = "test",
    *,
    filler: str | Sequence[int] | None = None,
    asked: int = 1,
    facts: int = FACTS,
    depths: Sequence[float] = DEPTHS,
    chat: str | None = None,
    beginning: list[int] | None = None,
) -> list[Question]:
    """The first `count` questions; the same for the same arguments, always.

    Args:
        kind: one of KINDS.
        length: tokens of text, question and answer together, at most; a few less.
        count: how many questions.
        seed: another one gives other texts.
        tokenizer: of transformers, or mlx-lm's wrapper of it.
        split: "test" or "train".
        filler: text or ids that the facts are spread in, None: sentences made here.
        asked: how many questions one text ends with, one after the other.
        facts: how many a text has (kinds "digits" and "words").
        depths: where they lie (kind "needle"), each 0 to 1.
        chat: as `Prompts` takes it.
        beginning: likewise.

    Raises KSAError for a kind or split that there is not, a number that makes no sense, and for
    texts too short for their facts.
    """
    prompts = Prompts(tokenizer, chat, beginning)
    texts = Texts(kind, length, seed, prompts, split, filler, asked, facts, depths)
    return list(islice((q for text in texts for q in text), count))


class Texts:
    """All texts of a kind and length: iterated, groups of questions without end.

    Args: as in `questions`; prompts: how a model is asked.
    """

    def __init__(
        self,
        kind: str,
        length: int,
        seed: int,
        prompts: Prompts,
        split: str = "test",
        filler: str | Sequence[int] | None = None,
        asked: int = 1,
        facts: int = FACTS,
        depths: Sequence[float] = DEPTHS,
    ):
        for name, found, known in (("kind", kind, KINDS), ("split", split, tuple(SPLITS))):
            if found not in known:
                raise KSAError(f"{name}: found {found!r}, expected one of {', '.join(known)}")
        most = min(len(s.names) for s in SPLITS.values())
        if not 1 <= facts <= most:
            raise KSAError(f"facts: found {facts}, expected 1 to {most}")
        if not 1 <= len(depths) <= most or not all(0 <= d <= 1 for d in depths):
            raise KSAError(f"depths: found {list(depths)}, expected 1 to {most} numbers in [0, 1]")
        if asked < 1 or (asked > 1 and prompts.chat):
            raise KSAError(f"asked: found {asked}, expected 1 in a chat, at least 1 elsewhere")
        self.kind, self.length, self.seed, self.prompts = kind, length, seed, prompts
        self.split, self.asked, self.facts, self.depths = split, asked, facts, tuple(depths)
        self.filler = None if filler is None else as_text(filler, prompts.tokenizer)

    def __iter__(self) -> Iterator[list[Question]]:
        return map(self.text, count())

    def text(self, number: int) -> list[Question]:
        """The questions of one text. Raises KSAError if its facts do not fit into the length."""
        room, best = self.length, None
        # A tokenizer may make more or fewer tokens of the whole than of its pieces.
        for i in count():
            plan, body, filled = self._body(number, room)
            lengths = [self.prompts.length(body, some) for some in self._at_once(plan)]
            left = self.length - max(lengths)
            if left >= 0 and (best is None or left < best[0]):
                best = left, plan, body
            if best is not None and (best[0] <= SLACK or not filled or i >= ROUNDS):
                break
            if not filled:
                raise KSAError(
                    f"{self.kind}: found a length of {self.length} tokens, expected at least "
                    f"{self.length - left} for its facts and a question"
                )
            room += left
        assert best is not None
        _, plan, body = best
        made = [self.prompts.of(body, some) for some in self._at_once(plan)]
        return self._questions(number, plan, made)

    def _body(self, number: int, room: int) -> tuple[Plan, str, bool]:
        """A text of about `room` tokens, and whether it could be shorter."""
        split, tokens = SPLITS[self.split], self.prompts.count
        key = f"{self.seed} {self.split} {self.kind} {number}"
        one = tokens(", ".join(split.words)) / len(split.words)  # a word of a list
        entries = max(0, int(room / one))
        plan = MAKE[self.kind](split, random.Random(key), self.depths, self.facts, entries)
        if self.kind == "common":
            return plan, spread([], plan.facts), room > 30 * one
        rng = random.Random(f"{key} filler")
        units = made(split, rng, tokens)
        if self.filler is not None:
            units = given(self.filler, self.length, rng, tokens)
        taken = take(units, room - sum(tokens(f"{fact}\n") for _, fact in plan.facts))
        return plan, spread(taken, plan.facts), bool(taken)

    def _at_once(self, plan: Plan) -> list[list]:
        return [plan.asked[i : i + self.asked] for i in range(0, len(plan.asked), self.asked)]

    def _questions(self, number: int, plan: Plan, made: list[Prompt]) -> list[Question]:
        # Answers, which alone are scored, are never in what all questions share.
        first = min(one.answers[0][0] for one in made)
        common, found = min(shared([one.ids for one in made]), first - 1), []
        for some, one in zip(self._at_once(plan), made, strict=True):
            depth = distance = None
            if (fact := some[0].fact) is not None:
                depth, written = plan.facts[fact]
                before = self.prompts.encode(one.text[: one.text.index(written)])
                distance = one.answers[0][0] - len(before)
            found.append(Question(self.kind, number, one.ids, one.answers, common, depth, distance))
        return found
