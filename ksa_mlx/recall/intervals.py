"""How sure a figure is: Wilson's interval of a share, and the block bootstrap of losses."""

from collections.abc import Callable
from statistics import NormalDist

import numpy as np

LEVEL = 0.9
# Losses of neighbouring tokens belong together; the mean of so many is what is drawn.
BLOCK = 64
DRAWS = 2000

Interval = tuple[float, float]


def wilson(right: int, total: int, level: float = LEVEL) -> Interval:
    """The interval of a share, right of total; (0, 1) of none."""
    if not total:
        return 0.0, 1.0
    z, p = NormalDist().inv_cdf((1 + level) / 2), right / total
    middle = p + z * z / (2 * total)
    spread = z * (p * (1 - p) / total + z * z / (4 * total * total)) ** 0.5
    scale = 1 + z * z / total
    return max(0.0, (middle - spread) / scale), min(1.0, (middle + spread) / scale)


def blocks(losses: np.ndarray, size: int = BLOCK) -> np.ndarray:
    """Means of blocks of losses (..., tokens): (..., tokens // size), what is left over dropped;
    one block of all where there are fewer."""
    n = losses.shape[-1]
    if n < size:
        return losses.mean(-1, keepdims=True)
    whole = losses[..., : n // size * size]
    return whole.reshape(*losses.shape[:-1], -1, size).mean(-1)


def bootstrap(
    drawn: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray] = lambda means: means[..., 0],
    level: float = LEVEL,
    draws: int = DRAWS,
    seed: int = 0,
) -> Interval:
    """The interval of a statistic of mean losses.

    Args:
        drawn: (blocks,) or (models, blocks): losses of the same blocks in each model, which are
            drawn together, so that what is hard for all is not counted as a difference.
        statistic: of means (draws, models), such as the share of a gap that is closed; returns
            (draws,). The first model's mean, if not given.
        level: the share of draws that lie in the interval.
        draws: how often as many blocks as there are are drawn.
        seed: of the draws.
    """
    rows = np.atleast_2d(drawn)
    n = rows.shape[1]
    if not n:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = np.stack([rows[:, rng.integers(n, size=n)].mean(1) for _ in range(draws)])
    low, high = np.quantile(statistic(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
