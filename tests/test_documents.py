"""Documents in a turn: which words are paths, and what files are refused."""

import pytest

from ksa_mlx.chat.documents import document, named, path_of
from ksa_mlx.errors import SessionError


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\ufeffAlpha.", encoding="utf-8")
    (tmp_path / "two words.md").write_text("Beta.")
    (tmp_path / "docs").mkdir()
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty.txt").write_text(" \n")


@pytest.mark.parametrize(
    "text, documents, turn",
    [
        ("@a.txt What is it?", ["Alpha."], "What is it?"),
        ("What is this? @a.txt", ["Alpha."], "What is this?"),
        ("Is @a.txt, or @two\\ words.md, longer?", ["Alpha.", "Beta."],
         "Is a.txt, or two words.md, longer?"),
        ('Sum up @"two words.md".', ["Beta."], "Sum up two words.md."),
        ("@a.txt", ["Alpha."], ""),
        ("Read @a.txt.", ["Alpha."], "Read"),
        # What is no file is left alone.
        ("Hello @maria, a@a.txt", [], "Hello @maria, a@a.txt"),
        ("@property\n@docs.x\ndef f(): ...", [], "@property\n@docs.x\ndef f(): ..."),
        ("  no paths ", [], "  no paths "),
    ],
)  # fmt: skip
def test_paths_in_a_turn(text, documents, turn):
    found, rest = named(text)
    assert ([d.text for d in found], rest) == (documents, turn)


@pytest.mark.parametrize(
    "text, error",
    [
        ("See @none.txt", "@none.txt: no such file"),
        ("See @docs/none", "@docs/none: no such file"),
        ("See @./docs", "@./docs: found a folder"),
        ("See @latin.txt", "latin.txt is not UTF-8 at byte 3; expected text"),
        ("See @empty.txt", "empty.txt: found no text in it"),
    ],
)
def test_paths_that_are_refused(text, error):
    with pytest.raises(SessionError) as e:
        named(text)
    assert str(e.value) == error


def test_paths_as_they_are_typed(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for text in ("two words.md", "'two words.md'", '"two words.md"', "two\\ words.md", "~/a.txt"):
        assert path_of(text).is_file(), text
    assert document(path_of("a.txt")) == ("a.txt", "Alpha.")
    for name, error in (("docs", "Is a directory"), ("none", "No such"), ("a\0b", "null byte")):
        with pytest.raises(SessionError, match=error):
            document(path_of(name))
