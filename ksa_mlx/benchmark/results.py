"""What a benchmark has measured so far, kept in a JSON file if one is wanted."""

import json
import os
from pathlib import Path
from typing import Any

from ..errors import KSAError
from ..files import replaced


def check_file(flag: str, path: str):
    """Raises KSAError if a file cannot be written there."""
    file = Path(path)
    if not path or file.is_dir():
        raise KSAError(f"{flag}: found {path!r}, which is a folder, expected a file's path")
    if not file.absolute().parent.is_dir():
        raise KSAError(f"{flag}: {path}: no folder {file.absolute().parent}")
    if not os.access(file if file.exists() else file.absolute().parent, os.W_OK):
        raise KSAError(f"{flag}: {path}: no permission to write it")


def check_files(**files: str | Path | None):
    """The same for all files that a command writes, by flag; no two may be one."""
    written: dict[Path, str] = {}
    for flag, path in files.items():
        if path is not None:
            check_file(f"--{flag}", str(path))
            other = written.setdefault(Path(path).resolve(), flag)
            if other != flag:
                raise KSAError(f"--{flag}: found {path}, which is the file of --{other}")


class Results:
    """What was measured: facts about the run, and lists of rows, one a line of a table.

    After each row the whole is written to `path`, or nothing of it: what was measured is never
    lost, and a reader never finds half a file.
    """

    def __init__(self, path: str | None, **about: Any):
        self.path = None if path is None else Path(path).absolute()
        self.found: dict[str, Any] = about

    def add(self, table: str, row: dict[str, Any]):
        self.found.setdefault(table, []).append(row)
        if self.path:
            with replaced(self.path) as part:
                part.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")

    def last(self, table: str) -> dict[str, Any]:
        return self.found[table][-1]
