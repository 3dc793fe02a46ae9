"""The figures as tables in a terminal."""

from collections.abc import Sequence

from ..benchmark.timing import WIDTH, Table
from .intervals import LEVEL
from .summary import Figure

ABOUT = {
    "needle": "needles: one fact of its kind, at several depths",
    "digits": "several keys, numbers: those of names, all written alike",
    "words": "several keys, words: those of names, all written alike",
    "values": "several values: all numbers of a name, in order",
    "variables": "variable tracking: all that hold a value, in order",
    "common": "common words: the three commonest of a list, in order",
}
SURE = f"{LEVEL:.0%} intervals"


def span(start: int, stop: int | None) -> str:
    """Positions for a reader, such as 1K-2K."""
    ends = [
        f"{n // 1024}K" if n % 1024 == 0 and n else str(n) for n in (start, stop) if n is not None
    ]
    return "-".join(ends) if stop else f"{ends[0]} on"


def _share(f: Figure) -> str:
    return f"{f['exact']:.0%} ({100 * f['exact_low']:.0f}-{100 * f['exact_high']:.0f})"


def _loss(f: Figure) -> str:
    return f"{f['nll']:.3f} ({f['nll_low']:.2f}-{f['nll_high']:.2f})"


WIDTHS = {_share: 14, _loss: 22}


def _grid(note: str, rows: list[tuple[str, dict]], columns: Sequence, head, cell):
    """Print a table of figures by row and column; columns that find no place go below."""
    first = max(len(name) for name, _ in rows) + 2
    width = WIDTHS[cell]
    fit = max(1, (WIDTH - first) // width)
    for at in range(0, len(columns), fit):
        some = columns[at : at + fit]
        table = Table(note, [("", first), *((head(c), width) for c in some)])
        for name, figures in rows:
            table.add(name, *(cell(figures[c]) if c in figures else "" for c in some))


def _rows(figures: Sequence[Figure], column: str) -> list[tuple[str, dict]]:
    """Figures of each model and way by a column's value."""
    found: dict[str, dict] = {}
    for f in figures:
        found.setdefault(f"{f['model']}, {f['way']}", {})[f[column]] = f
    return list(found.items())


def show(found: dict[str, list[Figure]]):
    """Print all tables."""
    tokens = lambda n: f"{n:,}"
    for kind in dict.fromkeys(f["kind"] for f in found["recall"]):
        some = [f for f in found["recall"] if f["kind"] == kind]
        lengths, asked = sorted({f["length"] for f in some}), min(f["questions"] for f in some)
        rows = _rows(some, "length")
        note = f"{ABOUT[kind]} (--kinds {kind}).\n"
        note += f"Exact answers by tokens of text, of {asked} or more, {SURE}."
        _grid(note, rows, lengths, tokens, _share)
        _grid("Loss of the answers, nats a token.", rows, lengths, tokens, _loss)
    for length in sorted({f["length"] for f in found["depths"]}):
        some = [f for f in found["depths"] if f["length"] == length]
        depths = sorted({f["depth"] for f in some})
        note = f"needle, {length:,} tokens. Exact answers by depth, 0 % the beginning of the text."
        _grid(note, _rows(some, "depth"), depths, lambda d: f"{d:.0%}", _share)
    files = dict.fromkeys(f["file"] for f in found["losses"])
    for file in [f for f in files if f != "all" or len(files) > 2]:  # all may be one
        some = [f for f in found["losses"] if f["file"] == file]
        starts = sorted({f["from"] for f in some})
        stops = dict(zip(starts, [*starts[1:], None], strict=True))
        note = (
            f"Loss by position in {'all files' if file == 'all' else file}, nats a token, {SURE}."
        )
        _grid(note, _rows(some, "from"), starts, lambda s, stops=stops: span(s, stops[s]), _loss)
