"""What one sees of a run, and how one stops it."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
from tqdm import tqdm

from ..interrupts import children_spared, compiler_stops

NAMES = {"regression": "stage 1, regression", "distillation": "stage 2, distillation"}


def say(text: str):
    """A line of the first machine's, above a bar."""
    if mx.distributed.init().rank() == 0:
        tqdm.write(text)


@contextmanager
def interruptible() -> Iterator[list[int]]:
    """A list that is not empty once Ctrl-C was pressed; a second time it interrupts at once."""
    pressed: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def press(number, frame):
        pressed.append(number)
        signal.signal(signal.SIGINT, before)

    if signal.getsignal(signal.SIGINT) is not None:
        signal.signal(signal.SIGINT, press)
    try:
        with children_spared(), compiler_stops(lambda: pressed):
            yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Bars:
    """A bar a stage, with the losses behind it; as `Retrofit` calls it."""

    def __init__(self):
        self.stage: str | None = None
        self.bar: tqdm | None = None

    def __call__(self, stage: str, step: int, steps: int | None, said: dict[str, float]):
        if steps is None:
            error = said["held out"]
            say(f"step {step}: held-out error of the layers {error:.3f} (1: summaries hidden)")
            return
        if self.bar is None or stage != self.stage:
            self.close()
            hidden = mx.distributed.init().rank() > 0
            self.bar = tqdm(total=steps, desc=NAMES[stage], initial=step - 1, disable=hidden)
            self.stage = stage
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in said.items()}, refresh=False)
        self.bar.update(step - self.bar.n)

    def close(self):
        if self.bar is not None:
            self.bar.close()
