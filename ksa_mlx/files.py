"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path) -> Iterator[Path]:
    """A path beside `file` to write to; what lies there takes `file`'s place at the end.

    On an error it is removed, and `file` stays as it was.
    """
    part = file.with_name(f".{file.stem}.{os.getpid()}{file.suffix}")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
