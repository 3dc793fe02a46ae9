"""The tokenizer of a GGUF file's metadata, written as the Hub's files of one."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import ByteLevel, TemplateProcessing

from ..errors import ConfigError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# How text is cut before merges apply, by llama.cpp's names of it; None: as GPT-2 does.
_SPLITS = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), _QWEN2),
    **dict.fromkeys(("gpt-2", "smollm"), None),
}
_CONTROL, _USER_DEFINED = 3, 4


def write_tokenizer(metadata: dict[str, Any], folder: Path):
    """Write `tokenizer.json` and `tokenizer_config.json`. Raises `ConfigError`.

    Only byte-level BPE can be made of what a GGUF says; a SentencePiece model lacks its merges.
    """
    tokens, merges = _lists(metadata, "tokens"), _lists(metadata, "merges")
    kind, cut = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ConfigError("tokenizer.ggml.model", kind, "'gpt2'; its folder on the Hub will do")
    if cut not in _SPLITS:
        known = ", ".join(sorted(_SPLITS))
        raise ConfigError("tokenizer.ggml.pre", cut, f"one of {known}; its Hub folder will do")
    types = metadata.get("tokenizer.ggml.token_type", [])
    if len(types) not in (0, len(tokens)):
        raise ConfigError("tokenizer.ggml.token_type", len(types), f"{len(tokens)} entries")
    pairs: Any = [tuple(merge.split(" ")) for merge in merges]
    llama3 = _SPLITS[cut] == _LLAMA3
    try:
        # Llama 3's vocabulary has words that its merges do not make.
        model = BPE(dict(zip(tokens, range(len(tokens)), strict=True)), pairs, ignore_merges=llama3)
    except Exception as e:  # tokenizers has no class for it
        raise ConfigError("tokenizer.ggml.merges", str(e), "pairs of tokens") from None
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = _cuts(cut)
    if _SPLITS[cut] == _QWEN2:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    for wanted, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        found = [t for t, kind in zip(tokens, types, strict=False) if kind == wanted]
        added = [AddedToken(t, normalized=False, special=special) for t in found]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
    names: dict[str, str] = {}
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if i is not None:
            if type(i) is not int or not 0 <= i < len(tokens):
                raise ConfigError(f"tokenizer.ggml.{field}_token_id", i, "an id of a token")
            names[f"{name}_token"] = tokens[i]
    bos = names.get("bos_token")
    # llama.cpp begins texts of Llama 3 with it unless the file says otherwise.
    if bos and metadata.get("tokenizer.ggml.add_bos_token", llama3):
        tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokens.index(bos))]
        )
    else:
        tokenizer.post_processor = ByteLevel(trim_offsets=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **names}
    config["clean_up_tokenization_spaces"] = False
    if context := metadata.get(f"{metadata.get('general.architecture')}.context_length"):
        config["model_max_length"] = context
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _lists(metadata: dict[str, Any], name: str) -> list[str]:
    found = metadata.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list) or not all(isinstance(t, str) for t in found):
        raise ConfigError(f"tokenizer.ggml.{name}", type(found).__name__, "a list of texts")
    return found


def _cuts(name: str) -> pre_tokenizers.PreTokenizer:
    split = _SPLITS[name]
    if split is None:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if name == "smollm" else []
        return pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
