"""A figure of a training: losses by step, and what it reached by distance."""

from pathlib import Path
from typing import Any

from .evaluate import BUCKETS, shares


def plot(lines: list[dict[str, Any]], found: dict[str, Any], path: Path):
    """Write the figure. lines: the run's log; found: the evaluation's results. Needs matplotlib
    (extra `plot`)."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4), constrained_layout=True)
    left, middle, right = axes
    first = [x for x in lines if x.get("stage") == "regression" and "loss" in x]
    held = [x for x in lines if x.get("what") == "held out"]
    left.plot([x["step"] for x in first], [x["loss"] for x in first], alpha=0.4, label="a step")
    left.plot([x["step"] for x in held], [x["error"] for x in held], "o-", label="held out")
    left.set(title="Stage 1: layers' error", ylabel="1: summaries hidden", xlabel="step")
    second = [x for x in lines if x.get("stage") == "distillation" and "kl" in x]
    for name, label in (("kl", "KL, nats a token"), ("hidden", "hidden states")):
        middle.plot([x["step"] for x in second], _smooth([x[name] for x in second]), label=label)
    middle.set(title="Stage 2: against the base", xlabel="step", yscale="log")
    for kind in shares(found.get("loss", []), BUCKETS[0]):
        points = [(b, s[kind]) for b in BUCKETS if kind in (s := shares(found["loss"], b))]
        x = [(a + b) / 2 for (a, b), _ in points]
        y = [s.share for _, s in points]
        bars = [[s.share - s.low for _, s in points], [s.high - s.share for _, s in points]]
        style = {"color": "black", "linewidth": 2.5} if kind == "mean" else {"alpha": 0.6}
        right.errorbar(x, y, bars, label=kind, marker="o", capsize=3, **style)
    right.set(title="Share of the gap closed", xlabel="token", ylim=(-0.1, 1.1))
    for axis in axes:
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _smooth(values: list[float], weight: float = 0.8) -> list[float]:
    """Exponential means, the first values alike."""
    found, mean = [], 0.0
    for i, value in enumerate(values):
        mean = weight * mean + (1 - weight) * value
        found.append(mean / (1 - weight ** (i + 1)))
    return found
