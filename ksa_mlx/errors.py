"""Every error that this package raises for what a user hands in, and how one is printed."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class KSAError(ValueError):
    """What a user asked for cannot be done; the message is one line that says what and where."""


class ConfigError(KSAError):
    """A field of the configuration that is missing or makes no sense."""

    def __init__(self, field: str, found: Any, expected: str, layer: int | None = None):
        where = field if layer is None else f"{field}, layer {layer}"
        found = repr(found)
        if len(found) > 80:
            found = found[:77] + "..."
        super().__init__(f"{where}: found {found}, expected {expected}")


class CheckpointError(KSAError):
    """A checkpoint that cannot be used."""


@contextmanager
def in_file(file: Path) -> Iterator[None]:
    """Name the file in the `ConfigError` of a block, which becomes a `CheckpointError`."""
    try:
        yield
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from None


class SessionError(KSAError):
    """A conversation, or a file of one, that cannot go on as asked."""


class ContextError(SessionError):
    """A conversation that is longer than the model's context."""


class DataError(KSAError):
    """Texts to train on that cannot be used."""


class MemoryLimitError(SessionError):
    """A prompt that the machine has no room for."""


class RequestError(KSAError):
    """A request to the server that its client must change."""

    def __init__(self, param: str | None, message: str, code: str | None = None, status: int = 400):
        super().__init__(f"{param}: {message}" if param else message)
        self.param, self.code, self.status = param, code, status


def one_line(error: BaseException) -> str:
    """An error's message in one line of at most 200 characters, or its name."""
    text = " ".join(str(error).split())
    return text[:200] if text else type(error).__name__


def exit_status(command: Callable[[], Any], stopped: str, where: str | None = None) -> int:
    """Run a command. Its status: 0, 1 after an error, said in one line on standard error, or 130
    after Ctrl-C, with the line `stopped` there. where: what the system's errors are about that name
    no file. What is a fault of ours keeps its traceback."""
    try:
        command()
    except KeyboardInterrupt:
        print(stopped, file=sys.stderr)
        return 130
    except KSAError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        place, said = e.filename or where, e.strerror or one_line(e)
        print(f"error: {place}: {said}" if place else f"error: {one_line(e)}", file=sys.stderr)
    except (RuntimeError, ValueError, MemoryError) as e:  # MLX's own
        print(f"error: {one_line(e)}", file=sys.stderr)
    else:
        return 0
    return 1
