"""The released 4B's reference cases: their prompts, and how answers are compared."""

import mlx.core as mx
import pytest

from ksa_mlx.chat import notebook
from ksa_mlx.errors import KSAError
from ksa_mlx.report import reference
from ksa_mlx.report.stage import Options

from ._models import build, tokens


def encode(text):
    """A tokenizer of bytes."""
    return list(text.encode())


def test_the_cases():
    expected = reference.expected()
    assert len(expected) == 24
    assert all(len(ids) == (3 if name == "ids-1033" else 16) for name, ids in expected.items())
    assert expected["english"][0] != expected["chinese"][0]


@pytest.mark.parametrize("name", reference.expected())
def test_prompts_have_their_length(name):
    ids = reference.prompt(name, encode)
    if name in reference.TEXTS:
        assert ids == encode(reference.TEXTS[name])
    else:
        assert len(ids) == reference.tokens(name)


def test_prompts():
    assert reference.prompt("ids-1033", encode)[:2] == [100, 101]
    assert reference.prompt("ids-1033", encode)[-1] == 1132
    archive = bytes(reference.prompt("length-200", encode)).decode()
    assert archive.startswith(reference.ARCHIVE + "The archive")
    text = bytes(reference.prompt("retrieval-4096", encode)).decode()
    assert text.startswith(reference.FILLER) and text.endswith(reference.QUESTION)
    filler = 4096 - len(reference.NEEDLE) - len(reference.QUESTION)
    assert text.index(reference.NEEDLE) == filler // 4 and text.count("73921") == 1


@pytest.fixture
def model():
    return build(vocab_size=66)


def greedy(model, ids, n):
    for _ in range(n):
        ids = [*ids, model(mx.array([ids]))[0, -1].argmax().item()]
    return ids[-n:]


def test_compare(model, monkeypatch):
    """The prompt goes in pieces; the first difference, and how far the top two are apart there."""
    monkeypatch.setattr(reference, "STEP", 7)
    ids = tokens(20)[0].tolist()
    right = greedy(model, ids, 6)
    assert reference.compare(model, ids, right) == {"agree": 6, "of": 6, "counts": False}
    wrong = [*right[:4], (right[4] + 1) % 64, right[5]]
    found = reference.compare(model, ids, wrong)
    logits = sorted(model(mx.array([ids + right[:4]]))[0, -1].tolist())
    margin = logits[-1] - logits[-2]
    assert found == {"agree": 4, "of": 6, "got": right[4], "wanted": wrong[4],
                     "margin": pytest.approx(margin, abs=1e-4), "counts": margin > 0.5}  # fmt: skip


def test_lines():
    found = {
        "a": {"agree": 16, "of": 16, "counts": False, "seconds": 1.0},
        "b": {"agree": 3, "of": 16, "got": 7, "wanted": 8, "margin": 0.2, "counts": False},
        "c": {"agree": 3, "of": 16, "got": 7, "wanted": 8, "margin": 0.7, "counts": True},
        "d": {"skipped": "needs 40 GB"},
        "e": {"error": "took more than 100 s"},
    }
    lines = [reference.line(name, x) for name, x in found.items()]
    assert lines == [
        None,
        "b: 3 of 16 agree, then 7 for 8; top two 0.20 apart, too close to count",
        "c: 3 of 16 agree, then 7 for 8; top two 0.70 apart",
        "d: needs 40 GB",
        "e: took more than 100 s",
    ]
    assert reference.lines(found) == [
        "1 of 3 cases agree in all ids, 1 differ where it is too close to count, 1 differ; 2 were "
        "not run"
    ]
    assert reference.lines({"d": found["d"]}) == []


def test_a_stand_in_model(model, monkeypatch):
    """As far as memory and time allow it."""
    loaded = reference._Loaded(model, lambda text: [b % 64 for b in text.encode()], 1 << 20)
    monkeypatch.setattr(reference, "_loaded", lambda folder: loaded)
    monkeypatch.setattr(reference, "_speed", [])
    assert reference.cases(Options(True, 1 << 30)) == {}, "without --model there is nothing"
    cases = reference.cases(Options(True, 1 << 30, "folder"))
    sizes = [reference.tokens(name) for name in cases]
    assert sizes == sorted(sizes) and len(cases) == 24
    assert cases["length-17"]()["of"] == 16
    assert cases["length-1025"]()["seconds"] > 0 and reference._speed
    monkeypatch.setattr(reference, "_speed", [100.0])
    assert cases["length-16384"]() == {"skipped": "would take 164 s"}
    little = reference.cases(Options(True, 2 << 20, "folder"))
    assert little["length-130944"]()["skipped"].startswith("needs ")


def test_a_folder_is_loaded():
    """A model and a tokenizer as they are on disk; nothing of a chat around the text."""
    reference._loaded.cache_clear()
    model, encode, nbytes = reference._loaded(str(notebook.CHECKPOINT))
    words = encode("The capital of France is")
    assert reference.prompt("english", encode) == words and encode("") == []
    found = reference.compare(model, words, greedy(model, words, 2))
    assert found["agree"] == 2 and nbytes > 1 << 20


def test_other_models_are_refused():
    reference.check({**reference.RELEASED, "vocab_size": 1}, "x")
    with pytest.raises(KSAError, match=r"--model: x: found .*'hidden_size': 64.*expected the rel"):
        reference.check({"hidden_size": 64}, "x")
