"""Which tokens end an answer: the config's, and those with which the chat template ends a turn."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, Qwen3Config

from ..errors import ConfigError, in_file
from .source import Source, read_json

# One of these makes a tokenizer.
TOKENIZER = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "*.tiktoken")
_MARK = "An answer, and nothing else."


def eos_ids(config: dict[str, Any], end: int) -> list[int]:
    """A config's `eos_token_id` as a list. Raises `ConfigError` unless they are below `end`."""
    found = config.get("eos_token_id")
    ids = [] if found is None else found if isinstance(found, list) else [found]
    for i in ids:
        if type(i) is not int or not 0 <= i < end:
            raise ConfigError("eos_token_id", found, f"a token id, or a list of them, below {end}")
    return ids


def stop_ids(source: Source, end: int) -> list[int]:
    """The end tokens that a checkpoint's files name: generation_config.json's, or config.json's.

    Text ids are below `end`. Raises `CheckpointError`.
    """
    ids: list[int] = []
    for file in (source.config_file, source.config_file.with_name("generation_config.json")):
        if file.is_file():
            with in_file(file):
                ids = eos_ids(read_json(file), end) or ids
    return ids


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder holds the files of a tokenizer that a KSA model can have."""
    return any(any(folder.glob(pattern)) for pattern in TOKENIZER)


def load_tokenizer(folder: Path, **settings: Any):
    """The folder's transformers tokenizer; of the model's code nothing is run.

    Given a config, transformers does not read the folder's, which may name code of the model's.
    """
    return AutoTokenizer.from_pretrained(folder, config=Qwen3Config(), **settings)


def end_of_turn(tokenizer: Any) -> dict[int, str]:
    """The special token with which the chat template ends an answer, if there is one.

    Found by what follows the text of an assistant's message that ends a conversation.
    """
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _MARK}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # no template, or one that wants other messages: its own errors are many
        return {}
    _, found, rest = text.rpartition(_MARK)
    if not found:
        return {}
    ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False)
    special = set(tokenizer.all_special_ids)
    special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return {i: tokenizer.convert_ids_to_tokens(i) for i in ids[:1] if i in special}


def add_end_of_turn(config: dict[str, Any], tokenizer: Any) -> dict[int, str]:
    """Add the chat template's end of a turn to a config's end tokens; returns what was added."""
    ids = config.get("eos_token_id") or []
    new = {i: token for i, token in end_of_turn(tokenizer).items() if i not in ids}
    if new and not ids and tokenizer.eos_token_id is not None:
        ids = [tokenizer.eos_token_id]  # what counts where the config names none
        new.pop(ids[0], None)
    if new:
        config["eos_token_id"] = [*ids, *new]
    return new
