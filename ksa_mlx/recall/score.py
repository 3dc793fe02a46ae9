"""What a model answers: greedily right or not, and the answer's loss, in one forward a question."""

import copy
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from ..memory.caches import Quantised
from .tasks import Question

# Takes ids (1, n) int32 and the positions start, stop; returns the logits (stop - start, ids) that
# follow these positions. One that also has a method `begin(ids)` is told the list of ids with which
# the next questions all begin, and need not read them again.
Forward = Callable[[mx.array, int, int], mx.array]


class Scores(NamedTuple):
    """exact: whether every token of an answer is the likeliest, (answers,) bool. nll: its loss in
    nats a token, (answers,) float64."""

    exact: np.ndarray
    nll: np.ndarray


def score(
    forward: Forward, questions: Iterable[Question], tick: Callable[[], Any] = lambda: None
) -> Scores:
    """Score the answers of questions, teacher forced.

    An answer is exact if greedy decoding gives it: then each token follows from the right ones
    before it. tick: called after each question.
    """
    exact, nll = [], []
    for _, group in groupby(questions, key=lambda q: (q.kind, q.text, q.ids[: q.shared])):
        for i, q in enumerate(group):
            if i == 0 and hasattr(forward, "begin"):
                forward.begin(q.ids[: q.shared])
            first, last = q.answers[0][0] - 1, q.answers[-1][1] - 1
            logits = forward(mx.array([q.ids]), first, last)
            found, losses = judged(logits, q.ids[first + 1 : last + 1])
            for start, stop in q.answers:
                part = slice(start - first - 1, stop - first - 1)
                exact.append(bool(found[part].all()))
                nll.append(float(losses[part].mean()))
            tick()
    return Scores(np.array(exact, bool), np.array(nll, np.float64))


def judged(logits: mx.array, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of logits (n, ids) and the n ids that follow: which are the likeliest, and their losses."""
    logits, following = logits.astype(mx.float32), mx.array(ids)
    losses = mx.logsumexp(logits, axis=-1) - mx.take_along_axis(logits, following[:, None], 1)[:, 0]
    right = mx.argmax(logits, axis=-1) == following
    mx.eval(losses, right)
    return np.array(right), np.array(losses, np.float64)


class Cached:
    """A `Forward` through the caches of a model, as it runs: a text is read once, in steps, and its
    caches are copied for each question.

    Args:
        model: one of ours or of mlx-lm's.
        quantised: to what the caches are quantised after each step, None: not.
        step: tokens that are read at once.
    """

    def __init__(self, model: Any, quantised: Quantised | None = None, step: int = 2048):
        self.model, self.quantised, self.step = model, quantised, step
        self.read: list[int] = []
        self.cache: list[Any] = []

    def begin(self, ids: list[int]):
        """Read a text, of which no logits are computed."""
        self.read, self.cache = list(ids), make_prompt_cache(self.model)
        for at in range(0, len(ids), self.step):
            self.model(mx.array([ids[at : at + self.step]]), cache=self.cache)
            quantise(self.cache, self.quantised)
            mx.eval([c.state for c in self.cache])

    def __call__(self, ids: mx.array, start: int, stop: int) -> mx.array:
        every, n = ids[0].tolist(), len(self.read)
        if n > start or every[:n] != self.read or not self.cache:
            self.begin(every[:start])
            n = start
        logits = self.model(mx.array([every[n:stop]]), cache=copy.deepcopy(self.cache))
        return logits[0, start - n :]


def quantise(cache: list[Any], quantised: Quantised | None):
    """Quantise what a model has read, in place and as mlx-lm does, if it is to be."""
    if quantised is not None:
        bits, group_size, start = quantised
        maybe_quantize_kv_cache(cache, start, group_size, bits)
