"""The SentencePiece tokenizer of the notebook: byte fallback, split digits, trained on the notes
themselves.

The first letter of a word is a piece of its own, but in common words: so "Olga" and "olga" differ
in one token, and an unknown word is in well-known pieces.
"""

from __future__ import annotations

import random
import string
import tempfile
from collections import Counter
from itertools import chain
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from ksa_mlx.errors import CheckpointError

from . import words
from .data import Style, Writer
from .documents import SPECIAL
from .values import ACCENTED, NAMES, WORDS

BAR = "\t"  # between the first letter of a word and its tail, in the text to train on
TAILS = 600  # merged pieces


def corpus(seed: int = 7, notes: int = 30000):
    """Lines to train on: notes, questions, prose, and every word list. No held-out name or
    value."""
    rng = random.Random(seed)
    writer = Writer(rng, Style(made_up_names=0.2, filler=0.0))
    for i in range(notes):
        fact = writer.facts(1)[0]
        text, end = writer.note(fact, update=i % 16 == 0)
        yield f" {text} {fact.value}{end}"
        yield f" {writer.question(fact)}"
        if i % 3 == 0:
            yield " " + writer.filler()
        if i % 20 == 0:
            yield from (f" {t}" for t in writer.talk())
    lists = [words.COLORS, words.CITIES, words.ITEMS, words.PLACES, words.ADJECTIVES, words.COMMON]
    for word in chain(*lists, *words.ATTRIBUTES.values(), words.FREE_ATTRIBUTES):
        yield from [f" {word}"] * 60
    for word in chain(NAMES[False], WORDS[False]):
        yield from [f" {word}"] * 15


def with_bars(line: str) -> str:
    return " ".join(w[:1] + BAR + w[1:] if w[:1].isalpha() else w for w in line.split(" "))


def train_tokenizer(path: Path, vocab_size: int) -> sentencepiece.SentencePieceProcessor:
    """Train and write ``tokenizer.model`` to ``path``; the same bytes for the same sentencepiece
    version."""
    lines = list(corpus())
    letters = string.ascii_letters + string.digits + string.punctuation + ACCENTED
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "corpus.txt"
        text.write_text("\n".join(map(with_bars, lines)) + "\n", encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(Path(folder) / "tokenizer"),
            vocab_size=3 + len(SPECIAL) + 256 + len(set(letters)) + 1 + TAILS,
            model_type="bpe", pretokenization_delimiter=BAR, required_chars=letters,
            split_digits=True, byte_fallback=True, user_defined_symbols=SPECIAL,
            character_coverage=0.9999, max_sentencepiece_length=8,
            normalization_rule_name="identity", remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            bos_id=1, eos_id=2, unk_id=0, pad_id=-1, minloglevel=2,
        )  # fmt: skip
        trained = (Path(folder) / "tokenizer.model").read_bytes()
    path.write_bytes(with_words(trained, lines, vocab_size))
    return load_tokenizer(path)


def with_words(trained: bytes, lines: list[str], vocab_size: int) -> bytes:
    """The model with its pieces in this order: space and first letter, tails, whole words, single
    characters. Earlier pieces are merged earlier."""
    proto = sentencepiece_model_pb2.ModelProto.FromString(trained)
    normal = sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL
    kept = [p for p in proto.pieces if p.type != normal]
    pieces = [p.piece for p in proto.pieces if p.type == normal]
    tails = [p for p in pieces if len(p) > 1 and "\u2581" not in p]
    single = [p for p in pieces if len(p) == 1]
    first = ["\u2581" + c for c in string.ascii_letters]
    count = Counter(w for line in lines for w in line.split(" ")[1:])
    known, room = set(tails) | set(single), vocab_size - len(kept) - len(pieces) - len(first)
    room += len(pieces) - len(tails) - len(single)
    whole = Counter()
    for word, n in count.items():
        word = word.rstrip(".?:,!")
        if word[:1] in set(string.ascii_letters) and word[1:] in known:
            whole["\u2581" + word] += n
    order = [*first, *tails, *(w for w, _ in whole.most_common(room)), *single]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    for rank, piece in enumerate(order):
        proto.pieces.add(piece=piece, score=-float(rank), type=normal)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    # A temporary folder's name, another each time.
    proto.trainer_spec.ClearField("input")
    proto.trainer_spec.ClearField("model_prefix")
    return proto.SerializeToString(deterministic=True)


def load_tokenizer(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Raises CheckpointError where there is none."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; expected a checkpoint of python -m training")
    return sentencepiece.SentencePieceProcessor(model_file=str(path))
