"""Training texts by number: any sequence is found from the seed and its number alone, so that a run
that was killed, and one on two machines, sees what an unbroken one on one machine sees."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import DataError
from .documents import encoded, files_of, read


class Text(NamedTuple):
    """ids (length,), int32; answers: places in it of tokens that answer a question about it."""

    ids: np.ndarray
    answers: np.ndarray


# A text of so many ids that asks for facts put into some text: (number, length, that text's ids).
RecallMaker = Callable[[int, int, np.ndarray], tuple[Sequence[int], Sequence[int]]]
# What a random number is drawn for.
SPLIT, EPOCH, RECALL = range(3)


def indices(step: int, batch: int, rank: int = 0, world: int = 1) -> list[int]:
    """Numbers of the sequences of a step, counted from 0, on machine `rank` of `world` with `batch`
    each: all machines together see the numbers that one with a batch of batch * world sees."""
    return [(step * batch + i) * world + rank for i in range(batch)]


class Data:
    """Sequences of `length` ids that begin with `prefix`; made by `open_data`.

    A document is read in windows that begin at another place in every epoch; documents shorter than
    a sequence are joined, in another order every epoch, with the end token between. tokens,
    held_out_tokens: of the documents; epoch: sequences of plain text until they come again;
    held_out_count: sequences that are held out.
    """

    def __init__(
        self,
        documents: list[np.ndarray],
        held_out: list[np.ndarray],
        length: int,
        prefix: Sequence[int],
        end: int,
        seed: int,
        recall: float = 0.0,
        maker: RecallMaker | None = None,
    ):
        self.length, self.seed, self.end = length, seed, end
        self.prefix = np.array(prefix, dtype=np.int32)
        self.maker, self.recall = maker, recall if maker else 0.0
        self.body = length - len(self.prefix)
        self.tokens, self.held_out_tokens = (sum(map(len, x)) for x in (documents, held_out))
        self.long, self.short = self._sorted(documents)
        windows = [len(d) // self.body for d in self.long]
        # Of each window of an epoch: its document, and which of the document's windows it is.
        self._windows = [(d, w) for d, n in enumerate(windows) for w in range(n)]
        self._packs = sum(len(d) + 1 for d in self.short) // self.body
        self.epoch = len(self._windows) + self._packs
        self._held = list(self._fixed(held_out))
        self.held_out_count = len(self._held)
        self._now: tuple[int, np.ndarray, np.ndarray, np.ndarray] | None = None

    def _fixed(self, documents: list[np.ndarray]) -> Iterator[np.ndarray]:
        long, short = self._sorted(documents)
        for d in [*long, self._joined(short)]:
            yield from (d[i : i + self.body] for i in range(0, len(d) - self.body + 1, self.body))

    def _sorted(self, documents: list[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Documents that fill a sequence, and shorter ones without the end token of a chat."""
        short = [d[:-1] if d[-1] == self.end else d for d in documents if len(d) < self.body]
        return [d for d in documents if len(d) >= self.body], short

    def sequence(self, index: int) -> Text:
        """Training sequence `index`, from 0 without end: a share `recall` asks for facts."""
        asked = math.floor(index * self.recall)
        if self.maker and math.floor((index + 1) * self.recall) > asked:
            rng = np.random.default_rng([self.seed, RECALL, asked])
            filler = self._plain(int(rng.integers(self.epoch)))
            ids, answers = self.maker(asked, self.length, filler)
            return Text(np.array(ids, dtype=np.int32), np.array(answers, dtype=np.int32))
        return self._text(self._plain(index - asked))

    def held_out(self, index: int) -> Text:
        """Held-out sequence `index`, modulo `held_out_count`."""
        return self._text(self._held[index % self.held_out_count])

    def _text(self, body: np.ndarray) -> Text:
        return Text(np.concatenate([self.prefix, body]), np.zeros(0, dtype=np.int32))

    def _plain(self, number: int) -> np.ndarray:
        """Plain text `number`, (body,)."""
        order, phases, joined = self._epoch(number // self.epoch)
        at = int(order[number % self.epoch])
        if at >= len(self._windows):
            start = (at - len(self._windows)) * self.body
            return joined[start : start + self.body]
        document, window = self._windows[at]
        start = int(phases[document]) + window * self.body
        return self.long[document][start : start + self.body]

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of an epoch: the order of its windows and packs, where each long document's first window
        begins, and the short documents in a row."""
        if self._now is None or self._now[0] != epoch:
            rng = np.random.default_rng([self.seed, EPOCH, epoch])
            order = rng.permutation(self.epoch)
            phases = np.array([rng.integers(len(d) % self.body + 1) for d in self.long], dtype=int)
            joined = self._joined([self.short[i] for i in rng.permutation(len(self.short))])
            self._now = epoch, order, phases, joined
        return self._now[1:]

    def _joined(self, documents: list[np.ndarray]) -> np.ndarray:
        """Documents in a row, each with an end token behind it."""
        end = np.array([self.end], dtype=np.int32)
        parts = [part for d in documents for part in (d, end)]
        return np.concatenate(parts) if parts else end[:0]


def open_data(
    path: str | Path,
    tokenizer: Any,
    length: int,
    prefix: Sequence[int],
    seed: int = 0,
    held_out: float = 0.02,
    *,
    least: int = 0,
    recall: float = 0.2,
    maker: RecallMaker | None = None,
    verbose: bool = False,
) -> Data:
    """Read texts and hold some out.

    Args:
        path: a file or folder of .txt, .md, or mlx-lm's jsonl.
        tokenizer: of transformers, or mlx-lm's wrapper of it.
        length: ids of a sequence, the prefix among them.
        prefix: ids that every sequence begins with.
        seed: of what is held out, and of the order.
        held_out: share of the tokens to hold out, whole documents as far as possible; of mlx-lm's
            data valid.jsonl is what is held out.
        least: tokens to train on that must be there.
        recall: share of sequences that ask for facts.
        maker: of these; None: there are none.
        verbose: show a progress bar.

    Raises `DataError` of one line that names the file or the line.
    """
    path = Path(path).expanduser()
    train, valid = files_of(path)
    documents = encoded(read(train), tokenizer, prefix, verbose)
    rest = encoded(read(valid), tokenizer, prefix, verbose)
    if not documents:
        raise DataError(f"{path}: found no text")
    body = length - len(prefix)
    if valid and sum(len(d) + 1 for d in rest) < body + 1:
        raise DataError(
            f"{valid[0]}: found {sum(map(len, rest)):,} tokens, expected at least {body:,}"
        )
    if not valid:
        documents, rest = split(documents, held_out, body, seed)
    data = Data(documents, rest, length, prefix, _end(tokenizer), seed, recall, maker)
    wanted = max(least, 2 * body)
    if data.tokens < wanted or not data.epoch or not data.held_out_count:
        raise DataError(
            f"{path}: found {data.tokens + data.held_out_tokens:,} tokens, expected at least "
            f"{math.ceil((wanted + body) / (1 - held_out)):,}"
        )
    return data


def split(
    documents: list[np.ndarray], share: float, least: int, seed: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Documents to train on and to hold out: about `share` of the tokens and at least `least`, of a
    document that is larger than what is still wanted its end."""
    wanted = max(int(share * sum(map(len, documents))), least)
    train = dict(enumerate(documents))
    held: list[np.ndarray] = []
    for i in np.random.default_rng([seed, SPLIT]).permutation(len(documents)).tolist():
        if wanted <= 0:
            break
        text = train.pop(i)
        if len(text) > max(wanted, least) * 2:
            cut = len(text) - max(wanted, least)
            train[i], text = text[:cut], text[cut:]
        held.append(text)
        wanted -= len(text)
    return [train[i] for i in sorted(train)], held


def _end(tokenizer: Any) -> int:
    end = getattr(tokenizer, "eos_token_id", None)
    if end is None:
        raise DataError("tokenizer: eos_token_id: found none, expected the id of an end token")
    return int(end)
