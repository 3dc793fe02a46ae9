"""A figure: needles at depths and lengths, exact answers by length, losses by position."""

from typing import Any

import numpy as np

from .summary import Figure
from .table import ABOUT, span

COLORS = ("#0b6e4f", "#b23a48", "#1f5fa8", "#c77d0a", "#6b4c9a", "#444444")
# Line and marker of a way.
STYLES = {"plain": ("-", "o"), "KV 8 bits": ("--", "s"), "KV 4 bits": ("-.", "^"),
          "summaries hidden": (":", "x")}  # fmt: skip
ACROSS = 3  # panels in a row


def _styles(figures: list[Figure]) -> dict[tuple, dict[str, Any]]:
    """A line a way, and a colour a model, or a way where there is one model."""
    coloured = "model" if len({f["model"] for f in figures}) > 1 else "way"
    names = list(dict.fromkeys(f[coloured] for f in figures))
    return {
        (f["model"], f["way"]): {
            "color": COLORS[names.index(f[coloured]) % len(COLORS)],
            "linestyle": STYLES[f["way"]][0],
            "marker": STYLES[f["way"]][1],
            "label": f"{f['model']}, {f['way']}",
        }
        for f in figures
    }


def _heat(axis, figures: list[Figure]):
    """Exact answers of a model in one way, by length and depth."""
    lengths = sorted({f["length"] for f in figures})
    depths = sorted({f["depth"] for f in figures})
    shares = np.full((len(depths), len(lengths)), np.nan)
    for f in figures:
        shares[depths.index(f["depth"]), lengths.index(f["length"])] = f["exact"]
    axis.imshow(shares, cmap="RdYlGn", vmin=0, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        color = "black" if 0.15 < share < 0.85 else "white"  # on what is dark
        axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(lengths)), [span(n, None)[:-3] for n in lengths])
    axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths])
    axis.set_title(f"{figures[0]['model']}, {figures[0]['way']}", fontsize=9)
    axis.set(xlabel="tokens", ylabel="depth")


def _lines(axis, figures: list[Figure], styles, x: str, y: str, scale: float = 1):
    """Figures of each model and way against x, with their intervals."""
    ticks = sorted({f[x] for f in figures})
    for key, style in styles.items():
        some = sorted((f for f in figures if (f["model"], f["way"]) == key), key=lambda f: f[x])
        if some:
            at = [ticks.index(f[x]) for f in some]
            mean, low, high = (
                np.array([f[y + s] for f in some]) * scale for s in ("", "_low", "_high")
            )
            axis.plot(at, mean, markersize=4, **style)
            axis.fill_between(at, low, high, color=style["color"], alpha=0.1, linewidth=0)
    axis.grid(alpha=0.3)
    return ticks


def plot(found: dict[str, list[Figure]], path: str):
    """Write the figure of a `summary`. Needs matplotlib (extra `plot`)."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    styles = _styles(found["recall"] + found["losses"])
    heats: dict[tuple, list[Figure]] = {}
    for f in found["depths"]:
        heats.setdefault((f["model"], f["way"]), []).append(f)
    kinds = list(dict.fromkeys(f["kind"] for f in found["recall"]))
    panels = [*heats, *kinds, *(["losses"] if found["losses"] else [])]
    parts = [len(heats), len(panels) - len(heats)]
    heights = [-(-n // ACROSS) for n in parts]
    figure = pyplot.figure(
        figsize=(12, 0.6 + 2.5 * heights[0] + 3.2 * heights[1]), layout="constrained"
    )
    used = [(h, s) for h, s in zip(heights, (2.5, 3.2), strict=True) if h]
    areas = iter(
        np.atleast_1d(figure.subfigures(len(used), 1, height_ratios=[h * s for h, s in used]))
    )
    if heats:
        area = next(areas)
        area.suptitle("Needles, exact answers, %", fontsize=10)
        axes = area.subplots(heights[0], ACROSS, squeeze=False).ravel()
        for axis, some in zip(axes, heats.values(), strict=False):
            _heat(axis, some)
        for axis in axes[len(heats) :]:
            axis.set_visible(False)
    area = next(areas)
    axes = area.subplots(heights[1], ACROSS, squeeze=False).ravel()
    for axis, kind in zip(axes, kinds, strict=False):
        ticks = _lines(
            axis, [f for f in found["recall"] if f["kind"] == kind], styles, "length", "exact", 100
        )
        axis.set_xticks(range(len(ticks)), [span(n, None)[:-3] for n in ticks])
        axis.set(ylim=(-3, 103), xlabel="tokens", ylabel="exact, %")
        axis.set_title(ABOUT[kind].partition(":")[0], fontsize=9)
    if found["losses"]:
        axis = axes[len(kinds)]
        every = [f for f in found["losses"] if f["file"] == "all"]
        ticks = _lines(axis, every, styles, "from", "nll")
        stops = [*ticks[1:], None]
        axis.set_xticks(
            range(len(ticks)), [span(a, b) for a, b in zip(ticks, stops, strict=True)], fontsize=7
        )
        axis.set(xlabel="position", ylabel="nats a token")
        axis.set_title("loss by position, all files", fontsize=9)
    for axis in axes[parts[1] :]:
        axis.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    area.legend(handles, names, loc="outside lower center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
