"""What a chat prints: styled on a terminal, plain text everywhere else."""

import os
import re
import sys
import time
from collections.abc import Iterable
from itertools import accumulate, pairwise
from typing import IO, Literal

from markdown_it import MarkdownIt
from markdown_it.rules_block import StateBlock, list_block
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment
from rich.text import Text

from ..references.page import plain


def _list(state: StateBlock, line: int, end: int, silent: bool) -> bool:
    """A list, unless its first item is empty: "4821." is an answer."""
    item = state.getLines(line, line + 1, 0, False).strip()
    return not re.fullmatch(r"\d+[.)]|[-+*]", item) and list_block(state, line, end, silent)


# As rich's own, but nothing is left out: HTML and definitions of links are text.
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])
MARKDOWN.disable("reference")
MARKDOWN.block.ruler.at("list", _list, {"alt": ["paragraph", "blockquote"]})

# Frames a second of what changes on the screen.
FRAMES = 12


def is_terminal(stream: IO[str] | None) -> bool:
    """Whether a stream leads to a terminal that understands styles."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def console(stream: IO[str]) -> Console:
    """A console on a terminal. It follows NO_COLOR."""
    return Console(file=stream, force_terminal=True, highlight=False)


def show(text: str):
    """Lines that were asked for, on standard output."""
    if is_terminal(sys.stdout):
        console(sys.stdout).print(Text(text))
    else:
        print(text, flush=True)


def say(text: str, style: str = "dim", whole: bool = True):
    """A line beside the answers, on standard error. Not `whole`: as much as a line takes."""
    if is_terminal(sys.stderr):
        overflow: Literal["fold", "ellipsis"] = "fold" if whole else "ellipsis"
        console(sys.stderr).print(Text(text, style), no_wrap=not whole, overflow=overflow)
    else:
        print(text, file=sys.stderr, flush=True)


def stream_plain(pieces: Iterable[str]):
    """Print the pieces of an answer as they come; to a terminal no codes that it would obey."""
    terminal = is_terminal(sys.stdout)
    for piece in pieces:
        print(plain(piece) if terminal else piece, end="", flush=True)


def stream_markdown(pieces: Iterable[str]):
    """Print the pieces of an answer on a terminal as they come, as Markdown.

    A block (a paragraph, a list, code) that is whole is printed for good; the one that is being
    written is drawn anew as it grows, its last lines if it is longer than the screen.
    """
    out, text, done, drawn = console(sys.stdout), "", 0, 0.0
    # Drawn by this thread alone: rich's own would draw while a block is printed.
    with Live(console=out, transient=True, auto_refresh=False) as live:
        try:
            for piece in pieces:
                text += plain(piece)
                if time.monotonic() < drawn + 1 / FRAMES:
                    continue
                *_, whole = 0, *_starts(text[done:])
                block = Blocks(text[done : done + whole], not done)
                done += whole
                live.update(Blocks(text[done:], not done, tail=True))
                if whole:
                    out.print(block)
                live.refresh()
                drawn = time.monotonic()
        finally:
            live.update(Text())
            if text[done:].strip():
                out.print(Blocks(text[done:], not done))


def _starts(text: str) -> list[int]:
    """Where the blocks of a Markdown text begin."""
    lines = list(accumulate((len(line) + 1 for line in text.split("\n")), initial=0))
    return [lines[t.map[0]] for t in MARKDOWN.parse(text) if t.map and not t.level]


class Blocks:
    """A part of an answer, a blank line between its blocks, and before them if it is not the
    first. tail: its last lines only, as many as the screen has."""

    def __init__(self, text: str, first: bool, tail: bool = False):
        starts = _starts(text)
        self.blocks = [_markdown(text[a:b]) for a, b in pairwise([*starts, len(text)])]
        self.first, self.tail = first, tail

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        shown: list[list[Segment]] = []
        for block in self.blocks:
            lines = console.render_lines(block, options, pad=False)
            written = [i for i, line in enumerate(lines) if "".join(x.text for x in line).strip()]
            if written:
                between: list[list[Segment]] = [[]] if shown or not self.first else []
                shown += between + lines[written[0] : written[-1] + 1]
        for line in shown[-(options.size.height - 2) :] if self.tail else shown:
            yield from line
            yield Segment.line()


def _markdown(text: str) -> Markdown:
    markdown = Markdown(text, hyperlinks=False)
    markdown.parsed = MARKDOWN.parse(text)
    for block in markdown.parsed:
        for token in block.children or ():
            if token.type == "softbreak":  # a model's lines are meant
                token.type = "hardbreak"
    return markdown
