"""What was found out about the kernels on a machine, kept in a small JSON file.

It is a cache: whoever deletes it has it made anew, at the next use of each kernel.
"""

import functools
import hashlib
import json
import os
import platform
import plistlib
import sys
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..files import replaced
from . import metal

FILE = "kernels.json"
SYSTEM = Path("/System/Library/CoreServices/SystemVersion.plist")

# What is kept of one case: names and numbers, or a line of text where there is no number.
Entry = dict[str, float | str]


def folder() -> Path:
    """Where the file lies: ~/Library/Caches/ksa-mlx, or $XDG_CACHE_HOME/ksa-mlx elsewhere."""
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "ksa-mlx"
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(caches) if os.path.isabs(caches) else Path.home() / ".cache") / "ksa-mlx"


def macos_build() -> str:
    """Such as 25B78; of another system what it calls its version."""
    try:
        return plistlib.loads(SYSTEM.read_bytes())["ProductBuildVersion"]
    except (OSError, KeyError, plistlib.InvalidFileException):
        return platform.release()


def machine() -> str:
    """GPU, system, MLX and the kernels' sources: what was found under others means nothing here."""
    sources = hashlib.sha256()
    for file in metal.files():
        sources.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    gpu = mx.device_info().get("architecture", "unknown")
    return f"{gpu}, {macos_build()}, MLX {mx.__version__}, sources {sources.hexdigest()[:12]}"


class Record:
    """Entries by kind and case, of one machine.

    Args:
        file: where they are kept; None: nowhere.
        machine: whose they are; others' in the file are left alone.
    """

    def __init__(self, file: Path | None, machine: str):
        self.file, self.machine = file, machine
        self._found = self._read().get(machine, {})

    def find(self, kind: str, case: str) -> Entry | None:
        return self._found.get(kind, {}).get(case)

    def keep(self, kind: str, case: str, entry: Entry):
        """Remember an entry, in the file too; a file that cannot be written costs a warning."""
        self._found.setdefault(kind, {})[case] = entry
        if self.file is None:
            return
        # Another process may have added to the file since; what it damaged was already said.
        everything = self._read(quiet=True)
        everything.setdefault(self.machine, {}).setdefault(kind, {})[case] = entry
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with replaced(self.file) as part:
                part.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            _say(f"{self.file}: cannot be written ({error.strerror}); kernels are timed anew "
                 "in every process")  # fmt: skip
            self.file = None

    def _read(self, quiet: bool = False) -> dict[str, dict[str, dict[str, Entry]]]:
        """The file as it is, or nothing if it is damaged."""
        if self.file is None or not self.file.is_file():
            return {}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))
            if _is_nested(found, 4):
                return found
            why = "found other values than names and numbers"
        except (OSError, ValueError, RecursionError) as error:
            why = f"found no JSON file ({type(error).__name__})"
        if not quiet:
            _say(f"{self.file}: {why}; it is ignored, and will be written anew")
        return {}


def _is_nested(x: Any, depth: int) -> bool:
    """Whether x is so many levels of dicts over numbers or text."""
    if depth == 0:
        return isinstance(x, float | int | str)
    return isinstance(x, dict) and all(_is_nested(y, depth - 1) for y in x.values())


def _say(line: str):
    warnings.warn(f"ksa-mlx: {line}", RuntimeWarning, stacklevel=2)


@functools.lru_cache(1)
def here() -> Record:
    """This user's, on this machine."""
    try:
        file = folder() / FILE
    except RuntimeError:  # no home
        file = None
    return Record(file, machine())
