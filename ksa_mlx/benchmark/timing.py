"""Timing in turns, ratios with their spread, and what a benchmark shows while it runs."""

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from tqdm import tqdm

WIDTH = 100  # characters that a line of a table may have


@contextmanager
def bar(what: str, total: int | None = None):
    """A bar on standard error, if that is a terminal, which says what is being done. Yields a
    function to call after each of `total` steps."""
    with tqdm(total=total, desc=what, leave=False, disable=None, file=sys.stderr) as shown:
        shown.refresh()
        yield lambda: shown.update()


def in_turns(
    runs: dict[str, Callable[[], Any]],
    turns: int,
    warmup: int = 3,
    tick: Callable[[], Any] = lambda: None,
    after: Callable[[Any], Any] = lambda result: None,
) -> dict[str, np.ndarray]:
    """Seconds of each run, taken in turns: {name: (turns,) float64}.

    Args:
        runs: what to time, by name.
        turns: how often each is timed.
        warmup: untimed turns before them.
        tick: called after each turn, also of the warm-up.
        after: called with what a run returned, untimed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + turns):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            took = time.perf_counter() - start
            after(result)
            if turn >= warmup:
                seconds[name].append(took)
        tick()
    return {name: np.array(s) for name, s in seconds.items()}


def ratio(a: np.ndarray, b: np.ndarray) -> dict[str, float]:
    """The median of a / b turn by turn, and its quartiles."""
    low, median, high = np.percentile(a / b, [25, 50, 75])
    return {"median": float(median), "low": float(low), "high": float(high)}


def spread(r: dict[str, float]) -> str:
    """A ratio with its quartiles, if there was more than one turn."""
    if r["low"] == r["high"]:
        return f"{r['median']:.2f}"
    return f"{r['median']:.2f} ({r['low']:.2f}-{r['high']:.2f})"


def size(n: float) -> str:
    """Bytes for a reader, in decimal units."""
    if n >= 1e9:
        return f"{n / 1e9:.2f} GB"
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB"


class Table:
    """A table in aligned columns whose lines are printed as they come.

    Args:
        note: what the table shows, printed above it.
        columns: (head, width) of each; a head has one or two lines, and the first column is
            aligned to the left.
    """

    def __init__(self, note: str, columns: Sequence[tuple[str, int]]):
        heads = [head.rpartition("\n")[::2] for head, _ in columns]
        self.widths = [width for _, width in columns]
        top, bottom = (self._line(line) for line in zip(*heads, strict=True))
        self.head: str | None = "\n".join([note, "", *([top] if top.strip() else []), bottom])

    def _line(self, cells: Sequence[str]) -> str:
        first, *others = zip(cells, self.widths, strict=True)
        return (first[0].ljust(first[1]) + "".join(c.rjust(w) for c, w in others)).rstrip()

    def add(self, *cells: Any):
        """Print a line; before the first one, the head."""
        if self.head:
            print(f"\n{self.head}")
            self.head = None
        print(self._line([str(c) for c in cells]), flush=True)
