"""One turn: reading with signs of life, the answer as it comes, and a line about it."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path

from ..errors import SessionError
from ..interrupts import compiler_stops
from ..references.page import print_references, write_page
from ..references.trace import Trace
from .screen import is_terminal, say, stream_markdown, stream_plain
from .session import Session
from .waiting import Waiting, ctrl_c_stops, keys_unseen

WHY = {
    "length": "cut at --max-tokens; ",
    "context": "cut: the context is full; ",
    "stopped": "stopped; ",
}


@contextmanager
def signs_of_life(session: Session, verbose: bool, chatting: bool = True) -> Iterator[Waiting]:
    """While the session reads: Ctrl-C stops it, and a terminal shows how far it is."""
    before = session.progress

    def progress(done: int, total: int):
        waiting.doing = waiting.doing if session.stop else _reading(session)
        waiting.progress(done, total)

    keys = keys_unseen() if chatting else nullcontext()
    with Waiting("Reading", verbose) as waiting, ctrl_c_stops(session, waiting.stopping), keys:
        session.progress = progress
        try:
            yield waiting
        finally:
            session.progress = before


def _reading(session: Session) -> str:
    return "Reading again" if session.reread else "Reading"


def turn(
    session: Session,
    answer: Iterable[str],
    verbose: bool = True,
    about: bool = True,
    strip: bool = True,
) -> bool:
    """Print an answer as it comes, and a line about it. Returns False if Ctrl-C stopped it.

    Not verbose: the answer only. Not `about`: it is no turn of a chat, and the line is printed
    only if the answer was cut. strip: without the blank that a first word has.
    """
    styled = strip and verbose and session.conversation.has_template and is_terminal(sys.stdout)
    stream = stream_markdown if styled else stream_plain
    with signs_of_life(session, verbose, about) as waiting:
        try:
            pieces = _begun(answer) if strip else iter(answer)
            with compiler_stops(lambda: session.stop):
                for first in pieces:
                    waiting.end()
                    stream(chain([first], pieces))
        except KeyboardInterrupt:
            waiting.end()
            say("\n(stopped at once; what was said so far will be read again)")
            return False
    if not styled:
        print(flush=True)
    if verbose:
        tell_reread(session)
    u = session.usage
    if u is None:
        say("(stopped before the answer; this turn is forgotten, what was read of it stays read)")
        return False
    why = WHY.get(u.finish_reason or "", "")
    if verbose and (about or why):
        held = f"{session.offset:,} of {session.context:,} tokens held"
        say(
            f"[{why}{u.prompt_tokens:,} tokens read at {u.prompt_tps:,.0f} a second, "
            f"{u.generation_tokens:,} written at {u.generation_tps:,.0f}; {held}]",
            whole=False,
        )
    if verbose and about and u.finish_reason == "context":
        say("(/undo takes the last turn back, /reset begins a new conversation)")
    if u.finish_reason == "stopped":
        return False
    try:
        show_references(session, verbose)
    except KeyboardInterrupt:
        say("(stopped: no references)")
    return True


def _begun(pieces: Iterable[str]) -> Iterator[str]:
    """The pieces of an answer without the white space that it begins with."""
    begun = False
    for piece in pieces:
        text = piece if begun else piece.lstrip()
        begun = begun or bool(text)
        if text:
            yield text


def tell_reread(session: Session):
    """Say that rollback did not reach, if it did not."""
    if session.reread:
        say(f"(too far back for the cache: {session.reread:,} tokens had to be read again)")


def read_ahead(session: Session, verbose: bool = True) -> bool:
    """Read what is known of the next prompt now, so that its answer need not wait for it.

    Returns False if Ctrl-C stopped it; what was read stays read.
    """
    with signs_of_life(session, verbose), compiler_stops(lambda: session.stop):
        total = session.read_ahead()
    if session.offset < total:
        say(f"(stopped: {session.offset:,} of {total:,} tokens are read, the rest when needed)")
    return session.offset == total


def show_references(session: Session, verbose: bool = True):
    """Do what the session is to do with the last answer's references, if anything."""
    with Waiting("Looking up references", verbose):
        trace = session.trace()
    if trace is not None and session.on_references:
        session.on_references(trace)


def references_shown(tokenizer, model: str, page: Path | None = None, show: bool = True):
    """What a session does with an answer's `Trace`: print references, write a page of them."""

    def on_references(trace: Trace):
        if show:
            sys.stdout.flush()
            print_references(trace, tokenizer, sys.stderr)
        if page is not None:
            try:
                write_page(trace, tokenizer, page, model)
            except OSError as e:
                raise SessionError(f"--references-html: {page}: {e.strerror}") from None
            say(f"(references: {page})")

    return on_references
