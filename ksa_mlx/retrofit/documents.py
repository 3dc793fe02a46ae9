"""A user's texts as token ids: .txt and .md files, and the forms of mlx-lm's jsonl."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from mlx_lm.tuner.datasets import create_dataset
from tqdm import tqdm

from ..errors import DataError, one_line

SUFFIXES = (".txt", ".md", ".jsonl")
FIELDS = "text, prompt and completion, or messages"
AT_ONCE = 64  # texts given to the tokenizer in one call


class Record(NamedTuple):
    """A text, or a chat as mlx-lm writes one, and where it stands."""

    where: str
    content: str | dict[str, Any]


def files_of(path: Path) -> tuple[list[Path], list[Path]]:
    """Files to train on, and to hold out.

    As in mlx-lm, a folder with a train.jsonl is that file and valid.jsonl; of any other folder all
    files count, those of its folders too. Raises `DataError`.
    """
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: found a file {path.suffix!r}, expected {_one_of(SUFFIXES)}")
        return [path], []
    if not path.is_dir():
        raise DataError(f"{path}: no such file or folder")
    if (path / "train.jsonl").is_file():
        valid = path / "valid.jsonl"
        return [path / "train.jsonl"], [valid] if valid.is_file() else []
    found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not found:
        raise DataError(f"{path}: found no {_one_of(SUFFIXES)} file")
    return found, []


def read(files: list[Path]) -> Iterator[Record]:
    """What the files hold: a text file is one text, a jsonl file one a line. Raises `DataError`."""
    for file in files:
        try:
            text = file.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError as e:
            raise DataError(f"{file}: byte {e.start} is not UTF-8") from None
        except OSError as e:
            raise DataError(f"{file}: {one_line(e)}") from None
        if file.suffix != ".jsonl":
            yield Record(str(file), text)
            continue
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                yield _record(f"{file}:{number}", line)


def _record(where: str, line: str) -> Record:
    try:
        found = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {one_line(e)}") from None
    if not isinstance(found, dict):
        raise DataError(f"{where}: found {_kind(found)}, expected an object with {FIELDS}")
    pair = "prompt" in found and "completion" in found
    if not pair and "messages" not in found and "text" not in found:
        fields = ", ".join(map(repr, found)) or "no field"
        raise DataError(f"{where}: found {fields[:80]}, expected {FIELDS}")
    if not pair and "messages" in found:
        _check_messages(where, found["messages"])
        _check_unicode(where, "messages", found["messages"])
        return Record(where, found)
    for name in ("prompt", "completion") if pair else ("text",):
        if not isinstance(found[name], str):
            raise DataError(f"{where}: {name}: found {_kind(found[name])}, expected a string")
        _check_unicode(where, name, found[name])
    return Record(where, found if pair else found["text"])


def _check_unicode(where: str, name: str, value: Any):
    """JSON can spell half a surrogate pair, which is no text, and which no tokenizer takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as e:
        found = f"\\u{ord(e.object[e.start]):04x}, half a surrogate pair"
        raise DataError(f"{where}: {name}: found {found}, expected text") from None


def _check_messages(where: str, messages: Any):
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: messages: found {_kind(messages)}, expected a list of messages")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{where}: messages: found {_kind(message)}, expected role and content")


def encoded(
    records: Iterator[Record], tokenizer: Any, prefix: Sequence[int] = (), verbose: bool = False
) -> list[np.ndarray]:
    """The ids of each text, int32; a chat's come from the template. Without what stands before
    every text: what the tokenizer puts there, and the prefix where a template has it.

    Raises `DataError` for a chat where the tokenizer has no template, or one that it refuses.
    """
    found: list[np.ndarray] = []
    beginnings = [list(b) for b in (beginning(tokenizer), prefix) if b]
    waiting: list[str] = []

    def flush():
        found.extend(_texts(waiting, tokenizer))
        waiting.clear()

    for record in tqdm(records, "Reading texts", unit=" texts", disable=not verbose, leave=False):
        if isinstance(record.content, str):
            waiting.append(record.content)
            if len(waiting) == AT_ONCE:
                flush()
        else:
            flush()
            ids = _chat(record, tokenizer)
            for begin in beginnings:
                if ids[: len(begin)].tolist() == begin:
                    ids = ids[len(begin) :]
            found.append(ids)
    flush()
    return [ids for ids in found if len(ids)]


def beginning(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text, such as a token for the beginning."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    count = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
    return list(whole[:count])


def _texts(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    if not texts:
        return []
    # mlx-lm's wrapper encodes one text at a time; what it wraps encodes many on all cores.
    inner = getattr(tokenizer, "_tokenizer", None)
    if callable(inner):
        ids = inner(texts, add_special_tokens=False, verbose=False)["input_ids"]
    else:
        ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    return [np.array(x, dtype=np.int32) for x in ids]


def _chat(record: Record, tokenizer: Any) -> np.ndarray:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{record.where}: a chat, and the model's tokenizer has no chat template")
    try:
        data = create_dataset([record.content], tokenizer, SimpleNamespace())
        return np.array(data.process(data[0])[0], dtype=np.int32)
    except Exception as e:  # templates are programs: jinja2's errors, and whatever they run into
        raise DataError(f"{record.where}: the chat template fails: {one_line(e)}") from None


def _kind(x: Any) -> str:
    if isinstance(x, list | dict | str) and not x:
        return f"an empty {'list' if isinstance(x, list) else 'object' if x == {} else 'string'}"
    names = {list: "a list", dict: "an object", str: "a string", bool: "a boolean",
             type(None): "null"}  # fmt: skip
    return names.get(type(x), "a number")


def _one_of(names: tuple[str, ...]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
