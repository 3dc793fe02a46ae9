"""The terminal program behind a pseudo-terminal, and what a person would see on it."""

import os
import pty
import re
import select
import signal
import sys
import termios
import time

import pyte

from ._chat import ROOT

# What an empty prompt shows.
IDLE = "> /? for help"

# Lines with figures that differ from run to run, or with the tokenizer.
FIGURES = re.compile(r"^(?:[\[(\u2502\u256d]|KV cache|error).*", re.MULTILINE)


class Terminal:
    """`generate.py` in a terminal of its own, as `columns` x `lines` characters."""

    def __init__(self, *argv, columns: int = 80, lines: int = 24, env: dict | None = None):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under a script's background job
            # With Python's environment, as readline writes COLUMNS and LINES into C's; and without
            # those, which pytest's workers may have: the size is the terminal's.
            given = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES")}
            given |= {"TERM": "xterm-256color", **(env or {})}
            os.execve(sys.executable, [sys.executable, str(ROOT / "generate.py"), *argv], given)
        termios.tcsetwinsize(self.fd, (lines, columns))
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000)
        # The terminal's answers, as to where its cursor is.
        self.screen.write_process_input = self.type
        self.stream, self.raw = pyte.ByteStream(self.screen), b""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_):
        os.close(self.fd)  # hangs up
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)

    @property
    def text(self) -> str:
        """All that was ever on the screen, as far as it was not taken away again."""
        above = [
            "".join(line[i].data for i in range(self.screen.columns))
            for line in self.screen.history.top
        ]
        return "\n".join(line.rstrip() for line in [*above, *self.screen.display]).rstrip()

    def record(self, start: str = "") -> str:
        """The text from the last `start` on, with # for figures."""
        text = self.text[self.text.rindex(start) if start else 0 :]
        text = re.sub(r"^\[.*\u2026$", "[...", text, flags=re.MULTILINE)
        return FIGURES.sub(lambda line: re.sub(r"[\d.,]*\d", "#", line[0]), text)

    def type(self, keys: str):
        os.write(self.fd, keys.encode())

    def read(self, seconds: float) -> bool:
        """Take what comes within so many seconds. Returns False at the end."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return True
        try:
            data = os.read(self.fd, 65536)
        except OSError:  # Linux: the other side is closed
            data = b""
        self.raw += data
        self.stream.feed(data)
        return bool(data)

    def until(self, what, seconds: float = 60) -> float:
        """Wait for a pattern on the screen, or until `what()`. Returns the seconds it took."""
        begin = time.monotonic()
        done = what if callable(what) else lambda: re.search(what, self.text)
        while not done():
            if not self.read(0.05) or time.monotonic() > begin + seconds:
                raise AssertionError(f"waited for {what!r}, found:\n{self.text}")
        return time.monotonic() - begin

    def prompt(self):
        """Wait for an empty prompt."""
        self.until(lambda: self.text.endswith(IDLE))

    def say(self, text: str):
        """Type a turn or a command, and wait for the next prompt."""
        self.type(text)
        before = len(self.raw)
        self.type("\r")
        # Pasting is switched off when a text is taken, and on again with the next prompt.
        taken, next_one = b"\x1b[?2004l", b"\x1b[?2004h"
        self.until(lambda: next_one in self.raw[before:].partition(taken)[2])
        self.prompt()

    def end(self) -> int:
        """Wait for the program's end. Returns its exit status."""
        while self.read(30):
            pass
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
