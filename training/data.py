"""Facts of synthetic notebooks, and the notes and questions that put them into words.

Everything is drawn from a ``random.Random``, so a seed gives the same notebooks on every machine.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass

from . import words
from .values import WORDS, Draw, Pieces


@dataclass(frozen=True)
class Fact:
    """``attribute`` of ``subject`` is ``value``; a bare fact has no attribute."""

    subject: str
    attribute: str
    kind: str
    value: str

    @property
    def key(self) -> tuple[str, str]:
        return self.subject.lower(), self.attribute.lower()

    def is_asked_of(self, other: Fact) -> bool:
        """Whether a question for this fact may mean ``other``: "Maria?" any fact about her."""
        if self.key[0] != other.key[0]:
            return False
        return self.key == other.key or not self.attribute or not other.attribute


@dataclass
class Style:
    """How hard the notebooks are: shares of what they hold."""

    made_up_names: float = 0.35
    things: float = 0.2  # facts about things, not people
    numbers: float = 0.3  # the shares of the kinds of values
    labels: float = 0.1
    free: float = 0.4
    words: float = 6  # the weight of words among free values, where the others have 15
    pieced: float = 0.0  # of these words, the share made of pieces of the tokenizer
    filler: float = 0.15
    shared: float = 0.5
    plain: float = 0.5  # how many facts have the short standard wording
    polite: float = 0.25  # of the questions
    lower: float = 0.25
    follow: float = 0.3
    absent: float = 0.13
    updates: float = 0.06
    talk: float = 0.04
    held_out: bool = False
    layout: str = ""  # one of LAYOUTS for all documents, or drawn


# How the facts of a document are told apart: by name alone, by the name for one attribute, by the
# attribute for few names.
LAYOUTS = {"bare": 0.08, "same_attribute": 0.15, "same_subject": 0.17, "mixed": 0.6}

POLITE = (
    "Could you tell me {}?|Could you please tell me what {} is?|Can you tell me {}, please?|"
    "Can you tell me what {} is?|Do you remember {}?|Do you remember what {} is?|"
    "Please tell me {}.|Tell me {}, please.|Tell me {}.|I would like to know {}.|I forgot {}.|"
    "Do you know what {} is?|Do you happen to know {}?|What was {} again?|Would you tell me {}?|"
    "Would you mind telling me {}?|Any idea what {} is?|Remind me, what is {}?|What is {} again?|"
    "Please remind me of {}.|What did I say {} was?|Hey, what is {}?|Sorry, what is {}?|"
    "I need {}.|Give me {}.|I need to know what {} is.|What is {}, please?|Excuse me, what is {}?|"
    "May I ask what {} is?|Do you have {}?|So what is {}?|Let me know {}.|Look up {}.|"
    "I wonder what {} is.|Where did I write {}?|OK, and what is {}?|What's {}?|whats {}|{} please|"
    "Can you remind me what {} is?|Could you look up {} for me?|Have you got {}?|Show me {}.|"
    "Could you find {}?|Can you find {} for me?|Would you happen to know {}?|I'm looking for {}.|"
    "I'd like to have {}.|Could I have {}?|Can I have {}, please?|I can't find {}.|Check {}.|"
    "Didn't I tell you {}?|Do we have {}?|Do we know what {} is?|Check what {} is.|"
    "Just tell me {}.|Hello, what is {}?|Hello, could you give me {}?|Quick question: what is {}?|"
    "I'd like {}.|Thanks, and what is {}?|Good morning, what is {}?|I keep forgetting {}.|"
    "It's about {}.|I'm not sure what {} was.|It slipped my mind what {} is.|Could we go over {}?|"
    "Say {}.|Please give me {}.|Be so kind and tell me {}.|Would you say what {} is?|I want {}."
).split("|")
# Asked in the evaluation only.
HELD_OUT_POLITE = (
    "Could you kindly tell me {}?|Can you please remind me of {}?|I can't remember {}.|"
    "Would you please look up {}?|I want to know what {} is.|Do you still know {}?|"
    "Hi, could you tell me what {} is, please?|Please, what is {}?"
).split("|")
NOTES = (
    ("{s}'s {a}:", "."), ("{a} of {s}:", "."), ("{s} has {a}", "."), ("for {s} the {a} is", "."),
    ("remember that the {a} of {s} is", "."), ("{s}, {a}", "."), ("{s}: {a}", "."),
    ("{s}'s {a} is", " now."), ("I think the {a} of {s} is", "."), ("{s} got", " as {a}."),
    ("the {a} for {s} is", "."), ("please note that {s}'s {a} is", "."), ("{a} {s}:", "."),
    ("{s}'s {a} is", ", by the way."), ("{s}'s {a} =", ""), ("{a} of {s} is", "."),
    ("please remember: the {a} of {s} is", "."), ("as {a}, {s} has", "."),
    ("{s} told me that the {a} is", "."),
)  # fmt: skip
UPDATES = (
    ("the {a} of {s} is now", "."), ("{s}'s {a} is now", "."), ("the {a} of {s} changed to", "."),
    ("update: the {a} of {s} is", "."), ("{s}'s new {a} is", "."), ("the new {a} of {s} is", "."),
    ("correction: {s}'s {a} is", "."), ("{s}'s {a} has changed to", "."),
    ("no, the {a} of {s} is", "."),
)  # fmt: skip

# What is said besides notes and questions, and the answer.
TALK = {
    "Hello! Tell me notes, or ask about them.": (
        "Hello!|Hi|Hello|Hi!|Hey|Hey there!|Good morning|Good evening!|Hi there|Hello there!|"
        "Good afternoon.|Greetings!|Hello, notebook!|Good day|Hello again|How are you?|"
        "Hi, how are you?|What's up?|Hello, how are you doing?|Howdy"
    ).split("|"),
    "I keep your notes. Tell me one, then ask for it.": (
        "Who are you?|What are you?|What can you do?|Help|Help me|What is this?|"
        "How does this work?|What do you do?|What should I ask?|What is your name?|Are you a bot?|"
        "Can you help me?|What do you know?|Tell me about yourself."
    ).split("|"),
    "You are welcome.": (
        "Thanks!|Thank you.|Thanks|Thank you very much!|Great, thanks!|Thanks a lot|Many thanks|"
        "Perfect, thank you|Cheers|OK, thanks"
    ).split("|"),
    "Goodbye!": "Bye!|Goodbye|Bye|See you later!|Good night|See you|Bye bye|Farewell".split("|"),
}
ABSENT = "Not in the notes."
OFF = (
    "What is 2+2?|Tell me a joke.|What time is it?|How many notes are there?|List all notes.|"
    "Write a poem.|Who is the president?|What is the weather like?|Why is the sky blue?|"
    "What day is it today?|Where do I live?|How old am I?|Sing a song|What is 12 times 7?|"
    "Translate this.|Who won the game?|Do you like music?|Tell me a story|What is the news?|"
    "What is the meaning of life?|Where is {s}?|Who is {s}?|How old is {s}?|When does {s} come?|"
    "Do you know {s}?|Does {s} like {a}?"
).split("|")


class Writer:
    """Draws facts and puts them, and the questions about them, into words."""

    def __init__(self, rng: random.Random, style: Style, pieces: Pieces | None = None):
        self.rng, self.style = rng, style
        self.draw = Draw(rng, style.held_out, style.words, style.pieced, pieces)

    def name(self) -> str:
        rng, draw = self.rng, self.draw
        if not self.style.held_out and rng.random() < self.style.made_up_names:
            return draw.blend() if rng.random() < 0.7 else draw.invented_name()
        return draw.full_name() if rng.random() < 0.04 else draw.name()

    def value(self, kind: str) -> str:
        if kind in ("number", "label", "time", "free"):
            return getattr(self.draw, kind)()
        if kind == "person":
            return self.name()
        choices = {
            "color": words.COLORS,
            "city": words.CITIES,
            "item": words.ITEMS,
            "word": words.PASSWORDS,
        }
        return self.rng.choice(choices[kind])

    def free_attribute(self) -> str:
        if self.rng.random() < 0.3:
            return self.rng.choice(WORDS[self.style.held_out])
        return self.rng.choice(words.FREE_ATTRIBUTES)

    def key(self) -> tuple[str, str, str]:
        """(subject, attribute, kind)"""
        rng, style = self.rng, self.style
        thing = rng.random() < style.things
        subject = self.draw.thing() if thing else self.name()
        x = rng.random()
        if x < style.free:
            return subject, self.free_attribute(), "free"
        if thing:
            return subject, rng.choice(words.PLACE_ATTRIBUTES), "number"
        if x < style.free + style.numbers:
            kind = "number"
        elif x < style.free + style.numbers + style.labels:
            kind = "label"
        else:
            kind = rng.choices(
                ("color", "city", "item", "time", "word", "person"), (6, 4, 3, 4, 3, 2)
            )[0]
        return subject, rng.choice(words.ATTRIBUTES[kind]), kind

    def facts(self, n: int) -> list[Fact]:
        """n facts; some share the subject, others the attribute, with an earlier one: both must be
        read."""
        rng = self.rng
        seen, out = set(), []
        layout = self.style.layout or rng.choices(list(LAYOUTS), list(LAYOUTS.values()))[0]
        first, left = self.key(), 0
        subject = first[0]
        for _ in range(50 * n):
            if len(out) == n:
                break
            s, a, k = self.key()
            if layout == "bare":
                a, k = "", ("number" if rng.random() < 0.5 else k)
            elif layout == "same_attribute":
                a, k = first[1:]
            elif layout == "same_subject":
                if left == 0:
                    subject, left = s, rng.randint(2, 5)
                s, left = subject, left - 1
            elif out and rng.random() < self.style.shared:
                o = rng.choice(out)
                if o.attribute:
                    s, a, k = (o.subject, a, k) if rng.random() < 0.5 else (s, o.attribute, o.kind)
            fact = Fact(s, a, k, self.value(k))
            if fact.key not in seen:
                seen.add(fact.key)
                out.append(fact)
        return out

    def absent(self, known: list[Fact]) -> Fact:
        """A fact that ``known`` does not answer, but often close: a known name or a known
        attribute."""
        rng = self.rng
        while True:
            s, a, kind = self.key()
            x = rng.random()
            if known and x < 0.4:
                s = rng.choice(known).subject
            elif known and x < 0.8:
                a = rng.choice(known).attribute
            fact = Fact(s, a, kind, "")
            if not any(fact.is_asked_of(f) for f in known):
                return fact

    def note(self, fact: Fact, update: bool = False) -> tuple[str, str]:
        """A sentence up to its value, and what follows the value."""
        rng, s, a = self.rng, fact.subject, fact.attribute
        end = "."
        if not a:
            text = rng.choice((f"{s}:", f"{s}:", f"{s} is"))
        elif update:
            text, end = rng.choice(UPDATES)
        elif rng.random() < self.style.plain:
            text = rng.choice(("the {a} of {s} is", "{s}'s {a} is"))
        elif not s[0].isupper() and rng.random() < 0.4:
            text = rng.choice(("{s} {a}:", "{s} {a} is", "the {s} {a} is"))
        else:
            text, end = rng.choice(NOTES)
        text, end = self.fill(text, s, a), end.replace("{a}", a)
        x = rng.random()
        if x < 0.06:
            return f"Note {rng.randint(1, 99)}: {text}", end
        if x < 0.12:
            return f"Note: {text}", end
        if x > 1 - 0.3 * self.style.lower:
            return text.lower(), "" if rng.random() < 0.5 else end
        return text[0].upper() + text[1:], end

    @staticmethod
    def fill(text: str, s: str, a: str) -> str:
        """The wording with subject and attribute; "the the router code" loses an article."""
        if text.startswith("the {s}") and s.startswith(("the ", "my ", "our ")):
            text = text[4:]
        return text.replace("{s}", s).replace("{a}", a)

    def reference(self, s: str, a: str) -> str:
        if not s[0].isupper() and self.rng.random() < 0.3:
            return self.fill("the {s} {a}", s, a)
        return self.rng.choice((f"the {a} of {s}", f"{s}'s {a}", f"the {a} for {s}"))

    def form(self, s: str, a: str) -> str:
        """A question of the known forms."""
        rng, x = self.rng, self.rng.random()
        head = s[0].upper() + s[1:]
        if not a:
            return rng.choice((f"{head}?", f"{head}?", f"What about {s}?"))
        if x < 0.25:
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
            f"{head} {a}?",
        )
        return rng.choice(wordings)

    def polite(self, s: str, a: str) -> str:
        text = self.rng.choice(POLITE).format(self.reference(s, a))
        return text[0].upper() + text[1:]

    def follow_up(self, fact: Fact, last: Fact) -> str | None:
        """A question that the one before completes, or None if it has nothing in common."""
        rng, s, a = self.rng, fact.subject, fact.attribute
        if s == last.subject and a and last.attribute:
            own = rng.choice(("her", "his", "their") if s[0].isupper() else ("its", "the"))
            return rng.choice((f"And {own} {a}?", f"What about {own} {a}?", f"and {own} {a}"))
        if a == last.attribute and a:
            return rng.choice((f"And {s}?", f"What about {s}?", f"And {s}'s?", f"And for {s}?"))
        return None

    def lowered(self, text: str) -> str:
        """As many type it: no capitals, often no mark at the end or in "olgas"."""
        text = text.lower()
        if self.rng.random() < 0.6:
            text = text.rstrip("?.")
        return text.replace("'", "") if self.rng.random() < 0.2 else text

    def question(self, fact: Fact, last: Fact | None = None) -> str:
        rng, style = self.rng, self.style
        follow = self.follow_up(fact, last) if last and rng.random() < 2 * style.follow else None
        if follow:
            text = follow
        elif fact.attribute and rng.random() < style.polite:
            text = self.polite(fact.subject, fact.attribute)
        else:
            text = self.form(fact.subject, fact.attribute)
        return self.lowered(text) if rng.random() < style.lower else text

    def talk(self) -> tuple[str, str]:
        """Something that is no question about a note, and the answer."""
        rng = self.rng
        if rng.random() < 0.35:
            text = rng.choice(OFF).format(s=self.name(), a=self.free_attribute())
            answer = ABSENT
        else:
            answer = rng.choice(list(TALK))
            text = rng.choice(TALK[answer])
        return (self.lowered(text) if rng.random() < 0.3 else text), answer

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
