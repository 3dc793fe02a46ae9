"""Documents: files whose text stands before a turn, by /file or named in it as @PATH."""

import os
import re
from pathlib import Path

from ..errors import SessionError
from .conversation import Document

# @PATH at the beginning of a word; a blank in it stands behind \, or the path in quotes.
NAMED = re.compile(r'(?<!\S)@("[^"\n]+"|(?:\\.|[^\s\\])+)')

# What may stand behind a path and belong to the sentence.
STOPS = ".,;:!?)"


def path_of(text: str) -> Path:
    """A path as it is typed, dragged into a terminal, or quoted."""
    text = text.strip()
    if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        return Path(text[1:-1]).expanduser()
    return Path(re.sub(r"\\(.)", r"\1", text)).expanduser()


def read_text(file: Path) -> str:
    """A file's text. Raises SessionError if there is none, or no UTF-8."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as e:
        raise SessionError(f"{file} is not UTF-8 at byte {e.start:,}; expected text") from None
    except OSError as e:
        raise SessionError(f"{file}: {e.strerror}") from None
    except ValueError as e:  # a zero byte in the name
        raise SessionError(f"{file}: {e}") from None


def document(file: Path) -> Document:
    """A file as a document. Raises SessionError for one without text."""
    text = read_text(file)
    if not text.strip():
        raise SessionError(f"{file}: found no text in it")
    return Document(file.name, text)


def named(text: str) -> tuple[list[Document], str]:
    """The documents that a turn names, and the turn: within a sentence their names stay.

    What is no file stays as it is, unless it can only have been meant for one. Raises SessionError
    for that, and for files that cannot be read.
    """
    found: list[Document] = []

    def replace(match: re.Match) -> str:
        for word in (match[1], match[1].rstrip(STOPS)):
            path = path_of(word)
            if os.path.isfile(path):
                found.append(document(path))
                rest = match[1].removeprefix(word)
                within = text[: match.start()].strip() and text[match.end() :].strip()
                return path.name + rest if within else rest.strip(STOPS)
        # Pasted code is full of @words; a single line with a path in it is not code.
        if "\n" not in text and ("/" in match[0] or re.search(r"\w\.\w{1,5}$", match[0])):
            kind = "found a folder" if os.path.isdir(path) else "no such file"
            raise SessionError(f"{match[0]}: {kind}")
        return match[0]

    turn = NAMED.sub(replace, text)
    return found, turn.strip() if found else turn
