"""The feature table: one row a `@pytest.mark.feature(name, entry_point, verdict)`.

    python -m tests.features     # writes the table in docs/mlx-lm.md

A row appears because a test bears it, so a verdict that stops being true fails in the test run.
Rows come in the order of ORDER, then of the files; the table stands between the lines
`<!-- features -->` and `<!-- /features -->`.
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "mlx-lm.md"
MARKS = re.compile(r"(?<=<!-- features -->\n).*?(?=<!-- /features -->)", re.S)

# How a reader looks for things; other files follow by name.
ORDER = (
    "test_load.py",
    "test_prompt_cache.py",
    "test_server.py",
    "test_server_requests.py",
    "test_server_openai.py",
    "test_batch.py",
    "test_quantized_cache.py",
    "test_speculative.py",
    "test_finetune.py",
    "test_distributed.py",
    "test_mlx_lm.py",
    "test_stock.py",
)

Row = tuple[str, str, str]


def _is_feature(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.feature"


def rows_of(file: Path) -> list[Row]:
    """The rows that a test file's functions and classes bear. Raises ValueError for a bad one."""
    rows = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        for mark in filter(_is_feature, getattr(node, "decorator_list", ())):
            try:
                row = tuple(ast.literal_eval(a) for a in mark.args)
            except ValueError:
                row = ()
            if mark.keywords or len(row) != 3 or not all(isinstance(c, str) and c for c in row):
                raise ValueError(
                    f"{file.name}, line {mark.lineno}: found {ast.unparse(mark)}, expected "
                    "pytest.mark.feature(name, entry_point, verdict) of three plain strings"
                )
            rows.append((mark.lineno, row))
    return [row for _, row in sorted(rows)]


def rows() -> list[Row]:
    """All rows, in order. Raises ValueError if two have one name."""

    def place(file: Path):
        return ORDER.index(file.name) if file.name in ORDER else len(ORDER), file.name

    files = sorted((ROOT / "tests").glob("test_*.py"), key=place)
    found = [row for file in files for row in rows_of(file)]
    names = [name for name, _, _ in found]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"feature rows: found {sorted(twice)} more than once")
    return found


def table() -> str:
    lines = ["| feature | entry point | state |", "|---|---|---|"]
    for row in rows():
        cells = " | ".join(cell.replace("|", r"\|") for cell in row)
        lines.append(f"| {cells} |")
    return "\n".join(lines) + "\n"


def written() -> str:
    """The table as the page has it. Raises ValueError for a page without a place for it."""
    found = MARKS.search(PAGE.read_text(encoding="utf-8"))
    if found is None:
        raise ValueError(f"{PAGE.name}: found no <!-- features --> ... <!-- /features -->")
    return found.group()


def main():
    written()
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(MARKS.sub(lambda _: table(), page), encoding="utf-8")


if __name__ == "__main__":
    main()
