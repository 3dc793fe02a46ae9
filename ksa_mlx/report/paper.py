"""The text and the figures of a report, on the terminal and in two files."""

import json
import textwrap
from pathlib import Path
from typing import Any

from ..files import replaced
from .stage import Found

LINES = 120  # that a report has at most
WIDTH = 100


def wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, WIDTH, subsequent_indent="    ") or [""]


class Paper:
    """Lines that appear at once, and in PATH.txt, below what decides; figures in PATH.json.

    The files are written anew after each stage, so that whatever ends the report leaves them.

    Args:
        path: of the files, without their endings.
        kept: lines that the numbers that decide will need.
    """

    def __init__(self, path: Path, kept: int):
        self.text, self.figures = path.with_name(path.name + ".txt"), path.with_name(
            path.name + ".json"
        )  # fmt: skip
        self.room = LINES - kept
        self.lines: list[str] = []
        self.found: dict[str, dict[str, Found]] = {}
        self._left_out = 0

    def say(self, *lines: str, until: int | None = None):
        """Print lines, cut to the width, as long as there is room: up to line `until`, if given."""
        for line in lines:
            for part in wrapped(line):
                if len(self.lines) >= min(self.room, until or self.room):
                    self._left_out += 1
                    continue
                self.lines.append(part)
                print(part, flush=True)

    def note(self, stage: str, case: str, found: Found):
        self.found.setdefault(stage, {})[case] = found

    def keep(self, top: list[str]):
        """Write both files as of now, with these lines on top."""
        left = [f"({self._left_out} more lines: see the JSON)"] if self._left_out else []
        with replaced(self.text) as part:
            part.write_text("\n".join([*top, *self.lines, *left]) + "\n", encoding="utf-8")
        with replaced(self.figures) as part:
            part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def of(self, stage: str, case: str, *names: str) -> Any:
        """A figure, or None where it was not measured."""
        x: Any = self.found.get(stage, {}).get(case, {})
        for name in names:
            x = x.get(name) if isinstance(x, dict) else None
        return x
