"""What a retrofit reached: loss and recall, between what forgetting costs and the base."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from ..benchmark.results import Results
from ..recall.intervals import blocks
from ..recall.score import judged, score
from ..recall.tasks import Question, questions
from .streams import attend_all, attend_near, text_stream

# Last hidden states (1, n, hidden), normed, of ids (1, n).
Forward = Callable[[mx.array], mx.array]

# Rows of logits at once, and tokens in a block of the bootstrap: neighbours are not independent.
ROWS, BLOCK = 512, 64
# Tokens from one distance to the next.
BUCKETS = ((256, 1024), (1024, 2048), (2048, 4096))
# Tokens of a text that says anything: a block behind the first distance.
LEAST = BUCKETS[0][0] + BLOCK
# Who reads: the base; the base that forgets (window and sink); the KSA model; and the KSA model
# whose summaries are hidden, which says what its adapters alone are worth.
READERS = ("teacher", "near", "student", "hidden")
# Questions that a recall text ends with.
ASKED = 8


def readers(teacher, student) -> dict[str, tuple[Any, Forward]]:
    """The model and the forward of each of READERS."""
    args = student.args
    chunk = args.summary_chunk_size
    near = attend_near(args.windows, chunk)
    return {
        "teacher": (teacher, lambda ids: text_stream(teacher, ids, attend_all)),
        "near": (teacher, lambda ids: text_stream(teacher, ids, near)),
        "student": (student, lambda ids: student.model(ids)),
        "hidden": (student, lambda ids: text_stream(student, ids, near)),
    }


def losses(model, forward: Forward, ids: Sequence[int]) -> np.ndarray:
    """Of each token but the first, nats: (n - 1,)."""
    h, found = forward(mx.array(ids)[None])[0, :-1], []
    for a in range(0, len(h), ROWS):
        some = h[a : a + ROWS]
        found.append(judged(model.head(some), list(ids[a + 1 : a + 1 + len(some)]))[1])
    return np.concatenate(found)


@dataclass(frozen=True)
class Texts:
    """What is read: texts by name, ids with the prefix; questions by length. The kind of a text is
    its name up to a dash."""

    texts: Mapping[str, Sequence[int]]
    recall: dict[int, list[Question]]


def recall_questions(
    lengths: Sequence[int], count: int, tokenizer: Any, prefix: Sequence[int]
) -> dict[int, list[Question]]:
    """Several keys, values of digits, `count` a length, of patterns that are never trained. The
    same for all runs, so that they can be compared."""
    return {
        n: questions(
            "digits", n, -(-count // ASKED), 0, tokenizer, "test", asked=ASKED,
            beginning=list(prefix),
        )
        for n in lengths
    }  # fmt: skip


def measure(
    teacher, student, texts: Texts, results: Results, names: Sequence[str] = READERS
) -> Iterator[None]:
    """Add a row to `results` for each reader and text or length, but for those that it has; yields
    before each of them."""
    done = {(r["reader"], r["of"]) for t in ("loss", "recall") for r in results.found.get(t, [])}
    for name, (model, forward) in readers(teacher, student).items():
        if name not in names:
            continue
        for text, ids in texts.texts.items():
            yield
            if (name, text) not in done:
                # So that the first block begins with the text's first token, which has no loss.
                means = blocks(np.concatenate([[0.0], losses(model, forward, ids)]), BLOCK).tolist()
                results.add("loss", {"reader": name, "of": text, "blocks": means})

        def answers(ids, start, stop, model=model, forward=forward):
            return model.head(forward(ids)[0, start:stop])

        for length, asked in texts.recall.items():
            yield
            if (name, length) not in done:
                found = score(answers, asked)
                row = {"exact": found.exact.tolist(), "nll": found.nll.tolist()}
                results.add("recall", {"reader": name, "of": length, **row})


@dataclass(frozen=True)
class Share:
    """Of the gap between forgetting (0) and the base (1): the share closed, its 90 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{100 * self.share:.0f} ({100 * self.low:.0f} to {100 * self.high:.0f})"


def kind_of(text: str) -> str:
    return text.partition("-")[0]


def shares(
    rows: Sequence[dict[str, Any]], bucket: tuple[int, int], reader: str = "student", seed: int = 0
) -> dict[str, Share]:
    """By kind of text, and of the mean over kinds ("mean"): the share of the gap that `reader`
    closes, in texts that reach so far. The intervals are a block bootstrap's. rows: the results'
    "loss"."""
    a, b = (n // BLOCK for n in bucket)
    found = {(r["reader"], r["of"]): np.array(r["blocks"][a:b]) for r in rows}
    needed = ("teacher", "near", reader)
    names = [t for who, t in found if who == "teacher" and len(found[who, t])]
    names = [t for t in names if all((who, t) in found for who in needed)]
    kinds = {
        kind: [
            np.concatenate([found[who, t] for t in names if kind_of(t) == kind]) for who in needed
        ]
        for kind in dict.fromkeys(map(kind_of, names))
    }
    rng = np.random.default_rng(seed)

    def share(base, near, own) -> float:
        return float((near.mean() - own.mean()) / (near.mean() - base.mean()))

    whole = {k: share(*v) for k, v in kinds.items()}
    drawn: dict[str, list[float]] = {k: [] for k in kinds}
    for _ in range(1000):
        for kind, values in kinds.items():
            pick = rng.integers(0, len(values[0]), len(values[0]))
            drawn[kind].append(share(*(v[pick] for v in values)))
    if kinds:
        whole["mean"] = float(np.mean(list(whole.values())))
        drawn["mean"] = np.mean(list(drawn.values()), axis=0).tolist()
    return {k: Share(whole[k], *map(float, np.quantile(drawn[k], [0.05, 0.95]))) for k in whole}


def table(found: dict[str, Any]) -> str:
    """Results for people: losses and shares by distance, and recall by length."""
    rows, lines = found.get("loss", []), []
    for bucket in BUCKETS:
        shared = shares(rows, bucket)
        if not shared:
            continue
        a, b = (n // BLOCK for n in bucket)
        nats = {
            who: np.mean(
                [np.mean(x) for r in rows if r["reader"] == who and (x := r["blocks"][a:b])]
            )
            for who in dict.fromkeys(r["reader"] for r in rows)
        }
        said = ", ".join(f"{who} {x:.3f}" for who, x in nats.items())
        lines.append(f"tokens {bucket[0]:,} to {bucket[1]:,}, nats: {said}")
        said = ", ".join(f"{kind} {share}" for kind, share in shared.items())
        lines.append(f"  share of the gap closed, % (90 % interval): {said}")
    for r in found.get("recall", []):
        n, exact = len(r["exact"]), 100 * np.mean(r["exact"])
        lines.append(
            f"recall at {r['of']:,} tokens, {r['reader']}: {exact:.0f} % of {n} exact, "
            f"{np.mean(r['nll']):.3f} nats a token"
        )
    return "\n".join(lines)
