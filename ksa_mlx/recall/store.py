"""What has been measured, a line each in a file: a run that was stopped goes on from there."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from ..errors import KSAError

# Changes with what rows mean and what is asked.
VERSION = 1

Row = dict[str, Any]


class Store:
    """Rows of JSON in a file, which is made if there is none.

    Each row is written at once and whole: what a kill leaves of one is cut off the next time.

    Args:
        path: the file.
        settings: what all its rows were measured with; those of a file must be the same.
    """

    def __init__(self, path: str | Path, settings: Row):
        self.path = Path(path)
        try:
            self._file = open(self.path, "ab+")  # noqa: SIM115 until `close`
        except OSError as e:
            raise KSAError(f"--results: {path}: {e.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise KSAError(f"--results: {path}: another run writes to it") from None
        head = {"recall": VERSION, **settings}
        try:
            first, *self.rows = self._read() or [head]
            self._head = head
            self._check(first, head)
        except KSAError:
            self.close()
            raise

    def _size(self) -> int:
        return os.fstat(self._file.fileno()).st_size

    def _read(self) -> list[Row]:
        self._file.seek(0)
        text, rows = self._file.read(), []
        whole = text.rfind(b"\n") + 1
        for i, line in enumerate(text[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise KSAError(f"--results: {self.path}, line {i}: found no results of recall")
            rows.append(row)
        if not rows and text and not b'{"recall"'.startswith(text[:9]):
            raise KSAError(f"--results: {self.path}, line 1: found no results of recall")
        if whole < len(text):
            self._file.truncate(whole)
        return rows

    def _check(self, found: Row, head: Row):
        """Refuse a file of other settings: its rows are not comparable."""
        if "recall" not in found:
            raise KSAError(f"--results: {self.path}, line 1: found no results of recall")
        for name in head | found:
            a, b = (json.dumps(x.get(name)) for x in (found, head))
            if a != b:
                what = "version" if name == "recall" else f"--{name.replace('_', '-')}"
                raise KSAError(
                    f"--results: {self.path}: measured with {what} {a}, now it is {b}; "
                    "give another file, or delete this one"
                )

    def _append(self, row: Row):
        # One write, which the system does not mix with others, and nothing is lost once it is done.
        self._file.write(json.dumps(row).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def add(self, row: Row):
        """Keep a row."""
        if not self._size():
            self._append(self._head)
        self._append(row)
        self.rows.append(row)

    def find(self, **key: Any) -> Row | None:
        """The row that has these values, None if there is none."""
        return next((r for r in self.rows if all(r.get(k) == v for k, v in key.items())), None)

    def close(self):
        """Leave no file behind if nothing was measured."""
        if not self._size():
            self.path.unlink(missing_ok=True)
        self._file.close()
