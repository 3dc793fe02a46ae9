"""Held-out recall of a checkpoint, through the MLX model, as a function of distance.

Notes about held-out names with held-out values, other sentences between them. Every question is
the first one asked of its notes, answered by greedy decoding, and right only if the whole answer
is the value. ``distance`` is the number of tokens from the value to the end of the notes; the
question adds about a dozen.
"""

from __future__ import annotations

import copy
import random
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import mlx.core as mx

from ksa_mlx.attention.plan import Step, block_mask
from ksa_mlx.cache.place import Place

from .data import ASSISTANT, END, SYSTEM, USER, Composer, Document, Fact, Style

# Values that training never shows; colours, cities and the like come from lists that it does show.
HELD_OUT_KINDS = ("number", "label", "time")
LONGEST_ANSWER = 12  # tokens


@dataclass
class Question:
    text: str
    fact: Fact
    distance: int  # from the first token of the value to the end of the notes


@dataclass
class Notebook:
    """Tokens of the notes and what can be asked of them."""

    ids: list[int]
    questions: list[Question]


def notebook(
    tokenizer, rng: random.Random, length: int, near: int, far: int, style: Style
) -> Notebook:
    """Notes of about ``length`` tokens; the questions are on facts between ``near`` and ``far``
    tokens back."""
    composer = Composer(tokenizer, rng, style)
    writer, doc, places = composer.writer, Document(), {}
    composer.add(doc, SYSTEM)
    facts, before = [], " "
    while len(doc.ids) < length:
        # One layout cannot fill long notes: there are few held-out names.
        facts = facts or writer.facts(length // 7)
        fact = facts.pop(0)
        if any((f.subject, f.attribute) == (fact.subject, fact.attribute) for f in places):
            continue
        if rng.random() < style.filler:
            composer.add(doc, before + writer.filler())
            before = "\n "
        composer.add_note(doc, fact, places, before)
        before = "\n "
    composer.add(doc, END)
    end = len(doc.ids)
    asked = [
        Question(f"{USER} {writer.question(f)}{ASSISTANT}", f, end - at)
        for f, at in places.items()
        if near <= end - at <= far
    ]
    return Notebook(doc.ids, asked)


@contextmanager
def hidden_summaries():
    """The control: no text token sees a summary. All else is the model as it is."""
    blocks, seen = Step.blocks, Place.seen

    def text_only(step, window):
        k, s = step.args.summary_chunk_size, step.args.summary_token_num
        return [
            (a, b, text, 0, block_mask(a, b, text, 0, k, s, window))
            for a, b, text, _, _ in blocks(step, window)
        ]

    Step.blocks = text_only
    Place.seen = property(lambda place: (0, seen.fget(place)[1]))
    Place.advance.cache_clear()
    try:
        yield
    finally:
        Step.blocks, Place.seen = blocks, seen
        Place.advance.cache_clear()


def answer(model, cache, ids: list[int], end_id: int) -> list[int]:
    """Greedy continuation of ``ids`` on a copy of ``cache``, up to the end token."""
    cache, out = copy.deepcopy(cache), []
    while len(out) < LONGEST_ANSWER:
        logits = model(mx.array([ids]), cache=cache)
        token = mx.argmax(logits[0, -1]).item()
        if token == end_id:
            break
        out.append(token)
        ids = [token]
    return out


@dataclass
class Score:
    right: int = 0
    total: int = 0
    by_kind: dict = field(default_factory=dict)

    def add(self, kind: str, hit: bool):
        self.right, self.total = self.right + hit, self.total + 1
        r, t = self.by_kind.get(kind, (0, 0))
        self.by_kind[kind] = (r + hit, t + 1)

    @property
    def recall(self) -> float:
        return self.right / max(1, self.total)


def recall(
    model, tokenizer, distance: int, *, notebooks: int, asked: int, seed: int = 1, hide: bool =
    False,
    style: Style | None = None, kinds=HELD_OUT_KINDS,
) -> Score:  # fmt: skip
    """Exact-match recall of facts ``distance`` to 1.25 ``distance`` tokens back, in notes of 1.25
    ``distance`` tokens.

    model: a KSA model of ``ksa_mlx.load``; tokenizer: its SentencePieceProcessor. ``asked``
    questions a notebook at most.
    """
    rng, score = random.Random(seed), Score()
    style = style or Style(filler=0.25, held_out=True)
    end_id = tokenizer.piece_to_id(END)
    with hidden_summaries() if hide else nullcontext():
        for _ in range(notebooks):
            # At least 16 tokens of range, so that short distances hold a fact.
            far = distance + max(16, distance // 4)
            notes = notebook(tokenizer, rng, far, distance, far, style)
            questions = [q for q in notes.questions if q.fact.kind in kinds]
            rng.shuffle(questions)
            if not questions:
                continue
            cache = model.make_cache()
            model(mx.array([notes.ids]), cache=cache)
            for q in questions[:asked]:
                out = answer(model, cache, tokenizer.encode(q.text), end_id)
                score.add(q.fact.kind, tokenizer.decode(out).strip() == q.fact.value + ".")
    return score
