"""Where turns come from: a terminal with editing and history, or the lines of a pipe."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import create_output
from prompt_toolkit.shortcuts import CompleteStyle
from prompt_toolkit.styles import Style

from .screen import is_terminal

# Begins and ends a text of several lines.
QUOTES = '"""'

# Characters of a text that the history keeps: longer ones are documents.
LONGEST = 10_000

STYLE = Style([("prompt", "bold ansimagenta"), ("placeholder", "ansibrightblack")])


def reader(commands: Iterable[str], placeholder: str = "") -> Callable[[], str]:
    """A function that returns the next turn. It raises EOFError at the end, and
    KeyboardInterrupt for Ctrl-C.

    Args: commands: what can be completed. placeholder: what stands where nothing is typed yet.
    """
    screen = next((s for s in (sys.stdout, sys.stderr) if is_terminal(s)), None)
    if sys.stdin.isatty() and screen:
        return _typed(screen, commands, placeholder)
    return lambda: _several_lines(_line("> "))


def _line(prompt: str) -> str:
    if not sys.stdin.isatty():
        return input()
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        print()
        raise


def _several_lines(text: str) -> str:
    """A text that begins with quotes, and the lines up to the one that ends with them."""
    while _is_open(text):
        text += "\n" + _line("... ")
    return unquoted(text)


def _is_open(text: str) -> bool:
    """Whether a text begins with quotes that do not end yet."""
    return text.startswith(QUOTES) and not text[len(QUOTES) :].rstrip().endswith(QUOTES)


def unquoted(text: str) -> str:
    """A text without the quotes around it, if there are any."""
    if not text.startswith(QUOTES):
        return text
    return text.rstrip().removeprefix(QUOTES).removesuffix(QUOTES).strip("\n")


def _typed(screen, commands: Iterable[str], placeholder: str) -> Callable[[], str]:
    keys = KeyBindings()

    @Condition
    def quotes_are_open() -> bool:
        return _is_open(session.default_buffer.text)

    @keys.add("enter", filter=~quotes_are_open)
    def _(event: KeyPressEvent):
        event.current_buffer.validate_and_handle()

    @keys.add("enter", filter=quotes_are_open)
    @keys.add("escape", "enter")
    def _(event: KeyPressEvent):
        event.current_buffer.newline(copy_margin=False)

    session: PromptSession[str] = PromptSession(
        [("", "\n"), ("class:prompt", "> ")],
        multiline=True,
        prompt_continuation=[("class:prompt", ". ")],
        placeholder=[("class:placeholder", placeholder)],
        key_bindings=keys,
        history=history(),
        completer=Names(commands),
        complete_while_typing=False,
        complete_style=CompleteStyle.READLINE_LIKE,
        enable_open_in_editor=True,
        style=STYLE,
        output=create_output(screen),
    )
    return lambda: unquoted(session.prompt())


class Names(Completer):
    """Commands, and paths behind them and behind @."""

    def __init__(self, commands: Iterable[str]):
        self.commands, self.paths = sorted(commands), PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterator[Completion]:
        text = document.text_before_cursor
        command, blank, path = text.partition(" ")
        word = text.split()[-1] if text.split() else ""
        if text.startswith("/") and not blank:
            found = (c for c in self.commands if c.startswith(command.lower()))
            yield from (Completion(c, -len(command)) for c in found)
        elif text.startswith("/") or word.startswith("@"):
            part = path.lstrip() if text.startswith("/") else word[1:]
            yield from self.paths.get_completions(Document(part), event)


class Turns(FileHistory):
    """Turns in a file, without documents."""

    def store_string(self, string: str) -> None:
        if len(string) <= LONGEST:
            super().store_string(string)


def history() -> History:
    """The turns of earlier chats, where there is a place to keep them, for their user only."""
    try:
        file = state_dir() / "history"
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600))
    except (OSError, RuntimeError):  # a home that is not there, or not writable
        return InMemoryHistory()
    return Turns(str(file))


def state_dir() -> Path:
    """Where programs of this user keep what is no document and no setting."""
    if given := os.environ.get("XDG_STATE_HOME"):
        return Path(given) / "ksa-mlx"
    mac = sys.platform == "darwin"
    return Path.home() / ("Library/Application Support" if mac else ".local/state") / "ksa-mlx"
