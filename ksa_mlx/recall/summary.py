"""Figures of rows: shares of exact answers and losses, each with its interval."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from .intervals import LEVEL, bootstrap, wilson
from .store import Row

Figure = dict[str, Any]


def summary(rows: Iterable[Row]) -> dict[str, list[Figure]]:
    """What has been found, as --json has it.

    "recall": of each model, way, kind and length; "depths": likewise, needles of each depth;
    "losses": of each model, way and file, and of all files ("all"), by the first position of a
    bucket. Shares have Wilson's interval, losses the bootstrap's over texts or blocks of tokens.
    """
    rows = list(rows)
    found: dict[str, list[Figure]] = {"recall": [], "depths": [], "losses": []}
    for (model, way, kind, length), some in _groups(rows, "model", "way", "part", "length").items():
        if kind == "losses":
            continue
        about = {"model": model, "way": way, "kind": kind, "length": length}
        exact = [x for r in some for x in r["exact"]]
        # Questions of one text are drawn together.
        nll = np.array([np.mean(r["nll"]) for r in some])
        mean = float(np.mean([x for r in some for x in r["nll"]]))
        found["recall"].append(about | _share(exact) | _mean(mean, nll))
        if kind == "needle":
            for depth in some[0]["depth"]:
                at = [
                    x
                    for r in some
                    for d, x in zip(r["depth"], r["exact"], strict=True)
                    if d == depth
                ]
                found["depths"].append(about | {"depth": depth} | _share(at))
    for (model, way), some in _groups(rows, "model", "way").items():
        files = [r for r in some if r["part"] == "losses"]
        for name, those in (*((r["file"], [r]) for r in files), ("all", files)):
            for start in sorted({int(s) for r in those for s in r["blocks"]}):
                blocks = [x for r in those for x in r["blocks"].get(str(start), [])]
                about = {"model": model, "way": way, "file": name, "from": start}
                found["losses"].append(about | _mean(float(np.mean(blocks)), np.array(blocks)))
    return found


def _groups(rows: list[Row], *names: str) -> dict[tuple, list[Row]]:
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row.get(n) for n in names), []).append(row)
    return found


def _share(exact: list[bool]) -> Figure:
    low, high = wilson(sum(exact), len(exact))
    share = sum(exact) / len(exact)
    return {"questions": len(exact), "exact": share, "exact_low": low, "exact_high": high}


def _mean(mean: float, drawn: np.ndarray) -> Figure:
    low, high = bootstrap(drawn)
    return {"nll": mean, "nll_low": low, "nll_high": high, "level": LEVEL}
