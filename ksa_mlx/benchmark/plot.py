"""A figure of decode time and KV bytes against context."""

import importlib.util
from typing import Any

from ..errors import KSAError

KINDS = (".png", ".pdf", ".svg")
# The limit is drawn last and thin: it lies on KSA's line where nothing is lost.
LINES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3 (full attention)", {"color": "#b23a48", "marker": "o", "linewidth": 1.8}),
    "ksa": ("KSA", {"color": "#0b6e4f", "marker": "s", "linewidth": 3.5}),
    "limit": ("Qwen3 on the keys that KSA reads", {"color": "black", "linestyle": ":"}),
}


def check(path: str):
    """Raises KSAError if no figure can be made there."""
    if not path.endswith(KINDS):
        raise KSAError(f"--plot: found {path}, expected a file name in {', '.join(KINDS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise KSAError("--plot: needs matplotlib: pip install -e '.[plot]'")


def plot(results: dict[str, Any], path: str):
    """Write the figure of the results' "decode" rows. Needs matplotlib (extra `plot`)."""
    import matplotlib  # noqa: PLC0415

    matplotlib.use("Agg")
    from matplotlib import pyplot  # noqa: PLC0415

    rows = sorted(results["decode"], key=lambda r: r["context"])
    contexts = [r["context"] for r in rows]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for name, (label, style) in LINES.items():
        left.plot(contexts, [r["median_ms"][name] for r in rows], label=label, **style)
        if name != "limit":
            held = [r["kv_bytes"][name] / 1e6 for r in rows]
            right.plot(contexts, held, label=label, **style)
    left.set(ylabel="ms a token, median", title="One decode step")
    right.set(ylabel="MB", title="KV cache")
    # Linear axes, on which linear growth is a straight line; labels where they have room.
    ticks = [n for n in contexts if n >= contexts[-1] / 10]
    for axis in (left, right):
        axis.set(xlabel="tokens read before", xlim=(0, None), ylim=(0, None))
        axis.set_xticks(ticks, [f"{n // 1024}K" if n % 1024 == 0 else str(n) for n in ticks])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(
        "KSA against Qwen3 of the same shape and weights: {shape}, {dtype}, {where}".format(
            **results
        )
    )
    figure.savefig(path, dpi=120)
