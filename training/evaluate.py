"""What a checkpoint answers, through the MLX model, on names and values that training never shows.

Questions are answered by greedy decoding and are right only if the whole answer is the expected
one. ``recall`` measures it as a function of distance, the number of tokens from the value to the
end of the notes; ``FIGURES`` are ways to ask.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import mlx.core as mx

from ksa_mlx.attention.plan import Step, block_mask
from ksa_mlx.cache.place import Place

from .data import ABSENT, HELD_OUT_POLITE, TALK, Fact, Style
from .documents import ASSISTANT, END, SYSTEM, USER, Composer, Document
from .words import ORDINARY

# Values that training never shows; colours, cities and the like come from lists that it does show.
HELD_OUT_KINDS = ("number", "label", "time", "free")
LONGEST_ANSWER = 24  # tokens

# Notes and questions in the short standard forms.
KNOWN = Style(
    things=0.12, numbers=0.5, labels=0.15, free=0.0, filler=0.25, polite=0.0, lower=0.0,
    follow=0.0, updates=0.0, talk=0.0, held_out=True,
)  # fmt: skip


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
    facts: list[Fact]


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
        if fact.key in places:
            continue
        if rng.random() < style.filler:
            composer.add(doc, before + writer.filler())
            before = "\n "
        update = bool(places) and rng.random() < style.updates
        if update:
            old = rng.choice(list(places.values()))[0]
            fact = replace(old, value=writer.value(old.kind))
        composer.add_note(doc, fact, places, before, update=update)
        before = "\n "
    composer.add(doc, END)
    end = len(doc.ids)
    asked = [
        Question(turn(writer.question(f)), f, end - at)
        for f, at in places.values()
        if near <= end - at <= far
    ]
    return Notebook(doc.ids, asked, [f for f, _ in places.values()])


def turn(text: str) -> str:
    return f"{USER} {text}{ASSISTANT}"


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
    Place.seen = lambda place, end: (0, seen(place, end)[1])
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


def is_answer(model, cache, ids: list[int], said: list[int]) -> bool:
    """Whether greedy decoding after ``ids`` would say exactly ``said``: one call, not one a
    token."""
    logits = model(mx.array([ids + said[:-1]]), cache=copy.deepcopy(cache))
    return mx.argmax(logits[0, len(ids) - 1 :], axis=-1).tolist() == said


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

    def kinds(self) -> str:
        return ", ".join(f"{k} {r}/{n}" for k, (r, n) in sorted(self.by_kind.items()))

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's, 90 %."""
        n, p, z = max(1, self.total), self.recall, 1.645
        middle = p + z * z / (2 * n)
        spread = z * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
        return (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)


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
    style = style or KNOWN
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
                said = tokenizer.encode(f" {q.fact.value}.{END}")
                score.add(q.fact.kind, is_answer(model, cache, tokenizer.encode(q.text), said))
    return score


# Ways to ask. Each takes (tokenizer, rng) and yields (token ids of the notes, the text of the
# question's turn, the right answer, its kind).

FREE = replace(KNOWN, free=1.0)
MIXED = replace(KNOWN, free=0.4, things=0.2, numbers=0.3, labels=0.1)


def about_notes(style: Style, kinds=HELD_OUT_KINDS, forms=None):
    """Questions about a notebook of 512 tokens."""

    def figure(tokenizer, rng) -> Iterator[tuple]:
        notes = notebook(tokenizer, rng, 512, 0, 512, style)
        writer = Composer(tokenizer, rng, style).writer
        rng.shuffle(notes.questions)
        for q in notes.questions:
            if q.fact.kind in kinds and (q.fact.attribute or style.polite == 0):
                text = q.text
                if forms:
                    filled = rng.choice(forms).format(
                        writer.reference(q.fact.subject, q.fact.attribute)
                    )
                    text = turn(filled[0].upper() + filled[1:])
                yield notes.ids, text, f"{q.fact.value}.", q.fact.kind

    return figure


def updated(tokenizer, rng):
    """Facts whose value was told twice; the later one counts."""
    style = replace(KNOWN, updates=0.0)
    composer = Composer(tokenizer, rng, style)
    first = notebook(tokenizer, rng, 256, 0, 256, style)
    doc, places, writer = Document(ids=first.ids[:-1]), {}, composer.writer
    old = [q.fact for q in first.questions if q.fact.attribute]
    new = [replace(f, value=writer.value(f.kind)) for f in rng.sample(old, min(4, len(old)))]
    for fact in new:
        composer.add(doc, "\n " + writer.filler())
        composer.add_note(doc, fact, places, "\n ", update=True)
    composer.add(doc, END)
    for f in new:
        yield doc.ids, turn(writer.question(f)), f"{f.value}.", f.kind


def told(style: Style, notes: int, those: Sequence[str] = ()):
    """A note told in a chat and asked at once; before it, ``notes`` tokens of other notes. Values
    are drawn from ``those``, if given."""

    def figure(tokenizer, rng):
        composer = Composer(tokenizer, rng, style)
        known = notebook(tokenizer, rng, notes, 0, 0, style) if notes else Notebook([], [], [])
        doc, facts = Document(ids=list(known.ids)), list(known.facts)
        for fact in composer.writer.facts(3):
            if any(fact.is_asked_of(f) or f.is_asked_of(fact) for f in facts):
                continue
            if those:
                fact = replace(fact, value=rng.choice(those), kind="free")
            facts.append(fact)
            composer.add_note(doc, fact, {}, f"{USER} ")
            composer.add(doc, ASSISTANT)
            composer.add(doc, f" Noted.{END}")
            question = turn(composer.writer.question(fact))
            yield list(doc.ids), question, f"{fact.value}.", fact.kind

    return figure


def follow_ups(tokenizer, rng):
    """A question and its answer, then one that is not complete by itself."""
    style = replace(KNOWN, layout="same_subject")
    notes = notebook(tokenizer, rng, 512, 0, 512, style)
    writer = Composer(tokenizer, rng, style).writer
    facts = list(notes.facts)
    rng.shuffle(facts)
    for last in facts:
        for f in facts:
            text = f is not last and writer.follow_up(f, last)
            if text:
                before = turn(writer.question(last)) + f" {last.value}.{END}"
                yield notes.ids, before + turn(text), f"{f.value}.", f.kind
                break


def absent(tokenizer, rng):
    """What is not there, in half of it with a name or an attribute that is."""
    style = replace(MIXED, polite=0.25, lower=0.25)
    notes = notebook(tokenizer, rng, 512, 0, 512, style)
    writer = Composer(tokenizer, rng, style).writer
    for _ in range(6):
        fact = writer.absent(notes.facts)
        known = any(fact.key[0] == f.key[0] for f in notes.facts)
        kind = "name" if known else "attribute" if fact.attribute in {
            f.attribute for f in notes.facts} else "neither"  # fmt: skip
        yield notes.ids, turn(writer.question(fact)), ABSENT, f"{kind} known"


def talk(tokenizer, rng):
    """Greetings and the like, in an empty chat and after notes."""
    ids = notebook(tokenizer, rng, 256, 0, 0, KNOWN).ids
    reply = rng.choice(list(TALK))
    for context in ([], ids):
        yield context, turn(rng.choice(TALK[reply])), reply, reply.split()[0]


FIGURES = {
    "known forms": about_notes(KNOWN),
    "lower case": about_notes(replace(KNOWN, lower=1.0)),
    "polite and indirect": about_notes(replace(KNOWN, polite=1.0)),
    "  phrasings never trained": about_notes(replace(KNOWN, polite=1.0), forms=HELD_OUT_POLITE),
    "free values": about_notes(FREE),
    "words in no list": told(MIXED, 0, ORDINARY),
    "told in chat, asked": told(MIXED, 0),
    "  after 512 tokens of notes": told(MIXED, 512),
    "follow-ups": follow_ups,
    "updates": updated,
    "not there": absent,
    "greetings": talk,
}


def measure(model, tokenizer, figure, questions: int, seed: int = 1) -> tuple[Score, Score]:
    """(right answers, answers that say "Not in the notes."), about ``questions`` of them."""
    rng, right, denied = random.Random(seed), Score(), Score()
    absent = tokenizer.encode(f" {ABSENT}{END}")
    while right.total < questions:
        context, cache = None, None
        for notes, text, expected, kind in figure(tokenizer, rng):
            if notes != context:
                context, cache = notes, model.make_cache()
                if notes:
                    model(mx.array([notes]), cache=cache)
            ids, said = tokenizer.encode(text), tokenizer.encode(f" {expected}{END}")
            hit = is_answer(model, cache, ids, said)
            right.add(kind, hit)
            denied.add(
                kind, hit if said == absent else not hit and is_answer(model, cache, ids, absent)
            )
    return right, denied
