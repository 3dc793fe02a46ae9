"""The embedded default: a small KSA checkpoint in the Hub's layout, and a notebook to ask about."""

import time
from pathlib import Path

from .report import report
from .session import Session
from .terminal import read_ahead

PACKAGE = Path(__file__).parents[1]
CHECKPOINT = PACKAGE / "notebook"

# Questions about notes.txt, and the notes that answer them.
QUESTIONS = (
    ("What is the badge of Olga?", "The badge of Olga is 6967."),
    ("What is Linh's school?", "Linh's school: Dublin."),
    ("What is the code of the east tower?", "Remember that the code of the east tower is 1252."),
)


def notes() -> str:
    """The sample notebook, a note a line."""
    return (PACKAGE / "notes.txt").read_text(encoding="utf-8").strip()


def welcome(session: Session) -> str:
    """What to try in a chat about the notebook."""
    lines = notes().count("\n") + 1
    asks = "\n".join(f"  {question}" for question, _ in QUESTIONS)
    return (
        f"A notebook of {lines} notes is loaded ({session.offset:,} tokens). Ask about one:\n{asks}"
    )


def run_demo(session: Session):
    """Ask the questions over the notebook and print the answers, and what the cache holds."""
    text = notes()
    start = time.perf_counter()
    read_ahead(session)
    seconds, count = time.perf_counter() - start, text.count("\n") + 1
    print(f"Read a notebook of {count} notes, {session.offset:,} tokens, in {seconds:.1f} s.\n")
    for question, note in QUESTIONS:
        before = text.partition(note)[0]
        back = session.offset - len(session.tokenizer.encode(before))
        answer = "".join(session.answer(question)).strip()
        print(f"Question: {question}\nAnswer:   {answer}")
        print(f"The note: {note} ({back:,} tokens back)\n")
        session.show_references()
    print(report(session))
