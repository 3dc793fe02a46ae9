"""The embedded default: a small KSA checkpoint in the Hub's layout, and a notebook to ask about."""

import time
from pathlib import Path

from .report import report
from .session import Session
from .turns import read_ahead, show_references

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
    """What to try in a chat about the notebook, and what not to."""
    lines, total = notes().count("\n") + 1, len(session.conversation.opening())
    part = f"{session.offset:,} of " if session.offset < total else ""
    asks = "\n".join(f"  {question}" for question, _ in QUESTIONS)
    return (
        f"A notebook of {lines} notes is loaded ({part}{total:,} tokens). Ask about one:\n{asks}\n"
        "Or tell it one: it knows its notes and nothing else, and says what is not in them."
    )


def run_demo(session: Session, verbose: bool = True) -> int:
    """Ask the questions over the notebook and print the answers, and what the cache holds.

    Returns the exit status.
    """
    text = notes()
    start = time.perf_counter()
    if not read_ahead(session, verbose):
        return 130
    seconds, count = time.perf_counter() - start, text.count("\n") + 1
    print(f"Read a notebook of {count} notes, {session.offset:,} tokens, in {seconds:.1f} s.\n")
    for question, note in QUESTIONS:
        before = text.partition(note)[0]
        back = session.offset - len(session.tokenizer.encode(before))
        answer = "".join(session.answer(question)).strip()
        print(f"Question: {question}\nAnswer:   {answer}")
        print(f"The note: {note} ({back:,} tokens back)")
        show_references(session, verbose)
        print(flush=True)
    print(report(session))
    return 0
