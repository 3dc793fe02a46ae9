"""What is installed: dependencies, the wheel alone in an empty environment, the README."""

import ast
import os
import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

import ksa_mlx
from ksa_mlx.chat import notebook

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
README = (ROOT / "README.md").read_text()


def declared():
    """The names of all dependencies and extras, as modules."""
    lists = re.findall(r"(?:dependencies|torch|plot|test) = \[(.*?)\n?\]$", PROJECT, re.S | re.M)
    names = re.findall(r'"([A-Za-z0-9_-]+)', " ".join(lists))
    return {name.lower().replace("-", "_") for name in names}


def test_every_import_is_declared():
    modules = set()
    for file in (ROOT / "ksa_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                modules |= {a.name.partition(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                modules.add(node.module.partition(".")[0])
    known = declared() | set(sys.stdlib_module_names) | {"ksa_mlx"}
    assert {"mlx", "mlx_lm", "numpy"} <= modules
    assert modules <= known


def test_dependencies_by_platform():
    assert "\"mlx>=0.32.2,<0.33; sys_platform == 'darwin'\"" in PROJECT
    assert "\"mlx[cpu]>=0.32.2,<0.33; sys_platform == 'linux'\"" in PROJECT
    assert 'requires-python = ">=3.11"' in PROJECT


def test_readme_commands():
    """One command sets up and runs, one sets up and tests; CI runs the second as it is."""
    commands = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert len(commands) == 2
    run, test = commands
    assert run.endswith("python generate.py") and test.endswith("-m pytest")
    assert test in (ROOT / ".ci/run").read_text()
    assert test in (ROOT / ".github/workflows/test.yml").read_text()


def test_readme_python(capsys):
    """The Python of the README runs, with a converted checkpoint in the place of the 4B."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert "KSA-4B" in code
    exec(code.replace("KSA-4B", str(notebook.CHECKPOINT)), {})
    assert capsys.readouterr().out.strip()


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
    code = "import ksa_mlx.attention.metal as m; print(len(m.source('decode.h')), m.__file__)"
    size, where = run(python, "-c", code, env=bare).split()
    assert int(size) > 100 and where.startswith(str(tmp_path))


def test_version():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ksa_mlx.__version__)
