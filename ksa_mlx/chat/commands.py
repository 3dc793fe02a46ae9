"""What a chat does when a line begins with /."""

from collections.abc import Callable
from typing import NamedTuple

from ..errors import SessionError
from ..references.trace import Trace
from .conversation import Document
from .documents import document, path_of
from .prompt_cache_file import cache_file
from .report import report
from .screen import show
from .session import Session
from .turns import read_ahead, references_shown, turn

# What ends a chat, with and without the stroke.
QUIT = ("/quit", "/exit", "/bye", "quit", "exit")


class Command(NamedTuple):
    """act: what it does, given what stands behind it. takes: what that is. about: for /help."""

    act: Callable[["Commands", str], None]
    takes: str
    about: str


class Commands:
    """The commands of a chat with a session."""

    def __init__(self, session: Session, verbose: bool = True):
        self.session, self.verbose = session, verbose
        self.show_trace: Callable[[Trace], None] = session.on_references or references_shown(
            session.tokenizer, session.name
        )

    def do(self, text: str):
        """What a line that begins with / asks for. Raises SessionError if it makes no sense."""
        name, _, behind = text.strip().partition(" ")
        name, behind = name.lower(), behind.strip()
        name = {"/?": "/help"}.get(name, name)
        if name in QUIT:
            raise SessionError(f"{name}: found {behind!r}, expected nothing behind it")
        if name not in COMMANDS:
            raise SessionError(f"{name}: no such command; /help lists them")
        command = COMMANDS[name]
        if behind and not command.takes:
            raise SessionError(f"{name}: found {behind!r}, expected nothing behind it")
        if command.takes and not behind:
            raise SessionError(f"{name}: expected a file name")
        command.act(self, behind)

    def file(self, name: str):
        self.add([document(path_of(name))])

    def add(self, documents: list[Document]):
        """Put documents before the next turn, and read them."""
        session, talk = self.session, self.session.conversation
        before = list(talk.documents)
        talk.documents = before + documents
        try:
            whole = read_ahead(session, self.verbose)
        except BaseException:
            talk.documents = before
            raise
        if whole:
            names = ", ".join(d.name for d in documents)
            show(f"({names}: {session.offset:,} tokens are read; ask about it)")

    def again(self, _: str):
        session, before = self.session, list(self.session.tokens)
        if turn(session, session.again(), self.verbose) and session.tokens == before:
            show("(as before; with --temp 0.7, say, answers differ)")

    def undo(self, _: str):
        taken = self.session.undo()
        first = next((line for line in reversed(taken.splitlines()) if line.strip()), "")
        show(f"(taken back: {first[:60]}{'...' * (len(first) > 60)})")
        if again := self.session.reread:
            show(f"(too far back for the cache: {again:,} tokens are read again, when needed)")

    def reset(self, _: str):
        self.session.reset()
        show("(a new conversation)")

    def save(self, name: str):
        file = path_of(name)
        self.session.save(file)
        show(f"(saved {self.session.offset:,} tokens to {cache_file(file)})")

    def load(self, name: str):
        file = path_of(name)
        self.session.load(file)
        show(f"(loaded {self.session.offset:,} tokens from {cache_file(file)})")

    def references(self, _: str):
        session = self.session
        session.on_references = None if session.on_references else self.show_trace
        show("(answers come with references)" if session.on_references else "(no references)")

    def stats(self, _: str):
        show(report(self.session))

    def help(self, _: str):
        show(HELP)


COMMANDS = {
    "/file": Command(Commands.file, "PATH", "put a document before the next turn"),
    "/again": Command(Commands.again, "", "answer the last turn once more"),
    "/undo": Command(Commands.undo, "", "take the last turn and its answer back, or the document"),
    "/reset": Command(Commands.reset, "", "begin again: the system prompt and an empty cache"),
    "/save": Command(Commands.save, "FILE", "save the conversation and its cache"),
    "/load": Command(Commands.load, "FILE", "go on with a saved one"),
    "/references": Command(
        Commands.references, "", "show, or no longer, what answers are drawn from"
    ),
    "/stats": Command(Commands.stats, "", "speed of the last answer, memory, the KV cache"),
    "/help": Command(Commands.help, "", "this list (also /?)"),
}

# As they are completed, with a blank before what they take.
NAMES = [
    *(f"{name} " if command.takes else name for name, command in COMMANDS.items()),
    *(name for name in QUIT if name.startswith("/")),
]

ABOUT = {f"{name} {command.takes}": command.about for name, command in COMMANDS.items()}
ABOUT["/quit"] = "leave (also /exit, /bye, quit, exit, Ctrl-D)"
HELP = (
    "\n".join(f"  {name:<12}{about}" for name, about in ABOUT.items())
    + '''
@PATH in a turn puts that document before it. Pasted lines are one turn.
Alt-Enter begins a new line; so does Enter within a text between """ and """.
Ctrl-C stops reading or answering after the step that runs; the chat goes on.
A line that begins with a space is never a command.'''
)
