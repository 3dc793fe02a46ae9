"""The house: who may import whom, and how large a file may be.

Imports are read from the sources, those inside functions counted.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "ksa_mlx"

# Floors from below: a module imports from its own floor and those below it. A name stands for a
# module, or for a folder with all that is in it.
FLOORS = [
    ["errors", "files", "interrupts"],
    ["pattern", "rope"],
    ["config"],
    ["naive"],
    ["cache"],
    ["attention"],
    ["weights"],
    ["distributed"],
    ["model"],
    ["memory"],
    ["checkpoint"],
    ["stock", "benchmark"],
    ["recall"],
    ["references", "report"],
    ["retrofit"],
    ["__init__"],  # the package's public names
    ["chat"],
    ["convert", "generate"],
    ["__main__"],
]
# What a function may import: extras, which a plain install lacks.
OPTIONAL = {"torch", "matplotlib", "datasets", "lm_eval"}
LINES = 400
# Neighbours of the package in the repository, and what each may import of the others.
NEIGHBOURS = {
    PACKAGE: set(),
    "training": {PACKAGE},
    "tools": {PACKAGE},
    "tests": {PACKAGE, "training"},
}

Import = tuple[str, int, bool]  # module, line, inside a function


def name_of(file: Path, root: Path) -> str:
    """The dotted name of a module, of a package for its __init__.py."""
    parts = file.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules(root: Path, folder: str) -> dict[str, Path]:
    return {name_of(file, root): file for file in sorted((root / folder).rglob("*.py"))}


@functools.lru_cache(None)
def imports(file: Path, root: Path) -> list[Import]:
    """What a file imports, as absolute dotted names; `from x import y` gives x.y."""
    name = name_of(file, root)
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]

    def visit(node: ast.AST, inside: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    up = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*up, *([child.module] if child.module else [])])
                for alias in child.names:
                    yield f"{base}.{alias.name}", child.lineno, inside
            elif isinstance(child, ast.Call) and ast.unparse(child.func) in (
                "importlib.import_module", "import_module", "__import__",
            ):  # fmt: skip
                if child.args and isinstance(child.args[0], ast.Constant):
                    yield child.args[0].value, child.lineno, inside
                yield from visit(child, inside)
            else:
                function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                yield from visit(child, inside or function)

    return list(visit(ast.parse(file.read_text(encoding="utf-8")), False))


def arrows(root: Path) -> dict[str, set[str]]:
    """Which modules of the package each of them imports. `from . import x` is an arrow to x."""
    known = modules(root, PACKAGE)
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        graph[name] = set()
        for target, _, _ in imports(file, root):
            while target and target not in known:
                target = target.rpartition(".")[0]
            if target and target != name:
                graph[name].add(target)
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or not."""

    def reach(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        return seen

    reached = {name: reach(name) for name in graph}
    found = {
        tuple(sorted(b for b in reached[a] if a in reached[b])) for a in graph if a in reached[a]
    }
    return [list(circle) for circle in sorted(found)]


def room(module: str) -> str:
    """The module or folder in FLOORS that a dotted name belongs to."""
    return "__init__" if module == PACKAGE else module.split(".")[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """Arrows between rooms that do not run down, and rooms that stand on no floor."""
    floor = {name: i for i, names in enumerate(FLOORS) for name in names}
    found = [f"{a} stands on no floor" for a in graph if room(a) not in floor]
    for a, targets in graph.items():
        found += [
            f"{a} -> {b}"
            for b in targets
            if room(a) != room(b) and floor.get(room(b), 99) >= floor.get(room(a), 99)
        ]
    return sorted(found)


def hidden(root: Path, folder: str = PACKAGE) -> list[str]:
    """Imports inside functions of what is not optional."""
    return [
        f"{name}, line {line}: {target}"
        for name, file in modules(root, folder).items()
        for target, line, inside in imports(file, root)
        if inside and target.partition(".")[0] not in OPTIONAL
    ]


def trespasses(root: Path) -> list[str]:
    """Imports between the package, its training, its tools and its tests that are not allowed."""
    return [
        f"{name}, line {line}: {target}"
        for folder, allowed in NEIGHBOURS.items()
        for name, file in modules(root, folder).items()
        for target, line, _ in imports(file, root)
        if (top := target.partition(".")[0]) in NEIGHBOURS and top not in allowed | {folder}
    ]


def long_files(root: Path) -> list[str]:
    files = [f for folder in NEIGHBOURS for f in modules(root, folder).values()]
    sizes = {f: len(f.read_text().splitlines()) for f in files}
    return [f"{f.relative_to(root)}: {n} lines" for f, n in sizes.items() if n > LINES]


def none(found: list[str], rule: str):
    assert not found, f"{rule}:\n  " + "\n  ".join(found)


def test_no_circles():
    found = [" <-> ".join(circle) for circle in circles(arrows(ROOT))]
    none(found, "modules that import each other in a circle")


def test_arrows_run_down():
    none(upward(arrows(ROOT)), "imports that do not run down (FLOORS)")


def test_functions_import_optional_packages_only():
    none(hidden(ROOT), f"imports inside functions of other packages than {sorted(OPTIONAL)}")


def test_package_tools_and_tests_are_apart():
    none(trespasses(ROOT), "imports between folders that may not know each other (NEIGHBOURS)")


def test_paths_are_not_bent():
    """Nobody reaches a neighbour by editing sys.path."""
    found = [
        f"{name}: {line.strip()}"
        for folder in NEIGHBOURS
        for name, file in modules(ROOT, folder).items()
        for line in file.read_text(encoding="utf-8").splitlines()
        if line.lstrip().startswith("sys.path")
    ]
    none(found, "edits of sys.path")


def test_files_are_short():
    none(long_files(ROOT), f"files of more than {LINES} lines")


# The reader of imports itself


@pytest.fixture
def house(tmp_path):
    """Write files, by their paths, beside an empty package. Returns the root."""

    def write(files):
        for path, source in {f"{PACKAGE}/__init__.py": "", **files}.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(source)
        return tmp_path

    return write


def test_imports_of_every_form_are_read(house):
    root = house(
        {
            "ksa_mlx/cache/__init__.py": "from . import rolling",
            "ksa_mlx/cache/rolling.py": "from ..errors import A\nfrom .. import naive, config",
            "ksa_mlx/errors.py": "import torch.nn as nn",
            "ksa_mlx/naive.py": "import ksa_mlx.config",
            "ksa_mlx/config.py": "def f():\n  if 1:\n    import torch\n    from .cache.rolling import b",
            "ksa_mlx/model.py": "import importlib\nimportlib.import_module('ksa_mlx.naive')",
        }
    )
    assert {a.removeprefix("ksa_mlx."): bs for a, bs in arrows(root).items()} == {
        "ksa_mlx": set(),
        "cache": {"ksa_mlx.cache.rolling"},
        "cache.rolling": {"ksa_mlx.errors", "ksa_mlx.naive", "ksa_mlx.config"},
        "errors": set(),
        "naive": {"ksa_mlx.config"},
        "config": {"ksa_mlx.cache.rolling"},
        "model": {"ksa_mlx.naive"},
    }
    assert circles(arrows(root)) == [["ksa_mlx.cache.rolling", "ksa_mlx.config", "ksa_mlx.naive"]]
    assert hidden(root) == ["ksa_mlx.config, line 4: ksa_mlx.cache.rolling.b"]
    assert upward(arrows(root)) == ["ksa_mlx.config -> ksa_mlx.cache.rolling"]


def test_arrows_up_and_sideways_are_found(house):
    root = house(
        {
            "ksa_mlx/cache/a.py": "from . import b\nfrom ..model import M\nfrom .. import __version__",
            "ksa_mlx/cache/b.py": "from ..nowhere import n",
            "ksa_mlx/model.py": "",
            "ksa_mlx/nowhere.py": "",
            "ksa_mlx/convert.py": "from .generate import g\nfrom . import __version__",
            "ksa_mlx/generate.py": "from .cache import a",
        }
    )
    assert upward(arrows(root)) == [
        "ksa_mlx.cache.a -> ksa_mlx",
        "ksa_mlx.cache.a -> ksa_mlx.model",
        "ksa_mlx.cache.b -> ksa_mlx.nowhere",
        "ksa_mlx.convert -> ksa_mlx.generate",
        "ksa_mlx.nowhere stands on no floor",
    ]


def test_trespasses_and_long_files_are_found(house):
    root = house(
        {
            "ksa_mlx/model.py": "x = 1\n" * 401,
            "ksa_mlx/config.py": "x = 1\n" * 400 + "",
            "ksa_mlx/benchmark/kernels.py": "def f():\n    import tests.metal_cpu",
            "tools/a.py": "from tests._server import serving",
            "tests/test_a.py": "import tools.a\nimport training.b\nfrom . import _models",
            "training/b.py": "import ksa_mlx\nimport tools",
        }
    )
    assert trespasses(root) == [
        "ksa_mlx.benchmark.kernels, line 2: tests.metal_cpu",
        "training.b, line 2: tools",
        "tools.a, line 1: tests._server.serving",
        "tests.test_a, line 1: tools.a",
    ]
    assert long_files(root) == ["ksa_mlx/model.py: 401 lines"]
