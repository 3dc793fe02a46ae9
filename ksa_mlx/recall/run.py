"""The measurement: every model, way, kind and length, text by text, into a store."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from ..errors import KSAError
from ..stock.identity import identity
from .losses import by_position, losses
from .models import Way, check_fits, has_summaries, open_model
from .prompts import Prompts
from .score import Cached, score
from .store import Row, Store
from .tasks import Texts
from .text_only import TextOnly

STEP = 2048  # tokens that are read at once, as in mlx_lm.generate


@dataclass(frozen=True)
class Plan:
    """What is measured. questions: of each kind and length. data: files whose losses are. filler:
    the text that facts are spread in, None: sentences made here."""

    kinds: tuple[str, ...]
    lengths: tuple[int, ...]
    questions: int
    seed: int
    depths: tuple[float, ...]
    kv_bits: tuple[int, ...] = ()
    kv_group_size: int = 64
    chat: str | None = None
    control: bool = True
    data: tuple[Path, ...] = ()
    filler: str | None = None
    memory_limit: int | None = None

    @property
    def settings(self) -> Row:
        """What rows of one file have in common. Models, kinds, lengths, texts and ways can be
        added to a file."""
        return {
            "seed": self.seed,
            "chat": self.chat,
            "depths": list(self.depths),
            "kv_group_size": self.kv_group_size,
            "filler": self.filler and _digest(self.filler),
        }


def read_text(flag: str, file: Path) -> str:
    """A text file. Raises KSAError if it is none."""
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as e:
        raise KSAError(f"{flag}: {file}: {e.strerror}") from None
    except UnicodeDecodeError:
        raise KSAError(f"{flag}: {file}: found no text in UTF-8") from None
    if not text.strip():
        raise KSAError(f"{flag}: {file}: found an empty file")
    return text


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Run:
    """Of one model.

    Args: plan: what is measured. store: where rows are kept. name: of the model, its folder or
    Hub id; label: its short name. Its weights are read when they are needed. `rows` are those that
    the plan asks for, as far as they have been measured.

    Raises KSAError, before anything is measured, for what the model cannot do.
    """

    def __init__(self, plan: Plan, store: Store, name: str, label: str):
        self.plan, self.store, self.name, self.label = plan, store, name, label
        self.rows: list[Row] = []
        self.model, tokenizer = open_model(name)
        self.prompts = Prompts(tokenizer, plan.chat)
        hidden = plan.control and has_summaries(self.model)
        self.ways = [Way(), *map(Way, plan.kv_bits), *([Way(hidden=True)] if hidden else [])]
        # Plain text, whatever the questions are.
        beginning = Prompts(tokenizer).beginning
        self.texts = {}
        for file in plan.data:
            ids = tokenizer.encode(read_text("--data", file), add_special_tokens=False)
            self.texts[file] = [*beginning, *ids][: max(plan.lengths)]
            if len(self.texts[file]) < 2:
                raise KSAError(f"--data: {file}: found {len(ids)} tokens, expected at least 2")
        for way in self.ways:
            shape = max(plan.lengths), plan.kv_group_size, plan.memory_limit
            check_fits(name, self.model, way, *shape, STEP)
        for kind in plan.kinds:
            self._questions(kind, min(plan.lengths)).text(0)

    def _same(self):
        """Refuse to add to the results of another model of the same name."""
        found = identity([self.model], self.prompts.tokenizer, {})
        row = self.store.find(model=self.label, part="model")
        if row is None:
            self.store.add({"model": self.label, "part": "model", "identity": found})
        elif row["identity"] != found:
            raise KSAError(
                f"--results: {self.store.path}: measured with another model {self.name}, of other "
                "weights or tokenizer; give another file, or delete this one"
            )

    def _questions(self, kind: str, length: int) -> Texts:
        plan = self.plan
        return Texts(kind, length, plan.seed, self.prompts, filler=plan.filler, depths=plan.depths)

    @property
    def total(self) -> int:
        """Tokens that are read, if nothing has been measured yet, about."""
        plan, each = self.plan, 0
        for kind in plan.kinds:
            per_text = len(self._questions(kind, min(plan.lengths)).text(0))
            each += sum(-(-plan.questions // per_text) * length for length in plan.lengths)
        return len(self.ways) * (each + sum(map(len, self.texts.values())))

    def go(self, tick: Callable[[int, str], Any]):
        """Measure what the store does not hold. tick: called with the tokens that are done since,
        and with what is next, if it changes."""
        self._same()
        for way in self.ways:
            quantised = way.quantised(self.plan.kv_group_size)
            model = TextOnly(self.model) if way.hidden else self.model
            for file, ids in self.texts.items():
                self._losses(model, quantised, way, file, ids, tick)
            reads = Cached(model, quantised, STEP)
            for kind in self.plan.kinds:
                for length in self.plan.lengths:
                    self._recall(reads, way, kind, length, tick)

    def _losses(self, model, quantised, way: Way, file: Path, ids: list[int], tick):
        tick(0, f"{self.label}, {way}: {file.name}")
        key = {"model": self.label, "part": "losses", "way": str(way), "ids": _digest(str(ids))}
        row = self.store.find(**key)
        if row is None:
            found = by_position(losses(model, ids, quantised, lambda n: tick(n, "")))
            blocks = {str(start): means for start, means in found.items()}
            row = {**key, "file": file.name, "tokens": len(ids), "blocks": blocks}
            self.store.add(row)
        else:
            tick(len(ids), "")
        self.rows.append(row)

    def _recall(self, reads: Cached, way: Way, kind: str, length: int, tick):
        tick(0, f"{self.label}, {way}: {kind}, {length:,}")
        key = {"model": self.label, "part": kind, "way": str(way), "length": length}
        texts, asked = self._questions(kind, length), 0
        for number in count():
            if asked >= self.plan.questions:
                return
            row = self.store.find(**key, text=number)
            if row is None:
                questions = texts.text(number)
                exact, nll = score(reads, questions)
                row = {
                    **key,
                    "text": number,
                    "depth": [q.depth for q in questions],
                    "distance": [q.distance for q in questions],
                    "exact": exact.tolist(),
                    "nll": [round(x, 5) for x in nll.tolist()],
                }
                self.store.add(row)
            self.rows.append(row)
            asked += len(row["exact"])
            tick(length, "")
