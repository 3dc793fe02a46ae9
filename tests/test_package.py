"""What is installed: dependencies, and the wheel alone in an empty environment."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import ksa_mlx

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def name_of(requirement: str) -> str:
    """The name of a requirement, as a module (markdown-it-py has markdown_it)."""
    name = re.match(r"[A-Za-z0-9_-]+", requirement).group().lower().replace("-", "_")
    return name.removesuffix("_py")


def test_every_import_is_declared():
    modules = set()
    for file in (ROOT / "ksa_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {a.name.partition(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    extras = PROJECT["optional-dependencies"]
    requirements = [*PROJECT["dependencies"], *extras["torch"], *extras["plot"]]
    known = {name_of(r) for r in requirements} | set(sys.stdlib_module_names) | {"ksa_mlx"}
    assert {"mlx", "mlx_lm", "numpy"} <= modules
    assert modules <= known


def test_mlx_of_each_platform():
    """MLX on Metal on a Mac, with its CPU backend on Linux: the same versions, and bounded."""
    mlx = [r for r in PROJECT["dependencies"] if name_of(r) == "mlx"]
    found = {re.search(r"sys_platform == '(\w+)'", r).group(1): r for r in mlx}
    assert set(found) == {"darwin", "linux"}
    assert found["linux"].startswith("mlx[cpu]") and not found["darwin"].startswith("mlx[")
    versions = {re.search(r">=[\d.]+,<[\d.]+", r).group() for r in mlx}
    assert len(versions) == 1


def test_python_and_mlx_lm_are_those_that_are_installed():
    """The promised versions hold for what the tests run on, and for what they do not name."""
    at_least = tuple(map(int, re.search(r">=(\d+)\.(\d+)", PROJECT["requires-python"]).groups()))
    assert sys.version_info[:2] >= at_least
    ours = metadata.metadata("mlx-lm").get("Requires-Python")
    theirs = re.search(r">=(\d+)\.(\d+)", ours or "")
    assert theirs is None or at_least >= tuple(map(int, theirs.groups()))


def python_of(environment: Path) -> str:
    return str(environment / "bin" / "python")


@pytest.mark.slow
def test_wheel_alone_in_an_empty_environment(tmp_path):
    def run(*command, **kwargs):
        r = subprocess.run(
            command, capture_output=True, text=True, timeout=600, cwd=tmp_path, **kwargs
        )
        assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
        return r.stdout

    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT))
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for file in (*(ROOT / "metal").iterdir(), *(ROOT / "ksa_mlx" / "notebook").iterdir()):
        assert f"ksa_mlx/{file.parent.name}/{file.name}" in names
    assert "ksa_mlx/py.typed" in names
    assert not any(name.startswith(("tests/", "tools/", "training/", "metal/")) for name in names)

    venv.create(tmp_path / "env", with_pip=True)
    python = python_of(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", str(wheel))
    # No network, no home, nothing of this environment.
    bare = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH",)}
    bare |= {"HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    out = run(python, "-m", "ksa_mlx", "generate", stdin=subprocess.DEVNULL, env=bare)
    assert len(re.findall(r"Answer: +\S", out)) == 3 and "full attention would hold" in out
    script = str(tmp_path / "env" / "bin" / "ksa-mlx")
    source = str(ROOT / "ksa_mlx" / "notebook")
    assert "Wrote" in run(
        script, "convert", "--hf-path", source, "--mlx-path", "converted", "-q", env=bare
    )
    ask = ("--model", "converted", "--prompt", "What is the badge of Olga?", "--max-tokens", "4")
    assert run(python, "-m", "ksa_mlx", "generate", *ask, env=bare).strip()
    code = "import ksa_mlx.attention.metal as m; print(len(m.source('forms.h')), m.__file__)"
    size, where = run(python, "-c", code, env=bare).split()
    assert int(size) > 100 and where.startswith(str(tmp_path))


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ksa_mlx.__version__)
