"""README and docs: short, with links and commands that exist, and answers that the model gives."""

import contextlib
import importlib.util
import io
import re
import subprocess
from pathlib import Path

import pytest

from ksa_mlx import __main__ as commands
from ksa_mlx.stock.commands import names

from ._server import OURS, serving

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Tools of others that the texts tell to run with -m.
OTHERS = {"pip", "pytest", "venv", "build", "mlx_lm"}
PYTHON = r"(?:\.venv/bin/)?python3?(?:\.\d+)?"


def page(file: Path) -> str:
    return file.read_text(encoding="utf-8")


def commands_of(text: str) -> list[str]:
    """Lines of code blocks, and code within lines, that call Python; continued lines joined."""
    text = text.replace("\\\n", " ")
    code = re.findall(r"^(?:```\w*\n.*?^```| {4}.*?$)", text, re.S | re.M)
    lines = "\n".join(code).splitlines() + re.findall(r"`([^`\n]+)`", text)
    return [line.partition("  #")[0] for line in lines if re.search(rf"{PYTHON} \S", line)]


def test_readme_is_short():
    assert len(README.split()) <= 900
    assert [line for line in README.splitlines() if len(line) > 100] == []


def test_readme_sets_up_in_one_command():
    """One command sets up and runs, one sets up and tests; CI runs the second as it is."""
    run, test = re.findall(r"^python3 -m venv (?:.*\\\n)*.*$", README, re.M)
    assert run.endswith(".venv/bin/python generate.py")
    assert test.endswith(".venv/bin/python -m pytest -n auto")
    assert test in page(ROOT / ".ci/run")
    assert ".ci/run test" in page(ROOT / ".github/workflows/test.yml")


@pytest.mark.parametrize("file", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda f: f.name)
def test_links_lead_somewhere(file):
    links = re.findall(r"\]\(([^)\s]+)\)", page(file))
    local = [link.partition("#")[0] for link in links if "://" not in link]
    assert [link for link in local if link and not (file.parent / link).exists()] == []


@pytest.mark.parametrize("file", PAGES, ids=lambda f: f.name)
def test_commands_exist(file):
    """Modules, scripts and commands; and the flags of those that are ours."""
    for line in commands_of(page(file)):
        for module, rest in re.findall(rf"{PYTHON} -m ([\w.]+)([^|;&]*)", line):
            if module in OTHERS:
                continue
            assert importlib.util.find_spec(module), f"{line}: no module {module}"
            word = (rest.split() or [""])[0]
            if module == "ksa_mlx" and word != "COMMAND":
                assert word in {"", *commands.OURS, *names()}, f"{line}: no command {word!r}"
                check_flags(line, word, rest)
        for script, rest in re.findall(rf"{PYTHON} ([\w/]+\.py)([^|;&]*)", line):
            assert (ROOT / script).exists(), f"{line}: no file {script}"
            check_flags(line, script.removesuffix(".py"), rest)


def check_flags(line: str, command: str, rest: str):
    if command not in commands.OURS:
        return
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit):
        commands.main([command, "--help"])
    known = set(re.findall(r"--?[a-z][\w-]*", out.getvalue()))
    unknown = set(re.findall(r"(?<=\s)--?[a-z][\w-]*", rest)) - known
    assert not unknown, f"{line}: no flag {', '.join(sorted(unknown))}"


def test_nothing_says_that_it_is_on_pypi():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a checkout of git")
    said = []
    for name in filter(None, files.stdout.split("\0")):
        file = ROOT / name
        if file.suffix in (".md", ".py", ".toml", ".yml", ".json") and file.exists():
            said += [name] * bool(re.search(r"pip install [`'\"]?ksa[-_]mlx\b", page(file)))
    assert said == []


def blocks(*words: str) -> list[tuple[str, str]]:
    """The README's Python blocks with all these words, and what they say that they print."""
    found = re.findall(r"```python\n(.*?)```", README, re.S)
    found = [code for code in found if all(word in code for word in words)]
    return [(code, re.findall(r"^print\(.*#\s*(.*)$", code, re.M)[0]) for code in found]


@pytest.mark.slow
def test_readme_python(capsys, monkeypatch):
    """The Python of the README prints what it says."""
    monkeypatch.chdir(ROOT)
    ((code, said),) = blocks("ksa_mlx.load")
    exec(code, {})
    assert capsys.readouterr().out.strip() == said


@pytest.mark.slow
def test_readme_client(capsys, monkeypatch, tmp_path):
    """OpenAI's client gets from the README's server what the README says."""
    pytest.importorskip("openai")
    monkeypatch.chdir(ROOT)
    ((code, said),) = blocks("openai")
    (model,) = re.findall(r"-m ksa_mlx server --model (\S+)$", README, re.M)
    with serving(OURS, ROOT / model, tmp_path / "log") as server:
        assert "localhost:8080" in code
        exec(code.replace("localhost:8080", f"127.0.0.1:{server.port}"), {})
    assert capsys.readouterr().out.strip() == said
