"""The stages of a retrofit, each of which a killed run goes on from: probe, start, regression,
sink, distillation."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import KSAError
from . import closed_form, distill, regression
from .data import Text, indices
from .features import Features, collect, sampled
from .state import Place
from .trainable import Params, adapt, is_adapter, is_summary, put, trainable
from .trainer import Rates, Trainer, below

# Tokens of a chunk, as in the released models.
CHUNK = 8
# Sampled queries of a text in the regression, and next tokens that the distillation compares of a
# text of up to 1,024; of a longer one as large a share.
QUERIES, TOKENS = 192, 320
# Batches whose features are held at once in the regression, and how often each is gone through.
POOL, VISITS = 8, 3
# Held-out texts that the regression is judged by.
HELD = 4
STAGES = ("start", "regression", "sink", "distillation", "done")
# Where a run begins.
BEGINNING: dict[str, Any] = {"stage": STAGES[0], "step": 0, "usual": {}}


class Texts(Protocol):
    """Training texts, by number; held-out ones likewise."""

    def sequence(self, index: int) -> Text: ...

    def held_out(self, index: int) -> Text: ...


@dataclass(frozen=True)
class Settings:
    """What a run's numbers depend on. Tokens are visits, over all machines; batch_size is a
    machine's texts a step; pool: batches whose features are held at once."""

    window: int = 16
    length: int = 1024
    batch_size: int = 2
    regression_tokens: int = 2_000_000
    distillation_tokens: int = 1_000_000
    lora_rank: int = 8
    own_rank: int = 0
    rate: float = 1e-3
    distillation_rate: float = 3e-4
    lora_rate: float = 7e-4
    checkpointed: bool = False
    pool: int = POOL
    seed: int = 0

    @property
    def compared(self) -> int:
        """Next tokens of a text that the distillation compares."""
        return TOKENS * max(1024, self.length) // 1024


class Retrofit:
    """Args: student, its base's arrays and nothing trained; teacher; settings; texts; place: where
    the state is kept; group: machines that share the work; tick(stage, step, steps, said): called
    after each step; stop(): whether to keep the state and raise KeyboardInterrupt then.

    `run()` goes through all stages, from where the place says. Between stages what trains is in
    float32, at the end in the base's dtype. The result is in `student`, with
    LoRA layers where `lora_rank` is not 0. Raises `KSAError` for a student without the settings'
    window, machines that stand at different steps, and a loss that is no number.
    """

    def __init__(
        self, student, teacher, settings: Settings, texts: Texts, place: Place,
        group: Any = None, tick: Callable[..., Any] = lambda *_: None,
        stop: Callable[[], bool] = lambda: False,
    ):  # fmt: skip
        self.student, self.teacher, self.settings = student, teacher, settings
        self.texts, self.place, self.group = texts, place, group
        self.tick, self.stop = tick, stop
        self.rank: int = group.rank() if group else 0
        self.world: int = group.size() if group else 1
        self.args = student.args
        self.windows = self.args.windows
        # Before it no summary is read: the first chunk's comes with the sink.
        self.first = (settings.window + 2) * self.args.summary_chunk_size
        self.arrays, at = place.found() or ({}, BEGINNING)
        self.stage, self.step = at["stage"], at["step"]
        self._check()
        # What a windowed layer lacks without summaries, in the mean over texts.
        self.usual = {int(i): x for i, x in at["usual"].items()}

    def _check(self):
        windows, own = set(self.windows), self.settings.window
        if windows - {None} != {own}:
            raise KSAError(f"windows: found {self.windows}, expected {own} or None, {own} once")
        here = [STAGES.index(self.stage), self.step]
        if (self._sum(here) != self.world * np.array(here)).any():
            raise KSAError(
                f"{self.place.folder}: the machines stand at different steps; copy this folder "
                "from the first machine to all others"
            )

    def _sum(self, numbers: list[int]) -> np.ndarray:
        """Over all machines."""
        if self.world == 1:
            return np.array(numbers)
        return np.array(mx.distributed.all_sum(mx.array(numbers), group=self.group))

    def steps(self, tokens: int) -> int:
        """Steps that a stage of so many tokens takes."""
        return max(1, tokens // (self.settings.length * self.settings.batch_size * self.world))

    def run(self):
        """Go through the stages that are left."""
        if self.stage == "done":
            adapt(self.student, self.settings.lora_rank, seed=self.settings.seed)
        if self.arrays:
            held = below("params/", self.arrays)
            put(
                self.student,
                {k: v for k, v in held.items() if self.stage == "done" or is_summary(k)},
            )
        for at, stage in enumerate(STAGES[:-1]):
            if at < STAGES.index(self.stage):
                continue
            getattr(self, f"_{stage}")()
            self.arrays, self.stage, self.step = {}, STAGES[at + 1], 0
            self._save(lambda: _named(trainable(self.student, _all)), now=True)
        put(self.student, trainable(self.student, _all), self.student.model.norm.weight.dtype)

    def _save(self, arrays: Callable[[], Params], now: bool = False):
        place = {"stage": self.stage, "step": self.step, "usual": self.usual}
        self.place.save(arrays, place, now)

    # Texts

    def _batch(self, number: int, whole: bool = False) -> tuple[mx.array, list[Text]]:
        """This machine's texts of a step's batch, or all machines' texts: ids (B, n)."""
        size = self.settings.batch_size
        if whole:
            numbers = indices(number, size * self.world)
        else:
            numbers = indices(number, size, self.rank, self.world)
        return self._stacked([self.texts.sequence(i) for i in numbers])

    @staticmethod
    def _stacked(texts: list[Text]) -> tuple[mx.array, list[Text]]:
        return mx.array(np.stack([t.ids for t in texts]).astype(np.int32)), texts

    def _positions(self, texts: list[Text], count: int, *key: int) -> np.ndarray:
        """Positions of a batch (B, count), the tokens before answers among them, the same whenever
        they are asked for."""
        found = []
        for text in texts:
            rng = np.random.default_rng([self.settings.seed, *key, int(text.ids.sum())])
            n = self.settings.length - 1
            found.append(sampled(n, count, self.first, list(text.answers - 1), rng))
        return np.stack(found)

    def _features(self, number: int, whole: bool = False) -> Features:
        return self._collected(*self._batch(number, whole), number)

    def _collected(self, ids: mx.array, texts: list[Text], *key: int) -> Features:
        return collect(self.teacher, self.windows, ids, self._positions(texts, QUERIES, *key))

    # Stages

    def _start(self):
        """Closed form, on the texts of one pool; every machine does the same."""
        batches = [self._features(i, whole=True) for i in range(self.settings.pool)]
        closed_form.start(self.student, batches, np.random.default_rng(self.settings.seed))
        gaps = [{i: x.gap.mean().item() for i, x in f.lessons.items()} for f in batches]
        self.usual = {i: float(np.mean([g[i] for g in gaps])) for i in gaps[0]}

    def _regression(self):
        settings, steps = self.settings, self.steps(self.settings.regression_tokens)
        rates = Rates(steps, lambda name: settings.rate * (3 if name.endswith("embedding") else 1))
        trainer = self._trainer(trainable(self.student, is_summary), rates)
        held = [self._collected(*self._stacked([self.texts.held_out(i)])) for i in range(HELD)]
        size = settings.pool
        pool, batches = -1, list[Features]()

        def loss(features: Features):
            found = regression.relative(regression.errors(self.student, features), self.usual)
            return found.mean(), {}

        while trainer.step < steps:
            number, at = divmod(trainer.step, size * VISITS)
            if number != pool:
                if at == 0:
                    self._judge(held, trainer.step)
                batches.clear()
                batches += [self._features(number * size + i) for i in range(size)]
                pool = number
            order = np.random.default_rng([settings.seed, number, at // size]).permutation(size)
            self._learn(trainer, loss, batches[order[at % size]], steps)
        self._judge(held, trainer.step)
        put(self.student, trainer.params)

    def _judge(self, held: list[Features], step: int):
        """Log what the summaries leave of each layer's gap on held-out texts."""
        sums: dict[int, list[float]] = {}
        for features in held:
            for i, (error, gap) in regression.errors(self.student, features).items():
                some = sums.setdefault(i, [0.0, 0.0])
                some[0] += error.sum().item()
                some[1] += gap.sum().item()
        layers = {i: error / gap for i, (error, gap) in sums.items() if gap > regression.TINY}
        mean = float(np.mean(list(layers.values())))
        self.place.log(what="held out", stage=self.stage, step=step, error=mean, layers=layers)
        self.tick(self.stage, step, None, {"held out": mean})

    def _sink(self):
        batches = [self._features(i, whole=True) for i in range(max(1, self.settings.pool // 2))]
        found = closed_form.sink(self.student, batches)
        self.place.log(
            what="sink", stage=self.stage, step=0, error={i: list(e) for i, e in found.items()}
        )

    def _distillation(self):
        settings, steps = self.settings, self.steps(self.settings.distillation_tokens)
        adapt(self.student, settings.lora_rank, seed=settings.seed)
        rate, lora = settings.distillation_rate, settings.lora_rate

        def of(name: str) -> float:
            if not is_summary(name):
                return lora
            return 3 * rate if name.endswith("embedding") else rate

        trainer = self._trainer(trainable(self.student, _all), Rates(steps, of))
        skipped = self.steps(settings.regression_tokens) // VISITS + self.settings.pool

        def loss(goal: distill.Goal):
            return distill.loss(self.student, goal, settings.checkpointed)

        self.student.train()
        while trainer.step < steps:
            ids, texts = self._batch(skipped + trainer.step)
            positions = self._positions(texts, settings.compared, trainer.step)
            weights = np.stack(
                [1.0 + np.isin(p, t.answers - 1) for p, t in zip(positions, texts, strict=True)]
            ).astype(np.float32)
            goal = distill.goal(self.teacher, ids, positions, weights, self.first)
            self._learn(trainer, loss, goal, steps)
        self.student.eval()
        put(self.student, trainer.params)

    def _trainer(self, params: Params, rates: Rates) -> Trainer:
        trainer = Trainer(self.student, params, rates, self.group)
        if self.step:
            trainer.load(self.arrays, self.step)
        return trainer

    def _learn(self, trainer: Trainer, loss, batch, steps: int):
        begun = time.monotonic()
        said = trainer.learn(loss, batch)
        self.step = trainer.step
        seconds = time.monotonic() - begun
        if not np.isfinite(list(said.values())).all():
            raise KSAError(
                f"{self.stage}, step {self.step}: found a loss of {said['loss']}, norm of the "
                f"gradient {said['norm']}; a lower learning rate may help"
            )
        self.place.log(stage=self.stage, step=trainer.step, seconds=round(seconds, 2), **said)
        # All machines or none, as each waits for the others.
        stop = bool(self._sum([int(self.stop())])[0])
        self._save(trainer.state, now=stop)
        self.tick(self.stage, trainer.step, steps, said)
        if stop:
            raise KeyboardInterrupt


def _all(name: str) -> bool:
    return is_summary(name) or is_adapter(name)


def _named(params: Params) -> Params:
    return {f"params/{k}": v for k, v in params.items()}
