"""Documents of tokens: notes, chats and questions in the form of the chat template, with what every
token is for the loss."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field
from functools import cache

from .data import ABSENT, Fact, Style, Writer
from .values import SPACE, Pieces

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [SYSTEM, USER, ASSISTANT, END, "\n"]

# What a token of a document is, for the loss. In an answer " 4821.<|end|>": MARKER is the space
# before digits, FIRST the 4, REST the other digits, STOP the full stop, ENDING the end token. The
# marker and the stop must be recalled too: whether a number follows, and how long it is. FIXED is
# the first token of a sentence that is always the same: the decision to say it.
PLAIN, ENDING, MARKER, REST, STOP, FIRST, FIXED = range(7)


@dataclass
class Document:
    """Token ids with, for every token, what it is and where its value was written.

    ``source[t]`` is the position of the same token of the same value in the notes, -1 for all
    other tokens. ``starts`` are the positions where a sentence begins.
    """

    ids: list[int] = field(default_factory=list)
    role: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)


@cache
def pieces_of(tokenizer) -> Pieces:
    return Pieces.of(map(tokenizer.id_to_piece, range(tokenizer.get_piece_size())))


class Composer:
    """Turns facts into documents of tokens."""

    def __init__(self, tokenizer, rng: random.Random, style: Style):
        self.tokenizer, self.rng = tokenizer, rng
        self.writer = Writer(rng, style, pieces_of(tokenizer))
        self.space = tokenizer.piece_to_id(SPACE)

    def add(self, doc: Document, text: str, role: int = PLAIN) -> None:
        ids = self.tokenizer.encode(text)
        doc.ids += ids
        doc.role += [role] * len(ids)
        doc.source += [-1] * len(ids)

    def add_note(
        self, doc: Document, fact: Fact, places: dict, before=" ", alone=True, update=False
    ) -> None:
        text, end = self.writer.note(fact, update)
        # Without a full stop, the value ends with the line.
        end = end or ("" if alone else ".")
        doc.starts.append(len(doc.ids))
        self.add(doc, before + text)
        places[fact.key] = fact, len(doc.ids)
        self.add(doc, " " + fact.value)
        self.add(doc, end)

    def add_answer(self, doc: Document, fact: Fact, places: dict) -> None:
        ids = self.tokenizer.encode(" " + fact.value)
        first, (_, place) = True, places[fact.key]
        for i, t in enumerate(ids):
            if t == self.space:
                doc.role.append(MARKER)
            else:
                doc.role.append(FIRST if first else REST)
                first = False
            doc.source.append(place + i)
        doc.ids += ids
        self.add(doc, "." + END)
        doc.role[-2:] = [STOP, ENDING]

    def add_turn(self, doc: Document, text: str) -> None:
        doc.starts.append(len(doc.ids))
        self.add(doc, f"{USER} {text}")
        self.add(doc, ASSISTANT)

    def add_fixed(self, doc: Document, answer: str) -> None:
        at = len(doc.ids)
        self.add(doc, f" {answer}{END}", ENDING)
        doc.role[at] = FIXED

    def add_talk(self, doc: Document) -> None:
        text, answer = self.writer.talk()
        self.add_turn(doc, text)
        self.add_fixed(doc, answer)

    def add_notes(self, doc: Document, facts, places: dict, size: int, told: bool) -> list[Fact]:
        """About ``size`` tokens of notes, in one turn or ``told`` one by one; returns what can be
        asked."""
        rng, writer, style = self.rng, self.writer, self.writer.style
        stop, batch = len(doc.ids) + size, {}
        separator = rng.choice(("\n ", " "))
        # Now and then there is more prose than notes.
        filler = 0.6 if style.filler > 0.1 and rng.random() < 0.15 else style.filler
        while len(doc.ids) < stop or not batch:
            update = bool(places) and rng.random() < style.updates
            if update:
                old = rng.choice(list(places.values()))[0]
                fact = Fact(old.subject, old.attribute, old.kind, writer.value(old.kind))
            else:
                fact = next(facts)
                if fact.key in places:
                    continue
            before = f"{USER} " if told else separator if batch else " "
            if rng.random() < filler:
                doc.starts.append(len(doc.ids))
                self.add(doc, before + writer.filler())
                before = " " if told else separator
            # What is told again in a chat counts, even if it does not say that it is new.
            update = update and not (told and rng.random() < 0.3)
            self.add_note(doc, fact, places, before, told or separator != " ", update)
            if told:
                self.add(doc, ASSISTANT)
                self.add(doc, f" Noted.{END}", ENDING)
            batch[fact.key] = fact
        batch = list(batch.values())
        rng.shuffle(batch)
        return batch

    def add_questions(self, doc: Document, batch: list[Fact], places: dict) -> None:
        """Every fact of ``batch`` is asked once; with things between that no note answers."""
        rng, writer, style = self.rng, self.writer, self.writer.style
        last = None
        while batch:
            if rng.random() < style.talk:
                self.add_talk(doc)
                continue
            if rng.random() < style.absent:
                known = [f for f, _ in places.values()]
                fact = writer.absent(known)
                if last and rng.random() < style.follow:
                    same = Fact(last.subject, fact.attribute, "", "")
                    fact = fact if any(same.is_asked_of(f) for f in known) else same
                self.add_turn(doc, writer.question(fact, last))
                self.add_fixed(doc, ABSENT)
            else:
                near = [f for f in batch if last and writer.follow_up(f, last)]
                fact = near[0] if near and rng.random() < style.follow else batch[-1]
                batch.remove(fact)
                self.add_turn(doc, writer.question(fact, last))
                self.add_answer(doc, fact, places)
            last = fact

    def document(self, length: int, notes: int) -> Document:
        """A document of ``length`` + 1 tokens: about ``notes`` tokens of notes, then questions;
        again, until full."""
        rng, writer, doc, style = self.rng, self.writer, Document(), self.writer.style
        places: dict = {}

        def endless():
            while True:
                yield from writer.facts(2 + length // 8)

        facts = endless()
        if rng.random() < 2 * style.talk:
            self.add_talk(doc)
        while len(doc.ids) <= length:
            told = len(doc.ids) > 0 or rng.random() < 0.15
            size = rng.uniform(0.6, 1.0) * notes
            if told and rng.random() < 0.4:
                size = rng.uniform(1, 40)  # a note or two, asked at once
            joint = not told and rng.random() < 0.2  # notes and first question in one turn
            if not told:
                self.add(doc, USER if joint else rng.choice((SYSTEM, SYSTEM, USER)))
            batch = self.add_notes(doc, facts, places, size, told)
            if joint:
                separator = rng.choice(("\n ", " "))
                self.add(doc, f"{separator}{writer.question(batch[-1])}")
                self.add(doc, ASSISTANT)
                self.add_answer(doc, batch.pop(), places)
            elif not told:
                self.add(doc, END)
            self.add_questions(doc, batch, places)
        n = length + 1
        starts = [s for s in doc.starts if s < length]
        return Document(doc.ids[:n], doc.role[:n], doc.source[:n], starts)


def spread_positions(rng: random.Random, doc: Document, length: int) -> list[int]:
    """Positions with jumps before some sentences, so that short documents show far distances
    too."""
    jumps = {
        rng.choice(doc.starts): int(math.exp(rng.uniform(2, 9.4))) for _ in range(rng.randint(1, 4))
    }
    out, at = [], 0
    for i in range(length):
        at += jumps.get(i, 0)
        out.append(at + i)
    return out
