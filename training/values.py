"""Values and names of any kind, and which of them training never shows.

A sixth of the names and words and a tenth of the values are held out: training never shows them,
evaluation shows nothing else.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

from . import words

LONGEST = 10  # characters of a value
SPACE = "\u2581"  # in a piece of SentencePiece


def is_held_out(text: str, share: int) -> bool:
    """Whether ``text`` belongs to the held-out 1 / share, by a hash: the same everywhere, for
    ever."""
    return zlib.crc32(b"ksa" + text.encode()) % share == 0


def split(words: list[str]) -> dict[bool, list[str]]:
    """The words by whether they are held out."""
    return {held: [w for w in words if is_held_out(w, 6) == held] for held in (False, True)}


NAMES, WORDS = split(words.NAMES), split(words.WORDS)
ORDINARY = frozenset(words.ORDINARY)
DIGITS, LOWER, UPPER = string.digits, string.ascii_lowercase, string.ascii_uppercase
MONTHS = "Jan Feb March April May June July Aug Sept Oct Nov Dec".split()
DAYS = "Monday Tuesday Friday Sunday Mon Tue Wed Thu Fri Sat Sun today tomorrow noon".split()
UNITS = "km kg m min days cm EUR USD % L g C hours".split()
ACCENTED = "áàâäãåçéèêëíîïñóôöõøúùûüýß"
SYMBOLS = "#@+*/&_=!?$"
OTHER_SCRIPTS = "дляобранитмесЖαβγλωπ北京東大中あいうकनर"


@dataclass(frozen=True)
class Pieces:
    """Of a tokenizer's pieces, those of lower-case words: at the beginning of a word (one letter,
    then longer ones) and within it."""

    letters: tuple[str, ...]
    heads: tuple[str, ...]
    tails: tuple[str, ...]

    @classmethod
    def of(cls, vocabulary: Iterable[str]) -> Pieces:
        """``vocabulary``: pieces of SentencePiece, a space as U+2581."""
        made = [p for p in vocabulary if all(c in LOWER for c in p.lstrip(SPACE))]
        heads = [p[1:] for p in made if p.startswith(SPACE)]
        return cls(
            tuple(h for h in heads if len(h) == 1),
            tuple(h for h in heads if len(h) > 1),
            tuple(p for p in made if p and not p.startswith(SPACE)),
        )


class Draw:
    """Draws values and names; ``held_out`` says from which side. ``words``: the weight of words
    among free values, where the others have 15. ``pieced``: the share of words that are made of
    ``pieces``."""

    def __init__(
        self,
        rng: random.Random,
        held_out: bool,
        words: float = 6,
        pieced: float = 0.0,
        pieces: Pieces | None = None,
    ):
        self.rng, self.held_out = rng, held_out
        self.words, self.pieced, self.pieces = words, pieced, pieces

    def some(self, letters: str, least: int, most: int) -> str:
        return "".join(self.rng.choice(letters) for _ in range(self.rng.randint(least, most)))

    def invented(self, syllables: int) -> str:
        """A pronounceable word that nobody knows, lower case."""
        rng, out = self.rng, ""
        for _ in range(syllables):
            out += rng.choice(("", *"bcdfghjklmnprstvwxyz", "br", "ch", "st", "tr", "zh", "gl"))
            out += rng.choice("aeiou") + rng.choice(("", "", "", *"lmnrstxbk"))
        return out

    def pieces_of_words(self) -> str:
        """Any pieces in a row, each as likely as another: a word can be copied only if all its
        pieces, and one after the other, are nothing unheard of in a value."""
        rng, pieces = self.rng, self.pieces
        word = rng.choice(pieces.letters if rng.random() < 0.4 else pieces.heads)
        for _ in range(rng.choices((0, 1, 2, 3, 4), (1, 4, 5, 4, 2))[0]):
            tail = rng.choice(pieces.tails)
            if len(word + tail) <= LONGEST:
                word += tail
        return word

    def unseen(self, draw, share: int = 10) -> str:
        """A drawing of ``draw`` on the right side of the split; up to two characters belong to
        both."""
        while True:
            value = draw()
            right = len(value) <= 2 or is_held_out(value, share) == self.held_out
            if 1 <= len(value) <= LONGEST and right and value.lower() not in ORDINARY:
                return value

    # Values

    def number(self) -> str:
        return self.unseen(lambda: self.some(DIGITS, *self.rng.choice(((2, 4), (4, 4), (3, 3)))))

    def digits(self) -> str:
        return self.unseen(lambda: self.some(DIGITS, 1, LONGEST))

    def label(self) -> str:
        def once():
            letter, number = self.some(UPPER, 1, 1), str(self.rng.randint(1, 99))
            return number + letter if self.rng.random() < 0.25 else letter + number

        return self.unseen(once)

    def time(self) -> str:
        rng = self.rng
        return self.unseen(
            lambda: (
                f"{rng.randint(1, 12)}:{rng.choice('012345')}{rng.choice('05')}"
                + (rng.choice((" am", " pm")) if rng.random() < 0.15 else "")
            )
        )

    def date(self) -> str:
        rng = self.rng

        def once():
            d, m, y = rng.randint(1, 31), rng.randint(1, 12), rng.randint(1950, 2039)
            month = rng.choice(MONTHS)
            return rng.choice(
                (f"{d} {month}", f"{month} {d}", f"{y}-{m:02}-{d:02}", f"{m}/{d}", f"{d}.{m}.{y}",
                 f"{d}/{m}/{y % 100:02}", str(y), rng.choice(DAYS))
            )  # fmt: skip

        return self.unseen(once)

    def code(self) -> str:
        """Letters and digits, often with dashes: 555-0199, AB-12, k9q2zt, hunter2."""
        rng, some = self.rng, self.some

        def once():
            kind = rng.randrange(7)
            if kind == 0:
                return f"{some(DIGITS, 2, 4)}-{some(DIGITS, 2, 5)}"
            if kind == 1:
                return f"{some(UPPER, 1, 3)}-{some(DIGITS, 1, 5)}"
            if kind == 2:
                letters = rng.choice((LOWER, UPPER)) + DIGITS
                return some(letters, 3, 8)
            if kind == 3:
                return self.word_once() + some(DIGITS, 1, 3)
            if kind == 4:
                return "-".join(some(DIGITS, 2, 2) for _ in range(3))
            if kind == 5:
                return rng.choice("-_./ ").join(
                    (some(LOWER + DIGITS, 1, 4), some(LOWER + DIGITS, 1, 4))
                )
            return some(LOWER + UPPER + DIGITS, 2, 6) + rng.choice(("", some(SYMBOLS, 1, 1)))

        return self.unseen(once)

    def word_once(self) -> str:
        rng = self.rng
        x, listed = rng.random(), 0.6 * (1 - self.pieced)
        if x < listed:
            word = rng.choice(WORDS[self.held_out])
        else:
            word = self.pieces_of_words() if x < listed + self.pieced else self.invented(2)
        x = rng.random()
        return word.capitalize() if x < 0.2 else word.upper() if x < 0.25 else word

    def word(self) -> str:
        rng = self.rng

        def once():
            x = rng.random()
            if x < 0.12:
                return f"{self.word_once()} {self.word_once()}"
            if x < 0.15:
                word = self.word_once()
                at = rng.randrange(len(word))
                return word[:at] + rng.choice(ACCENTED) + word[at + 1 :]
            if x < 0.16:
                return self.some(OTHER_SCRIPTS, 1, 3)
            if x < 0.25:
                return self.invented(3)
            return self.word_once()

        # The words are split by themselves; what is made of them, as any value.
        return self.unseen(once, 6)

    def amount(self) -> str:
        rng = self.rng

        def once():
            n = self.some(DIGITS[1:], 1, 1) + self.some(DIGITS, 0, 3)
            n += rng.choice(("", "", "." + self.some(DIGITS, 1, 2)))
            return rng.choice((f"${n}", f"{n} {rng.choice(UNITS)}", f"#{n}", f"{n}%", n))

        return self.unseen(once)

    def free(self) -> str:
        """A value of 1 to 10 characters of any kind."""
        kinds = (self.digits, self.date, self.code, self.word, self.amount, self.time)
        return self.rng.choices(kinds, (3, 3, 6, self.words, 2, 1))[0]()

    # Names

    def name(self) -> str:
        return self.rng.choice(NAMES[self.held_out])

    def blend(self) -> str:
        """The head of one name on the tail of another: new, in pieces like those of unseen
        names."""
        rng = self.rng
        while True:
            a, b = rng.choice(NAMES[False]), rng.choice(NAMES[False])
            made = a[: rng.randint(1, max(1, len(a) - 1))]
            made += b[-rng.randint(2, max(2, len(b) - 1)) :].lower()
            if 3 <= len(made) <= 10 and not is_held_out(made, 6):
                return made

    def noun(self) -> str:
        """A thing: of the lists, or any word."""
        rng = self.rng
        if self.held_out or rng.random() < 0.5:
            return rng.choice(WORDS[self.held_out])
        return rng.choice(rng.choice((words.ITEMS, words.PLACES, words.THINGS)))

    def thing(self) -> str:
        """Names of things: "the north garage", "my bike", "room 12", "wifi"."""
        rng, x = self.rng, self.rng.random()
        if x < 0.3:
            place = self.noun() if self.held_out else rng.choice(words.PLACES)
            return f"the {rng.choice(words.ADJECTIVES)} {place}"
        if x < 0.6:
            return f"the {self.noun()}"
        if x < 0.8:
            return f"{rng.choice(('my', 'my', 'our'))} {self.noun()}"
        if x < 0.9:
            return f"{rng.choice(words.NUMBERED)} {rng.randint(1, 99)}"
        return self.noun()

    def invented_name(self) -> str:
        return self.unseen(lambda: self.invented(self.rng.randint(2, 3)).capitalize(), 6)

    def full_name(self) -> str:
        return f"{self.name()} {self.invented(self.rng.randint(1, 2)).capitalize()}"
