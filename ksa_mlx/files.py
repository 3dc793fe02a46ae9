"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; what lies there takes `file`'s place at the end.

    On an error it is removed, and `file` stays as it was. After a power cut one of both is there.
    """
    part = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield part
        with open(part, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
