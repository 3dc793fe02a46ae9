"""Prompt caches in files, which outlive the server: named, found, read, dropped."""

import fcntl
import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from safetensors import safe_open

from ..errors import KSAError, one_line
from ..memory.caches import arrays

# Files of ours, in a folder that may hold others: an identity's beginning, and a digest of tokens.
NAME = re.compile(r"prompt-([0-9a-f]{16})-[0-9a-f]{32}\.safetensors")
# One that is being written. Whoever writes it holds a lock on it.
PART = re.compile(r"\.prompt-[0-9a-f-]+\.\d+\.safetensors")
# The entry of a file's metadata that says whose it is and what it has read.
ENTRY = "ksa_mlx"


class Entry(NamedTuple):
    """A file. tokens: what it has read, (n,). trimmable: whether a part of them can be used."""

    file: Path
    tokens: np.ndarray
    trimmable: bool

    def usable(self, tokens: np.ndarray) -> int:
        """How many of these tokens the file saves reading."""
        n = min(len(self.tokens), len(tokens))
        differ = np.flatnonzero(self.tokens[:n] != tokens[:n])
        common = int(differ[0]) if differ.size else n
        return common if self.trimmable or common == len(self.tokens) else 0


class Disk:
    """The files of a folder, of several models and perhaps of several servers.

    Args:
        folder: made if it is not there. Files of others in it are left alone.
        most: bytes of all our files; what was used least recently leaves first.

    Methods may be called from several threads. Raises KSAError if the folder cannot be used.
    """

    def __init__(self, folder: Path, most: int):
        self.folder, self.most = folder, most
        self._entries: dict[str, dict[Path, Entry]] = {}  # of each identity that was asked for
        self._lock = RLock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._remove_parts()
        except OSError as e:
            raise KSAError(f"--prompt-cache-dir: {folder}: {e.strerror}") from None
        if not os.access(folder, os.W_OK):
            raise KSAError(f"--prompt-cache-dir: {folder}: not writable")

    def _remove_parts(self):
        """Remove what a killed process has left half written."""
        for part in self.folder.iterdir():
            if PART.fullmatch(part.name):
                with suppress(OSError), open(part, "rb") as f:
                    fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # nobody writes it
                    part.unlink()

    def files(self) -> list[tuple[Path, os.stat_result]]:
        """Our files, what was used least recently first."""
        found = []
        with suppress(OSError), os.scandir(self.folder) as every:
            for item in every:
                if NAME.fullmatch(item.name):
                    with suppress(FileNotFoundError):
                        found.append((Path(item.path), item.stat()))
        return sorted(found, key=lambda one: one[1].st_mtime_ns)

    # Finding and reading

    def find(self, identity: str, tokens: Sequence[int]) -> tuple[int, Entry | None]:
        """The file that saves reading most of these tokens, the smallest one, and how many."""
        wanted = np.array(tokens, np.int64)
        found = [(entry.usable(wanted), entry) for entry in self._of(identity)]
        return max(found, key=lambda one: (one[0], -len(one[1].tokens)), default=(0, None))

    def _of(self, identity: str) -> list[Entry]:
        """All entries of an identity. The first time their files are looked into."""
        with self._lock:
            if identity not in self._entries:
                known = self._entries[identity] = {}
                for file, _ in self.files():
                    own = file.name.startswith(f"prompt-{identity[:16]}-")
                    if own and (entry := self._look_into(file, identity)) is not None:
                        known[file] = entry
            return list(self._entries[identity].values())

    def _look_into(self, file: Path, identity: str) -> Entry | None:
        try:
            with safe_open(file, framework="np") as f:
                about = json.loads(f.metadata()[f"0.{ENTRY}"])
            entry = Entry(file, np.array(about["tokens"], np.int64), about["trimmable"] is True)
            return entry if about["identity"] == identity else None
        except FileNotFoundError:
            return None  # another server has dropped it
        except Exception as e:  # whatever a damaged file makes of the reader
            self._drop(file, e)
            return None

    def read(self, entry: Entry) -> list[Any] | None:
        """The caches of a file, now the one used last; None, and no such file, if it is damaged."""
        try:
            caches, metadata = load_prompt_cache(str(entry.file), return_metadata=True)
            if json.loads(metadata[ENTRY])["checksum"] != checksum(caches):
                raise ValueError("its checksum is another")
            os.utime(entry.file)
            return caches
        except Exception as e:
            self._drop(entry.file, e if entry.file.exists() else None)
            return None

    def _drop(self, file: Path, damage: Exception | None = None):
        """Remove a file; say so if that is because of damage."""
        if damage is not None:
            logging.warning(f"{file}: found a damaged prompt cache, removed ({one_line(damage)})")
        with suppress(OSError):
            file.unlink()
        with self._lock:
            for known in self._entries.values():
                known.pop(file, None)

    # Writing

    def write(self, identity: str, tokens: list[int], caches: list[Any], trimmable: bool):
        """Put the caches of some tokens into a file, which appears whole or not at all.

        A file of the same tokens stays as it is. Raises OSError, RuntimeError or ValueError, and
        leaves nothing, if it cannot be written.
        """
        digest = hashlib.sha256(repr(tokens).encode()).hexdigest()[:32]
        entry = Entry(
            self.folder / f"prompt-{identity[:16]}-{digest}.safetensors",
            np.array(tokens, np.int64),
            trimmable,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        if entry.file.exists():
            os.utime(entry.file)
            return
        nbytes = sum(x.nbytes for x in arrays([c.state for c in caches]))
        if not self.make_room(nbytes):
            logging.warning(
                f"a prompt cache of {nbytes / 1e9:.2f} GB is not kept: it is larger than "
                "--prompt-cache-disk-size"
            )
            return
        about = {
            "identity": identity,
            "tokens": tokens,
            "trimmable": trimmable,
            "checksum": checksum(caches),
        }
        with _whole(entry.file) as part:
            save_prompt_cache(str(part), caches, {ENTRY: json.dumps(about)})
        self.make_room(0)
        for other in self._of(identity):
            n = len(other.tokens)
            if trimmable and n < len(tokens) and other.usable(entry.tokens) == n:
                self._drop(other.file)  # the longer one serves for it
        with self._lock:
            self._entries[identity][entry.file] = entry

    def make_room(self, nbytes: int) -> bool:
        """Drop files until so many more bytes fit. Returns False, and drops none, if they never
        do."""
        if nbytes > self.most:
            return False
        files = self.files()
        total = sum(stat.st_size for _, stat in files)
        for file, stat in files:
            if total + nbytes <= self.most:
                break
            total -= stat.st_size
            self._drop(file)
        return True


def checksum(caches: list[Any]) -> int:
    """Of all that caches hold."""
    crc = 0
    for x in arrays([c.state for c in caches]):
        if x.size:
            crc = zlib.crc32(np.frombuffer(memoryview(x), np.uint8).data, crc)  # no copy
    return crc


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A path to write to, locked; what lies there takes `file`'s place once it is on the disk."""
    part = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        with open(part, "wb") as f:
            fcntl.flock(f, fcntl.LOCK_EX)
            yield part
            os.fsync(f.fileno())
            os.replace(part, file)
        folder = os.open(file.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    finally:
        part.unlink(missing_ok=True)
