"""The chat in a terminal or a pipe: turns, and lines that begin with / are commands."""

import signal
import sys

from mlx_lm.cli_ui import make_console, print_header_panel
from rich.markup import escape

from ..errors import ContextError, KSAError, one_line
from .commands import NAMES, QUIT, Commands
from .documents import named
from .prompt import reader
from .screen import is_terminal, say
from .session import Session
from .turns import turn


def chat(session: Session, verbose: bool = True) -> int:
    """Read turns and commands from standard input until it ends. Returns how many failed."""
    commands = Commands(session, verbose)
    read = reader(NAMES, "/? for help")
    failed, end = 0, False
    if sys.stdin.isatty():
        # A shell's background jobs, and what they start, inherit that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    while not end:
        try:
            text = read()
            if text.lower().rstrip() in QUIT:
                end = True
            elif text.startswith("/") and "\n" not in text.strip():
                commands.do(text)
            elif text.strip():
                _turn(commands, text)
        except EOFError:
            end = True
        except KeyboardInterrupt:
            print("(Ctrl-D or /quit leaves)", flush=True)
        except ContextError as e:
            failed += 1
            turns = "/undo takes the last turn back, /reset begins a new conversation"
            say(f"error: {e}; {turns if session.conversation.begun else 'shorten it'}", "red")
        # A bad file name, say: the chat goes on.
        except (KSAError, OSError, RuntimeError, ValueError) as e:
            failed += 1
            say(f"error: {e if isinstance(e, KSAError) else one_line(e)}", "red")
    return failed


def _turn(commands: Commands, text: str):
    """A turn, and the documents that it names."""
    session, talk = commands.session, commands.session.conversation
    documents, text = named(text)
    if not text:
        commands.add(documents)
        return
    before = list(talk.documents)
    talk.documents = before + documents
    try:
        turn(session, session.answer(text), commands.verbose)
    finally:
        if talk.documents:  # nothing was answered
            talk.documents = before


def header(title: str, rows: list[tuple[str, str]]):
    """What a chat begins with: a panel on a terminal, a line elsewhere."""
    if is_terminal(sys.stdout):
        print_header_panel(make_console(), title, [(name, escape(text)) for name, text in rows])
    else:
        print(f"{title}: {', '.join(text for _, text in rows)}")
