"""Recall texts for training: facts spread in a text of the data, asked for at its end."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..errors import KSAError
from ..recall.tasks import FACTS, questions
from .data import RecallMaker

# One text of each kind in turn; single values most, as they are what text most asks for.
KINDS = ("digits", "words", "digits", "values", "digits", "variables", "words", "digits")
# Tokens that one text's facts may need more than others'.
SPARE = 64


def recall_maker(tokenizer: Any, prefix: Sequence[int], seed: int) -> RecallMaker:
    """What makes recall text `number` of `length` ids out of some text's ids: its ids, and where
    in it the tokens of answers are. Its sentences and names are never those of an evaluation."""
    end = tokenizer.eos_token_id

    def make(number: int, length: int, filler: np.ndarray) -> tuple[list[int], list[int]]:
        kind = KINDS[number % len(KINDS)]
        asked = FACTS if kind in ("digits", "words") else 4
        found = questions(
            kind, length, 1, seed + number, tokenizer, "train",
            filler=filler.tolist(), asked=asked, beginning=list(prefix),
        )[0]  # fmt: skip
        places = [p for start, stop in found.answers for p in range(start, stop)]
        return [*found.ids, *[end] * (length - len(found.ids))], places

    return make


def check_room(maker: RecallMaker, length: int, filler: np.ndarray):
    """Raises KSAError where recall texts do not fit into `length`, with SPARE tokens left."""
    try:
        for kind in dict.fromkeys(KINDS):
            maker(KINDS.index(kind), length - SPARE, filler)
    except KSAError as e:
        raise KSAError(
            f"--length: found {length}, too short for texts that ask for facts ({e}); --recall 0 "
            "leaves them out"
        ) from None
