"""The SentencePiece tokenizer of the notebook: byte fallback, split digits, trained on the notes
themselves."""

from __future__ import annotations

import random
import tempfile
from itertools import chain
from pathlib import Path

import sentencepiece

from . import words
from .data import SPECIAL, TRAIN_NAMES, Style, Writer


def corpus(seed: int = 7, notes: int = 40000):
    """Lines to train on: notes, questions, prose, and every word list. No held-out name or
    value."""
    rng = random.Random(seed)
    writer = Writer(rng, Style(made_up_names=0.1, filler=0.0))
    for i in range(notes):
        fact = writer.facts(1)[0]
        text, end = writer.note(fact)
        yield f" {text} {fact.value}{end}"
        yield f" {writer.question(fact)}"
        if i % 3 == 0:
            yield " " + writer.filler()
    lists = [words.COLORS, words.CITIES, words.ITEMS, words.PLACES, words.ADJECTIVES, words.COMMON]
    for word in chain(*lists, *words.ATTRIBUTES.values()):
        yield from [f" {word}"] * 150
    for name in TRAIN_NAMES:
        yield from [f" {name}"] * 5


def train_tokenizer(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Train and write ``tokenizer.model`` to ``path``; the same bytes for the same sentencepiece
    version."""
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(corpus()) + "\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(Path(folder) / "tokenizer"), vocab_size=vocab_size,
            model_type="bpe",
            split_digits=True, byte_fallback=True, user_defined_symbols=SPECIAL,
            character_coverage=1.0,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            bos_id=1, eos_id=2, unk_id=0, pad_id=-1, minloglevel=2,
        )  # fmt: skip
        path.write_bytes((Path(folder) / "tokenizer.model").read_bytes())
    return load_tokenizer(path)


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
