"""Synthetic notebooks: notes about people and places, other text between them, then questions.

Everything is drawn from a ``random.Random``, so a seed gives the same documents on every machine.
A sixth of the first names and a tenth of the values are held out: training never shows them,
evaluation shows nothing else.
"""

from __future__ import annotations

import math
import random
import string
import zlib
from dataclasses import dataclass, field

from . import words

SYSTEM, USER, ASSISTANT, END = "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"
SPECIAL = [SYSTEM, USER, ASSISTANT, END, "\n"]


def is_held_out(text: str, share: int) -> bool:
    """Whether ``text`` belongs to the held-out 1 / share, by a hash: the same everywhere, for
    ever."""
    return zlib.crc32(b"ksa" + text.encode()) % share == 0


TRAIN_NAMES = [n for n in words.NAMES if not is_held_out(n, 6)]
HELD_OUT_NAMES = [n for n in words.NAMES if is_held_out(n, 6)]


@dataclass(frozen=True)
class Fact:
    """``attribute`` of ``subject`` is ``value``; a bare fact has no attribute."""

    subject: str
    attribute: str
    kind: str
    value: str

    @property
    def is_place(self) -> bool:
        return self.subject.startswith("the ")


@dataclass
class Style:
    """How hard the notes of a document are."""

    made_up_names: float = 0.4
    places: float = 0.12
    numbers: float = 0.5
    labels: float = 0.15
    filler: float = 0.15
    shared: float = 0.5
    plain: float = 0.5  # how many facts have the short standard wording
    held_out: bool = False
    layout: str = ""  # one of LAYOUTS for all documents, or drawn


# How the facts of a document are told apart: by name alone, by the name for one attribute, by the
# attribute for few names.
LAYOUTS = {"bare": 0.08, "same_attribute": 0.17, "same_subject": 0.15, "mixed": 0.6}


class Writer:
    """Draws facts and puts them, and the questions about them, into words."""

    def __init__(self, rng: random.Random, style: Style):
        self.rng, self.style = rng, style

    def name(self) -> str:
        rng = self.rng
        if self.style.held_out:
            return rng.choice(HELD_OUT_NAMES)
        if rng.random() < self.style.made_up_names:
            # The head of one name on the tail of another: new, and in pieces like those of unseen
            # names.
            a, b = rng.choice(TRAIN_NAMES), rng.choice(TRAIN_NAMES)
            made = (
                a[: rng.randint(1, max(1, len(a) - 1))]
                + b[-rng.randint(2, max(2, len(b) - 1)) :].lower()
            )
            if 3 <= len(made) <= 10 and not is_held_out(made, 6):
                return made
        return rng.choice(TRAIN_NAMES)

    def _unseen(self, draw) -> str:
        while True:
            value = draw()
            if is_held_out(value, 10) == self.style.held_out:
                return value

    def number(self) -> str:
        rng = self.rng
        if not self.style.held_out and rng.random() < 0.25:
            return str(rng.randint(10, 99))  # two digits: too few to hold any out
        return self._unseen(
            lambda: "".join(rng.choice(string.digits) for _ in range(rng.choice((3, 4, 4))))
        )

    def label(self) -> str:
        rng = self.rng
        if rng.random() < 0.25:
            return self._unseen(
                lambda: str(rng.randint(1, 99)) + rng.choice(string.ascii_uppercase)
            )
        return self._unseen(lambda: rng.choice(string.ascii_uppercase) + str(rng.randint(1, 99)))

    def value(self, kind: str) -> str:
        rng = self.rng
        if kind == "number":
            return self.number()
        if kind == "label":
            return self.label()
        if kind == "time":
            return self._unseen(
                lambda: f"{rng.randint(1, 12)}:{rng.choice('012345')}{rng.choice('05')}"
            )
        if kind == "person":
            return self.name()
        choices = {
            "color": words.COLORS,
            "city": words.CITIES,
            "item": words.ITEMS,
            "word": words.PASSWORDS,
        }
        return rng.choice(choices[kind])

    def key(self) -> tuple[str, str, str]:
        """(subject, attribute, kind)"""
        rng, style = self.rng, self.style
        if rng.random() < style.places:
            place = (rng.choice(words.ADJECTIVES) + " " if rng.random() < 0.6 else "") + rng.choice(
                words.PLACES
            )
            return "the " + place, rng.choice(words.PLACE_ATTRIBUTES), "number"
        x = rng.random()
        if x < style.numbers:
            kind = "number"
        elif x < style.numbers + style.labels:
            kind = "label"
        else:
            kind = rng.choices(
                ("color", "city", "item", "time", "word", "person"), (6, 4, 3, 4, 3, 2)
            )[0]
        return self.name(), rng.choice(words.ATTRIBUTES[kind]), kind

    def facts(self, n: int) -> list[Fact]:
        """n facts; some share the subject, others the attribute, with an earlier one: both must be
        read."""
        rng = self.rng
        seen, out = set(), []
        layout = self.style.layout or rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        first = self.key()
        while first[0].startswith("the "):
            first = self.key()
        subject, left = first[0], 0
        for _ in range(50 * n):
            if len(out) == n:
                break
            s, a, k = self.key()
            place = s.startswith("the ")
            if layout == "bare":
                s, a, k = (self.name() if place else s), "", ("number" if rng.random() < 0.7 else k)
            elif layout == "same_attribute":
                s, a, k = (self.name() if place else s), first[1], first[2]
            elif layout == "same_subject" and not place:
                if left == 0:
                    subject, left = s, rng.randint(2, 5)
                s, left = subject, left - 1
            elif out and not place and rng.random() < self.style.shared:
                o = rng.choice(out)
                if not o.is_place and o.attribute:
                    s, a, k = (o.subject, a, k) if rng.random() < 0.5 else (s, o.attribute, o.kind)
            if (s, a) in seen:
                continue
            seen.add((s, a))
            out.append(Fact(s, a, k, self.value(k)))
        return out

    def note(self, fact: Fact) -> tuple[str, str]:
        """A sentence up to its value, and what follows the value."""
        rng, s, a = self.rng, fact.subject, fact.attribute
        end = "."
        if not a:
            text = f"{s}:"
        elif rng.random() < self.style.plain:
            text = rng.choice((f"the {a} of {s} is", f"{s}'s {a} is"))
        else:
            wordings = (
                (f"{s}'s {a}:", "."),
                (f"{a} of {s}:", "."),
                (f"{s} has {a}", "."),
                (f"for {s} the {a} is", "."),
                (f"remember that the {a} of {s} is", "."),
                (f"{s}, {a}", "."),
                (f"{s}: {a}", "."),
                (f"{s}'s {a} is", " now."),
                (f"I think the {a} of {s} is", "."),
                (f"{s} got", f" as {a}."),
                (f"the {a} for {s} is", "."),
            )
            text, end = rng.choice(wordings)
        x = rng.random()
        if x < 0.08:
            return f"Note {rng.randint(1, 99)}: {text}", end
        if x < 0.15:
            return f"Note: {text}", end
        return text[0].upper() + text[1:], end

    def question(self, fact: Fact) -> str:
        rng, s, a = self.rng, fact.subject, fact.attribute
        head = s[0].upper() + s[1:]
        if not a:
            return rng.choice((f"{head}?", f"{head}?", f"What about {s}?"))
        x = rng.random()
        if x < 0.3:
            return f"{head}'s {a}?"
        if x < 0.6:
            return f"What is the {a} of {s}?"
        if x < 0.85:
            return f"What is {s}'s {a}?"
        wordings = (
            f"Tell me the {a} of {s}.",
            f"Which {a} does {s} have?",
            f"The {a} of {s}?",
            f"And {s}'s {a}?",
            f"Do you know {s}'s {a}?",
            f"what is the {a} of {s}",
            f"What is the {a} for {s}?",
        )
        return rng.choice(wordings)

    def filler(self) -> str:
        """Sentences that hold no fact; some with a number, some of loose words or letters."""
        rng, out = self.rng, []
        while not out or rng.random() < 0.3:
            out.append(self._sentence())
        return " ".join(out)

    def _sentence(self) -> str:
        rng, x = self.rng, self.rng.random()
        if x < 0.15:
            text = " ".join(rng.choice(words.COMMON) for _ in range(rng.randint(3, 10)))
            return text[0].upper() + text[1:] + "."
        if x < 0.22:
            letters = string.ascii_lowercase + "aeiou" * 3
            sizes = [rng.randint(2, 8) for _ in range(rng.randint(2, 6))]
            return " ".join("".join(rng.choice(letters) for _ in range(n)) for n in sizes) + "."
        if x < 0.3:
            return rng.choice(words.COUNTED).format(rng.randint(2, 999)) + "."
        text = f"{rng.choice(words.SUBJECTS)} {rng.choice(words.VERBS)}"
        return text + (f" {rng.choice(words.CIRCUMSTANCES)}." if rng.random() < 0.6 else ".")


# What a token of a document is, for the loss. In an answer " 4821.<|end|>": MARKER is the space
# before digits, FIRST the 4, REST the other digits, STOP the full stop, ENDING the end token. The
# marker and the stop must be recalled too: whether a number follows, and how long it is.
PLAIN, ENDING, MARKER, REST, STOP, FIRST = range(6)


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


class Composer:
    """Turns facts into documents of tokens."""

    def __init__(self, tokenizer, rng: random.Random, style: Style):
        self.tokenizer, self.rng, self.writer = tokenizer, rng, Writer(rng, style)
        self.space = tokenizer.piece_to_id("\u2581")

    def add(self, doc: Document, text: str) -> None:
        ids = self.tokenizer.encode(text)
        doc.ids += ids
        doc.role += [PLAIN] * len(ids)
        doc.source += [-1] * len(ids)

    def add_note(self, doc: Document, fact: Fact, places: dict, before: str = " ") -> None:
        text, end = self.writer.note(fact)
        doc.starts.append(len(doc.ids))
        self.add(doc, before + text)
        places[fact] = len(doc.ids)
        self.add(doc, " " + fact.value)
        self.add(doc, end)

    def add_answer(self, doc: Document, fact: Fact, places: dict) -> None:
        ids = self.tokenizer.encode(" " + fact.value)
        first = True
        for i, t in enumerate(ids):
            if t == self.space:
                doc.role.append(MARKER)
            else:
                doc.role.append(FIRST if first else REST)
                first = False
            doc.source.append(places[fact] + i)
        doc.ids += ids
        self.add(doc, "." + END)
        doc.role[-2:] = [STOP, ENDING]

    def add_question(self, doc: Document, fact: Fact, places: dict) -> None:
        doc.starts.append(len(doc.ids))
        self.add(doc, f"{USER} {self.writer.question(fact)}{ASSISTANT}")
        self.add_answer(doc, fact, places)

    def document(self, length: int, notes: int) -> Document:
        """A document of ``length`` + 1 tokens: about ``notes`` tokens of notes, then questions;
        again, until full."""
        rng, doc, style = self.rng, Document(), self.writer.style
        places: dict = {}
        facts = iter(self.writer.facts(2 + (length // 8)))
        # Now and then there is more prose than notes.
        filler = 0.6 if style.filler > 0.1 and rng.random() < 0.15 else style.filler
        while len(doc.ids) <= length:
            batch, stop = [], len(doc.ids) + rng.uniform(0.6, 1.0) * notes
            dictated = len(doc.ids) > 0 or rng.random() < 0.15
            joint = not dictated and rng.random() < 0.25  # notes and first question in one turn
            separator = rng.choice(("\n ", " "))
            if not dictated:
                self.add(doc, USER if joint else rng.choice((SYSTEM, SYSTEM, USER)))
            while len(doc.ids) < stop or not batch:
                fact = next(facts, None)
                if fact is None:
                    facts = iter(self.writer.facts(2 + length // 8))
                    continue
                if any(f.subject == fact.subject and f.attribute == fact.attribute for f in places):
                    continue
                before = f"{USER} " if dictated else separator if batch else " "
                if rng.random() < filler:
                    doc.starts.append(len(doc.ids))
                    self.add(doc, before + self.writer.filler())
                    before = " " if dictated else separator
                self.add_note(doc, fact, places, before)
                if dictated:
                    self.add(doc, f"{ASSISTANT} Noted.{END}")
                batch.append(fact)
            rng.shuffle(batch)
            if joint:
                self.add(doc, f"{separator}{self.writer.question(batch[0])}{ASSISTANT}")
                self.add_answer(doc, batch.pop(0), places)
            elif not dictated:
                self.add(doc, END)
            for fact in batch:
                self.add_question(doc, fact, places)
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
