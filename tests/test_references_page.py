"""References for people: printed, and as a page."""

import html
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from ksa_mlx.chat.notebook import QUESTIONS, notes
from ksa_mlx.chat.turns import references_shown
from ksa_mlx.errors import SessionError
from ksa_mlx.references.page import page, print_references, readable
from ksa_mlx.references.trace import trace_answer

ROOT = Path(__file__).resolve().parent.parent


def test_printed_references(loaded, asked, tmp_path):
    _, _, trace = asked
    file = tmp_path / "out.txt"
    with open(file, "w", encoding="utf-8") as f:
        print_references(trace, loaded[1], f, top=2)
    lines = file.read_text(encoding="utf-8").splitlines()
    # Of two references the second has 1 % of the weight: not worth showing.
    assert len(lines) == 2 and "\x1b" not in "".join(lines)
    top = trace.references(loaded[1], 1)[0]
    assert lines[0].startswith(f"[{top.weight:.0%}, ")
    assert re.sub(r"\s+", " ", f">>{top.text}<<") in lines[1]


def test_page_is_self_contained_and_escaped(loaded):
    model, tokenizer = loaded
    evil = (
        "<img src=\"https://example.com/x\"> </script><script>alert(1)</script> & '$page' \x1b[31m"
    )
    ids = tokenizer.encode(f"<|system|> The gate of Omar is 71. {evil} The car of Ida is red.")
    said = tokenizer.encode(" 71 </script>.")
    trace = trace_answer(model, ids, said, len(ids))
    text = page(trace, tokenizer, "a <model>")
    assert "<h1>a &lt;model&gt;</h1>" in text
    assert text.count("<script>") == text.count("</script>") == 1
    assert "<img" not in text and "\x1b" not in text and "&lt;img" in text
    assert not re.search(r'(?:src|href)="(?!#)', text) and "url(" not in text
    shown = re.search(r"<main.*?>(.*)</main>", text, re.DOTALL)[1]
    words = html.unescape(re.sub(r"<[^>]*>", "", shown))
    said = tokenizer.decode(ids).removeprefix("<|system|> ")
    assert words == said.replace("\x1b", "\ufffd")
    assert len(re.findall(r'<span id="c\d+"', shown)) == trace.chunks


def test_page_shows_the_question_and_no_template(loaded, asked):
    _, answer, trace = asked
    text = page(trace, loaded[1], "notebook")
    shown = {
        name: html.unescape(re.sub(r"<[^>]*>", "", re.search(pattern, text, re.DOTALL)[1]))
        for name, pattern in {
            "question": r'id="question".*?>(.*?)</div>',
            "answer": r'id="answer".*?>(.*?)</div>',
            "context": r"<main.*?>(.*?)</main>",
            "passages": r"<ol>(.*?)</ol>",
        }.items()
    }
    assert shown["question"] == QUESTIONS[0][0] and shown["answer"] == answer
    assert shown["context"].rstrip() == "\n".join(notes().splitlines()[:60])
    assert "<|" not in "".join(shown.values())


def test_what_a_template_adds_is_not_shown():
    marks = [SimpleNamespace(content=x, special=True) for x in ("<|im_start|>", "<|im_end|>")]
    word = SimpleNamespace(content="<tool>", special=False)
    tokenizer = SimpleNamespace(added_tokens_decoder=dict(enumerate([*marks, word])))
    turn = "<|im_start|>user\nIs <tool> a user?\n  indented<|im_end|>\n<|im_start|>assis"
    parts = [turn[:7], turn[7:20], turn[20:], "tant\n Yes."]
    assert readable(tokenizer, parts) == ["", "Is ", "<tool> a user?\n  indented\n", "Yes."]
    assert readable(SimpleNamespace(added_tokens_decoder={}), [" a\n", " b"]) == [" a\n", "b"]
    assert readable(SimpleNamespace(added_tokens_decoder={}), ["a:\n", " b\nc"]) == [
        "a:\n",
        " b\nc",
    ]


def test_page_is_written_whole_or_not_at_all(loaded, asked, tmp_path, monkeypatch):
    _, _, trace = asked
    file = tmp_path / "page.html"
    show = references_shown(loaded[1], "notebook", file, show=False)
    show(trace)
    before = file.read_text(encoding="utf-8")
    assert before.startswith("<!DOCTYPE html>")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(SessionError, match=r"page.html: No space left"):
        show(trace)
    assert file.read_text(encoding="utf-8") == before and len(list(tmp_path.iterdir())) == 1
