"""Recall texts for training: facts spread in a text of the data, asked for at its end."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..recall.tasks import FACTS, questions

# One text of each kind in turn; single values most, as they are what text most asks for.
KINDS = ("digits", "words", "digits", "values", "digits", "variables", "words", "digits")


def recall_maker(
    tokenizer: Any, prefix: Sequence[int], seed: int
) -> Callable[[int, int, np.ndarray], tuple[list[int], list[int]]]:
    """What makes recall text `number` of `length` ids out of some text's ids: its ids, and where
    in it the tokens of answers are. Its sentences and names are never those of an evaluation."""
    end = tokenizer.eos_token_id

    def make(number: int, length: int, filler: np.ndarray) -> tuple[list[int], list[int]]:
        kind = KINDS[number % len(KINDS)]
        asked = FACTS if kind in ("digits", "words") else 4
        found = questions(
            kind, length, asked, seed + number, tokenizer, "train",
            filler=filler.tolist(), asked=asked, beginning=list(prefix),
        )[0]  # fmt: skip
        places = [p for start, stop in found.answers for p in range(start, stop)]
        return [*found.ids, *[end] * (length - len(found.ids))], places

    return make
