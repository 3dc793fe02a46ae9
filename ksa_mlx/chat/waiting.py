"""Signs of life while a model is loaded or reads, and Ctrl-C meanwhile."""

import os
import signal
import socket
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from ..interrupts import children_spared
from .screen import FRAMES, console, is_terminal, say
from .session import Session

# Seconds until a spinner is shown, until a bar takes its place, and until a Ctrl-C is answered if
# the step still runs.
SPINNER, BAR, PATIENCE = 0.05, 1.0, 0.3

STOPPING = "stopping after this step"


class Waiting:
    """What is shown on standard error, if that is a terminal, while something takes its time.

    Args:
        doing: what is done, in a word or two.
        wanted: False: nothing is shown.
    """

    def __init__(self, doing: str, wanted: bool = True):
        self.doing, self.done, self.total, self.seconds = doing, 0, 0, 0.0
        self.spinner, self.begin = Spinner("dots"), time.monotonic()
        self.live: Live | None = None
        if wanted and is_terminal(sys.stderr):
            # A thread of its own draws it, while MLX computes.
            err = console(sys.stderr)
            self.live = Live(self, console=err, transient=True, refresh_per_second=FRAMES)

    def __enter__(self) -> "Waiting":
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *_):
        self.end()

    def end(self):
        """Take it away; again, does nothing."""
        live, self.live = self.live, None
        if live:
            live.stop()

    def progress(self, done: int, total: int):
        """So many tokens of `total` are read."""
        self.done, self.total, self.seconds = done, total, time.monotonic() - self.begin

    def stopping(self):
        """Say that Ctrl-C was seen."""
        self.doing = STOPPING
        if not self.live:
            say(f"\n({STOPPING})")

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        seconds = time.monotonic() - self.begin
        if seconds < SPINNER:
            return
        parts = [self.spinner.render(time.monotonic()), Text(self.doing, "dim")]
        if self.total and seconds >= BAR:
            counts = f"{self.done:,} of {self.total:,}"
            left = self.seconds * self.total / max(self.done, 1) - seconds
            more = f", {self.done / self.seconds:,.0f} a second" if self.done else ""
            more += f", {left:,.0f} s left" if self.done and left > 0 else ""
            # What has no room is left out: the rate, then the bar.
            room = options.max_width - len(self.doing) - len(counts) - 16
            if room > 0:
                width = min(40, 10 + max(0, room - len(more)))
                parts.append(ProgressBar(self.total, self.done, width=width))
            parts.append(Text(counts + (more if room > len(more) else ""), "dim"))
        line = Table.grid(padding=(0, 1))
        line.add_row(*parts)
        yield line


@contextmanager
def ctrl_c_stops(session: Session, tell: Callable[[], None] | None = None) -> Iterator[None]:
    """Ctrl-C asks the session to stop after the step that runs, and is answered at once: `tell`.

    While MLX works on a step Python runs no signal handler, but it does write the signal to its
    wakeup file, where a thread waits. A second Ctrl-C raises KeyboardInterrupt, between two steps
    as well, for what waits for something else.
    """
    tell = tell or (lambda: say(f"\n({STOPPING})"))
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
                        tell()

    session.stop = False
    threading.Thread(target=answer, daemon=True).start()
    # The handler first: what is written to the file before would be an answer to another one.
    before = signal.signal(signal.SIGINT, handler)
    file = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        with children_spared():
            yield
    finally:
        done.set()
        signal.set_wakeup_fd(file)
        signal.signal(signal.SIGINT, before)
        sender.close()  # ends the thread


@contextmanager
def keys_unseen() -> Iterator[None]:
    """What is typed ahead in a chat is not shown, only kept for the next turn."""
    # A job in the background would be stopped by touching the terminal.
    if not (sys.stdin and sys.stdin.isatty() and os.tcgetpgrp(sys.stdin.fileno()) == os.getpgrp()):
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
