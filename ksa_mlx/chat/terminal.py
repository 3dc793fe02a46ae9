"""The chat in a terminal: lines are turns, a line that begins with / is a command."""

import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from ..errors import SessionError, one_line
from ..references.page import print_references, write_page
from ..references.trace import Trace
from .prompt_cache_file import cache_file
from .report import report
from .session import Session

with suppress(ImportError):  # a Python built without it
    import readline  # noqa: F401  (history and editing for input())

HELP = """\
  /reset      begin again: the system prompt and an empty cache
  /save FILE  save the conversation and its cache
  /load FILE  go on with a saved one
  /references show, or no longer show, what the answers were drawn from
  /stats      speed of the last answer, memory, size of the KV cache
  /help       this list
  /quit       leave (also Ctrl-D)
Ctrl-C stops an answer; the chat goes on. A second Ctrl-C does not wait for the current step.
A line that begins with a space is never a command."""


@contextmanager
def ctrl_c_stops(session: Session) -> Iterator[None]:
    """Ctrl-C asks the session to stop between two steps; a second one raises KeyboardInterrupt."""

    def handler(signum, frame):
        if session.stop:
            raise KeyboardInterrupt
        session.stop = True

    session.stop = False
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def reading_bar(session: Session) -> Iterator[None]:
    """Show on a terminal how far a prompt is read, if that takes long."""
    bar: tqdm | None = None

    def show(done: int, total: int):
        nonlocal bar
        if bar is None:
            bar = tqdm(
                total=total, desc="Reading", unit=" tokens", leave=False, disable=None, delay=0.5
            )
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    before, session.progress = session.progress, show
    try:
        yield
    finally:
        session.progress = before
        if bar is not None:
            bar.close()


def chat(session: Session, verbose: bool = True):
    """Read turns and commands from standard input until it ends."""
    show = session.on_references or references_shown(session.tokenizer)
    commands: dict[str, Callable[[Session, Path], None]] = {
        "/reset": _reset,
        "/save": _save,
        "/load": _load,
        "/references": lambda session, _: _references(session, show),
        "/stats": lambda session, _: print(report(session)),
        "/help": lambda session, _: print(HELP),
    }
    if sys.stdin.isatty():
        # A shell's background jobs, and what they start, inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while True:
        try:
            text = input("> " if sys.stdin.isatty() else "")
            if text.split(" ")[0].strip() == "/quit":
                return
            if text.startswith("/"):
                _command(session, commands, text)
            elif text.strip():
                turn(session, session.answer(text), verbose)
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", flush=True)
        except SessionError as e:
            print(f"error: {e}", file=sys.stderr)
        except (OSError, RuntimeError, ValueError) as e:  # a bad file name, say: the chat goes on
            print(f"error: {one_line(e)}", file=sys.stderr)


def _command(session: Session, commands: dict[str, Callable], text: str):
    command, _, file = text.strip().partition(" ")
    if command not in commands:
        raise SessionError(f"{command}: no such command; /help lists them")
    takes_file = command in ("/save", "/load")
    if takes_file != bool(file.strip()):
        raise SessionError(f"{command}: expected {'a' if takes_file else 'no'} file name")
    commands[command](session, Path(file.strip()).expanduser())


def turn(session: Session, answer: Iterable[str], verbose: bool = True, about: bool = True) -> bool:
    """Print an answer as it comes, and a line `about` it. Returns False if Ctrl-C stopped it."""
    with ctrl_c_stops(session), reading_bar(session):
        try:
            for piece in answer:
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            _say("\n(stopped at once; what was said so far will be read again)")
            return False
    print()
    u = session.usage
    if u is None:
        _say("(stopped before the answer; this turn is forgotten)")
        return False
    why = {
        "length": "cut at --max-tokens; ",
        "context": "cut: the context is full; ",
        "stopped": "stopped; ",
    }.get(u.finish_reason or "", "")
    if verbose and (about or why):
        _say(
            f"[{why}{u.prompt_tokens:,} tokens read at {u.prompt_tps:,.0f} a second, "
            f"{u.generation_tokens:,} written at {u.generation_tps:,.0f}]"
        )
    if u.finish_reason == "stopped":
        return False
    try:
        session.show_references()
    except KeyboardInterrupt:
        _say("(stopped: no references)")
    return True


def references_shown(tokenizer, page: Path | None = None, show: bool = True):
    """What a session does with an answer's `Trace`: print references, write a page of them."""

    def on_references(trace: Trace):
        if show:
            sys.stdout.flush()
            print_references(trace, tokenizer, sys.stderr)
        if page is not None:
            try:
                write_page(trace, tokenizer, page)
            except OSError as e:
                raise SessionError(f"--references-html: {page}: {e.strerror}") from None

    return on_references


def _say(text: str):
    print(text, file=sys.stderr, flush=True)


def read_ahead(session: Session):
    """Read the system prompt now, so that the first answer need not wait for it."""
    with ctrl_c_stops(session), reading_bar(session):
        session.read_ahead()


def _reset(session: Session, _):
    session.reset()
    print("(a new conversation)")


def _references(session: Session, show: Callable[[Trace], None]):
    session.on_references = None if session.on_references else show
    print("(answers come with references)" if session.on_references else "(no references)")


def _save(session: Session, file: Path):
    session.save(file)
    print(f"(saved {session.offset:,} tokens to {cache_file(file)})")


def _load(session: Session, file: Path):
    session.load(file)
    print(f"(loaded {session.offset:,} tokens from {cache_file(file)})")
