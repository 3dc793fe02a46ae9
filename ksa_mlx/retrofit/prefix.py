"""The fixed beginning of every text, whose chunk's summary carries the attention sink.

It stands in the tokenizer, before what it encodes with special tokens, and in the chat template.
"""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers import processors

from ..checkpoint.source import read_json
from ..errors import KSAError, one_line

# Whole sentences first; then one to be cut where its length fits.
_SENTENCES = (
    *("The text of the document follows", "Here is the text of the document", "The text begins"),
    *("Here is the text", "The document begins here", "The text of the document follows here"),
    "This is the text of the document",
    *("The full text of the document follows below", "Here is the whole text of the document"),
)
_LONG = (
    "This is the beginning of the text of a document that goes on below and that was written to be "
    "read from here to the end by whoever has the time for it and wants to know what it says of "
    "the things and people in it and of what happened to them in the years before and after"
).split()
# What may follow in a text or a template.
_FOLLOWS = ("The", "a", "1", "#", "(", '"')
_PIECE = "<prefix>"  # its name within the tokenizer's post-processor
_SILENT = "{%- set bos_token = '' %}"
_USER = [{"role": "user", "content": "Hello."}]


def choose_prefix(tokenizer: Any, chunk: int = 8) -> list[int]:
    """Ids of a natural English beginning of exactly `chunk` tokens, a chunk.

    It begins with the tokenizer's BOS where the tokenizer adds one to a text, ends a line, is
    spelled by its own text and does not merge with what follows. Raises `KSAError` if there is
    none.
    """
    bos = tokenizer.encode("", add_special_tokens=True)
    for text in _candidates():
        ids = [*bos, *tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) == chunk and survives(tokenizer, ids):
            return ids
    raise KSAError(f"prefix: found no beginning of {chunk} tokens that this tokenizer spells")


def _candidates() -> Iterator[str]:
    for sentence in (*_SENTENCES, *(" ".join(_LONG[:n]) for n in range(1, len(_LONG) + 1))):
        yield from (f"{sentence}{end}" for end in (":\n", ".\n", ":\n\n", "\n"))


def survives(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the text of these ids is spelled with them, whatever follows."""
    text = tokenizer.decode(ids)
    return all(
        tokenizer.encode(text + follow, add_special_tokens=False)[: len(ids)] == ids
        for follow in ("", *_FOLLOWS)
    )


def with_prefix(tokenizer: Any, prefix: list[int]) -> Any:
    """A copy of a transformers tokenizer that begins every text and every chat with a prefix.

    Args:
        tokenizer: transformers' or mlx-lm's wrapper of it.
        prefix: ids, with the BOS that the tokenizer itself would add.

    Raises `KSAError` where the tokenizer or its template cannot.
    """
    if isinstance(tokenizer, TokenizerWrapper):
        tokenizer = tokenizer._tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise KSAError("prefix: found a tokenizer without a tokenizer.json, expected one with it")
    if not survives(tokenizer, prefix):
        raise KSAError(f"prefix: found {prefix}, expected ids that their own text is spelled with")
    made = copy.deepcopy(tokenizer)
    text, tokens = made.decode(prefix), made.convert_ids_to_tokens(prefix)
    # Some templates, and mlx-lm, begin with a BOS, or leave out what comes before a text that does.
    if prefix[0] in made.all_special_ids:
        made.bos_token = tokens[0]
    backend = made.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single=f"{_PIECE} $A",
        pair=f"{_PIECE} $A $B",
        special_tokens=[{"id": _PIECE, "ids": list(prefix), "tokens": tokens}],
    )
    if made.encode("a") != [*prefix, *made.encode("a", add_special_tokens=False)]:
        raise KSAError("prefix: found a tokenizer that does not begin its texts as it is told")
    given = made.chat_template
    if isinstance(given, dict):
        made.chat_template = {name: _begun(t, text) for name, t in given.items()}
    elif given:
        made.chat_template = _begun(given, text)
    if given:
        _check_template(tokenizer, made, prefix, text)
    return made


def _begun(template: str, text: str) -> str:
    """A chat template that writes a text first.

    As an expression, since a template may take the blanks before it away.
    """
    return f"{{{{- {json.dumps(text)} }}}}{template}"


def _check_template(plain: Any, made: Any, prefix: list[int], text: str):
    """Drop a BOS of the template's own, which the prefix has; check what a chat begins with."""
    before, bos = _rendered(plain, plain.chat_template), plain.bos_token
    if bos and text.startswith(bos) and isinstance(plain.chat_template, str):
        silent = _rendered(plain, _SILENT + plain.chat_template)
        if silent == before.removeprefix(bos) != before:
            made.chat_template, before = _SILENT + made.chat_template, silent
    after = _rendered(made, made.chat_template)
    ids = made.encode(after, add_special_tokens=False)
    expected = [*prefix, *plain.encode(before, add_special_tokens=False)]
    if after != text + before or ids != expected:
        raise KSAError(
            f"prefix: found a chat that begins {after[:40]!r}, expected {text!r} and then what the "
            "template writes, each with its own tokens"
        )


def _rendered(tokenizer: Any, template: Any) -> str:
    chosen = {"chat_template": template} if isinstance(template, str) else {}
    options: Any = {"tokenize": False, "add_generation_prompt": True, **chosen}
    try:
        return tokenizer.apply_chat_template(_USER, **options)
    except Exception as e:  # templates' own errors are many
        raise KSAError(f"chat template: refused a plain question ({one_line(e)})") from None


def save(tokenizer: Any, folder: Path):
    """Write a transformers tokenizer so that every version loads it as it is.

    A class of its own would make its post-processor anew when it loads.
    """
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    config = read_json(file)
    for name in ("backend", "is_local", "local_files_only", "add_bos_token", "add_eos_token"):
        config.pop(name, None)
    config.pop("auto_map", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
