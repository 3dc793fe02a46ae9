"""The chat in a terminal: lines are turns, a line that begins with / is a command."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from ..errors import ContextError, KSAError, SessionError, one_line
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
  /help       this list (also /?)
  /quit       leave (also /exit, /bye, Ctrl-D)
Text of several lines stands between two lines of \"\"\".
Ctrl-C stops reading or answering once the step that runs is done; the chat goes on.
A line that begins with a space is never a command."""

# Seconds after which a Ctrl-C is answered if the step still runs.
PATIENCE = 0.3

# What ends a chat.
QUIT = ("/quit", "/exit", "/bye")

# Begins and ends a text of several lines.
QUOTES = '"""'


@contextmanager
def ctrl_c_stops(session: Session) -> Iterator[None]:
    """Ctrl-C asks the session to stop after the step that runs, and is answered at once.

    While MLX works on a step Python runs no signal handler, but it does write the signal to its
    wakeup file, where a thread waits. A second Ctrl-C raises KeyboardInterrupt, between two steps
    as well, for what waits for something else.
    """
    pressed, done = 0, threading.Event()
    receiver, sender = socket.socketpair()
    sender.setblocking(False)

    def handler(signum, frame):
        nonlocal pressed
        pressed += 1
        session.stop = True
        if pressed > 1:
            raise KeyboardInterrupt

    def answer():
        with receiver:
            while byte := receiver.recv(1):
                if byte == bytes([signal.SIGINT]) and not session.stop:
                    session.stop = True
                    if not done.wait(PATIENCE):
                        tqdm.write("\n(stopping after this step)", file=sys.stderr)

    session.stop = False
    threading.Thread(target=answer, daemon=True).start()
    # The handler first: what is written to the file before would be an answer to another one.
    before = signal.signal(signal.SIGINT, handler)
    file = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        done.set()
        signal.set_wakeup_fd(file)
        signal.signal(signal.SIGINT, before)
        sender.close()  # ends the thread


@contextmanager
def reading_bar(session: Session, verbose: bool = True) -> Iterator[None]:
    """Show on a terminal how far a prompt is read, if that takes long and is wanted."""
    bar: tqdm | None = None
    hidden = None if verbose else True  # None: where there is no terminal

    def show(done: int, total: int):
        nonlocal bar
        if bar is None:
            about = {"total": total, "desc": "Reading", "unit": " tokens"}
            bar = tqdm(**about, leave=False, disable=hidden, delay=0.5)
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


def chat(session: Session, verbose: bool = True) -> int:
    """Read turns and commands from standard input until it ends. Returns how many failed."""
    show = session.on_references or references_shown(session.tokenizer)
    commands: dict[str, Callable[[Session, Path], None]] = {
        "/reset": _reset,
        "/save": _save,
        "/load": _load,
        "/references": lambda session, _: _references(session, show),
        "/stats": lambda session, _: print(report(session)),
        "/help": lambda session, _: print(HELP),
        "/?": lambda session, _: print(HELP),
    }
    failed, end = 0, False
    if sys.stdin.isatty():
        # A shell's background jobs, and what they start, inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while not end:
        try:
            text = _line("> ")
            if text.lower().strip() in QUIT:
                end = True
            elif text.startswith("/"):
                _command(session, commands, text)
            elif text.strip():
                text = _several_lines(text) if text.startswith(QUOTES) else text
                turn(session, session.answer(text), verbose)
        except EOFError:
            if sys.stdin.isatty():
                print()
            end = True
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /quit leaves)", flush=True)
        except ContextError as e:
            failed += 1
            _say(f"error: {e}; /reset begins a new conversation")
        # A bad file name, say: the chat goes on.
        except (KSAError, OSError, RuntimeError, ValueError) as e:
            failed += 1
            _say(f"error: {e if isinstance(e, KSAError) else one_line(e)}")
    return failed


def _line(prompt: str) -> str:
    return input(prompt if sys.stdin.isatty() else "")


def _several_lines(text: str) -> str:
    """A text that begins with quotes, and the lines up to the one that ends with them."""
    lines = [text.removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        lines.append(_line("... "))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")


def _command(session: Session, commands: dict[str, Callable], text: str):
    command, _, file = text.strip().partition(" ")
    command, file = command.lower(), file.strip()
    if command not in (*commands, *QUIT):
        raise SessionError(f"{command}: no such command; /help lists them")
    if command not in ("/save", "/load"):
        if file:
            raise SessionError(f"{command}: found {file!r}, expected nothing behind it")
    elif not file:
        raise SessionError(f"{command}: expected a file name")
    commands[command](session, Path(file).expanduser())


def turn(session: Session, answer: Iterable[str], verbose: bool = True, about: bool = True) -> bool:
    """Print an answer as it comes, and a line `about` it. Returns False if Ctrl-C stopped it.

    Not verbose: the answer only.
    """
    begun = not about  # a chat's answers begin without the blank that their first word has
    with ctrl_c_stops(session), reading_bar(session, verbose):
        try:
            for piece in answer:
                text = piece if begun else piece.lstrip(" ")
                begun = begun or bool(text)
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            _say("\n(stopped at once; what was said so far will be read again)")
            return False
    print()
    u = session.usage
    if u is None:
        _say("(stopped before the answer; this turn is forgotten, what was read of it stays read)")
        return False
    why = {
        "length": "cut at --max-tokens; ",
        "context": "cut: the context is full" + (", /reset begins anew; " if about else "; "),
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
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb" and "NO_COLOR" not in os.environ:
        text = f"\x1b[2m{text}\x1b[0m"  # dim, unlike the answers
    print(text, file=sys.stderr, flush=True)


def read_ahead(session: Session, verbose: bool = True) -> bool:
    """Read the system prompt now, so that the first answer need not wait for it.

    Returns False if Ctrl-C stopped it; what was read stays read.
    """
    with ctrl_c_stops(session), reading_bar(session, verbose):
        total = session.read_ahead()
    if session.offset < total:
        _say(f"(stopped: {session.offset:,} of {total:,} tokens are read, the rest when needed)")
    return session.offset == total


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
