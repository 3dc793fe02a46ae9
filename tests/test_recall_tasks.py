"""Texts with facts, their questions, what a model answers, and how sure that is."""

import re
from itertools import chain

import mlx.core as mx
import numpy as np
import pytest

from ksa_mlx import naive
from ksa_mlx.errors import KSAError
from ksa_mlx.memory.caches import Quantised
from ksa_mlx.recall import intervals, kinds, splits
from ksa_mlx.recall.filler import Unit, spread
from ksa_mlx.recall.prompts import Prompts, shared
from ksa_mlx.recall.score import Cached, Scores, judged, score
from ksa_mlx.recall.tasks import DEPTHS, KINDS, Question, Texts, questions

from . import _models

BOOK = "".join(f"Line {i} of a book: it goes on, and on.\n" for i in range(2000))


@pytest.fixture(scope="module")
def tokenizer(loaded):
    return loaded[1]


def decoded(tokenizer, q: Question, part: int = 0) -> str:
    start, stop = q.answers[part]
    return tokenizer.decode(q.ids[start:stop]).strip()


# Questions


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chat", [None, "sentence", "bare"])
@pytest.mark.parametrize("split", ["test", "train"])
def test_every_kind_fills_the_length(tokenizer, kind, chat, split):
    """Texts are nearly as long as asked for, never longer, and end with the answer."""
    for length in (400, 1024):
        found = questions(kind, length, 9, 3, tokenizer, split, chat=chat)
        assert len(found) == 9
        for q in found:
            assert length - 60 < len(q.ids) <= length
            assert [q.answers[0][1]] == [len(q.ids)]
            assert 0 < q.shared < q.answers[0][0]


def test_same_arguments_same_questions(tokenizer):
    """In every process: these are written down here. And the first of many are the few."""
    found = questions("digits", 300, 12, 5, tokenizer)
    assert found[:5] == questions("digits", 300, 5, 5, tokenizer)
    assert found != questions("digits", 300, 12, 6, tokenizer)
    assert [decoded(tokenizer, q) for q in found[:4]] == "7440 6158 6564 4956".split()


def test_answers_are_in_the_text(tokenizer):
    """Each kind's answer is what its facts say."""
    for kind in ("needle", "digits", "words"):
        for q in questions(kind, 512, 10, 1, tokenizer):
            text, answer = tokenizer.decode(q.ids[: q.answers[0][0]]), decoded(tokenizer, q)
            asked = text[text.rindex("\n") + 1 :].strip()
            assert f"{asked} {answer}.\n" in text
    for q in questions("values", 512, 6, 1, tokenizer):
        text, answer = tokenizer.decode(q.ids[: q.answers[0][0]]), decoded(tokenizer, q)
        name = re.search(r"The numbers of (\w+), in the order of the text, are$", text.strip())[1]
        assert re.findall(f"numbers of {name} is (\\d+)", text) == re.findall(r"\d+", answer)
    for q in questions("variables", 512, 6, 1, tokenizer):
        text, answer = tokenizer.decode(q.ids[: q.answers[0][0]]), decoded(tokenizer, q)
        value, holding = re.search(r"equal to (\d+) are$", text.strip())[1], []
        for name, said in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", text):
            if said == value or said in holding:
                holding.append(name)
        assert len(holding) == kinds.CHAIN and holding == re.findall(r"[A-Z]{3}", answer)
    for q in questions("common", 512, 3, 1, tokenizer):
        listed = tokenizer.decode(q.ids[: q.answers[0][0]]).partition(".")[0].split(": ")[1]
        every = listed.split(", ")
        ranked = sorted(set(every), key=every.count, reverse=True)
        assert ranked[:3] == re.findall(
            r"\w+(?=,|$| and)", decoded(tokenizer, q).replace(" and ", ", ")
        )
        counts = [every.count(w) for w in ranked[:4]]
        assert counts == sorted(set(counts), reverse=True)


def test_depths(tokenizer):
    """A needle lies where it should, and its distance is counted in tokens."""
    found = questions("needle", 1000, len(DEPTHS), 1, tokenizer)
    assert [q.depth for q in found] == list(DEPTHS)
    for q in found:
        place = q.answers[0][0] - q.distance
        assert abs(place / q.shared - q.depth) < 0.04
        fact = tokenizer.decode(q.ids[place : place + 14])
        assert decoded(tokenizer, q) in fact
    assert found[0].distance == found[0].answers[0][0]
    some = questions("digits", 1000, 8, 1, tokenizer)
    assert sorted(int(8 * q.depth) for q in some) == list(range(8))


def test_questions_of_a_text_share_it(tokenizer):
    found = questions("digits", 300, 9, 1, tokenizer)
    assert [q.text for q in found] == [0] * 8 + [1]
    assert shared([q.ids for q in found[:8]]) >= found[0].shared > 270
    assert found[7].ids[: found[7].shared] == found[0].ids[: found[0].shared]


def test_several_in_a_row(tokenizer):
    """Training asks for all facts of a text at once."""
    (q,) = questions("digits", 400, 1, 1, tokenizer, "train", asked=8)
    assert len(q.answers) == 8 and q.answers[-1][1] == len(q.ids) <= 400
    text = tokenizer.decode(q.ids)
    for i in range(8):
        assert (
            re.fullmatch(r"\d{4}", answer := decoded(tokenizer, q, i)) and text.count(answer) == 2
        )
    with pytest.raises(KSAError, match="asked: found 2, expected 1 in a chat"):
        questions("digits", 400, 1, 1, tokenizer, asked=2, chat="bare")


def test_given_filler(tokenizer):
    """As text or as ids; facts stand in lines of their own, and other seeds read other parts."""
    q = questions("digits", 600, 1, 1, tokenizer, filler=BOOK)[0]
    lines = tokenizer.decode(q.ids).split("\n")
    assert sum(bool(re.fullmatch(r"The \w+ of \w+ is \d{4}\.", x)) for x in lines) == 8
    assert sum("of a book" in x for x in lines) > 10
    ids = tokenizer.encode(BOOK[:3000], add_special_tokens=False)
    other = questions("digits", 600, 1, 2, tokenizer, filler=ids)[0]
    assert other.ids != q.ids and "of a book" in tokenizer.decode(other.ids)
    # A text that is too short begins again.
    short = questions("digits", 600, 1, 1, tokenizer, filler="Only this.")[0]
    assert len(short.ids) > 540 and tokenizer.decode(short.ids).count("Only this.") > 20


def test_splits_share_nothing():
    """No pattern, name, word, sentence part or letter of a variable."""

    def lines(split):
        patterns = [*split.digits, *split.word, split.values, split.holding, split.counted]
        parts = chain.from_iterable((p.fact, p.question, p.begin) for p in patterns)
        return {*parts, split.assign, split.copy, split.listed} - {""}

    test, train = splits.SPLITS["test"], splits.SPLITS["train"]
    assert not lines(test) & lines(train)
    for name in ("names", "words", "attributes", "word_attributes", "letters"):
        assert not set(getattr(test, name)) & set(getattr(train, name)), name
    for name in ("subjects", "verbs", "circumstances"):
        assert not set(getattr(test, name)) & set(getattr(train, name)), name
    for split in (test, train):
        for name in ("names", "words", "subjects", "verbs", "circumstances"):
            assert len(set(getattr(split, name))) == len(getattr(split, name)), name
        assert len(split.words) >= kinds.OTHERS + len(kinds.COMMON)


def test_beginning(tokenizer):
    """Every text begins with what the tokenizer puts there, or with what is given."""

    class Beginning:
        chat_template = None

        def encode(self, text, add_special_tokens=True):
            return [1] * add_special_tokens + tokenizer.encode(text, add_special_tokens=False)

        def decode(self, ids):
            return tokenizer.decode(ids)

    assert Prompts(tokenizer).beginning == [] and Prompts(Beginning()).beginning == [1]
    for beginning, expected in ((None, [1]), ([7, 8, 9], [7, 8, 9])):
        q = questions("digits", 300, 1, 1, Beginning(), beginning=beginning)[0]
        assert q.ids[: len(expected)] == expected and q.ids[len(expected)] > 2
        assert len(q.ids) <= 300


def test_refused(tokenizer):
    for argument, line in (
        ({"kind": "novels"}, "kind: found 'novels', expected one of needle, "),
        ({"split": "dev"}, "split: found 'dev', expected one of test, train"),
        ({"facts": 99}, r"facts: found 99, expected 1 to \d+"),
        ({"depths": [1.5]}, r"depths: found \[1.5\], expected 1 to \d+ numbers in \[0, 1\]"),
        ({"length": 20}, "digits: found a length of 20 tokens, expected at least 1"),
        ({"asked": 0}, "asked: found 0"),
    ):
        given = {"kind": "digits", "length": 200, "count": 1, "seed": 1, **argument}
        with pytest.raises(KSAError, match=line):
            questions(tokenizer=tokenizer, **given)
    with pytest.raises(KSAError) as refused:
        questions("digits", 20, 1, 1, tokenizer)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    assert max(len(q.ids) for q in questions("digits", least, 8, 1, tokenizer)) == least
    with pytest.raises(KSAError, match="--chat: the model's tokenizer has no chat template"):
        Prompts(object(), "bare")


def test_spread():
    units = [Unit("a b\n", 2), Unit("c ", 1), Unit("d\n", 1)]
    assert spread(units, [(0, "X"), (0.7, "Y"), (1, "Z"), (1, "W")]) == "X\na b\nc \nY\nd\nZ\nW\n"
    assert spread([], [(0.5, "X")]) == "X\n"


# Scores


def test_scores_of_known_answers():
    """A forward that says 1, 2, 3, ... after each other, surely."""

    def forward(ids, start, stop):
        assert ids.shape[0] == 1
        sure = mx.full((stop - start, 10), -5.0)
        following = (ids[0, start:stop] + 1) % 10
        return mx.put_along_axis(sure, following[:, None], mx.array(5.0), axis=1)

    def question(ids, *answers):
        return Question("digits", 0, ids, list(answers), 1, 0.5, 3)

    asked = [
        question([0, 1, 2, 3], (2, 4)),
        question([0, 1, 2, 4], (2, 4)),
        question([0, 1, 3, 4, 9, 0, 1], (1, 2), (5, 7)),
        question([0, 1, 3, 4], (2, 4)),
    ]
    ticks = []
    exact, nll = score(forward, asked, lambda: ticks.append(1))
    assert exact.tolist() == [True, False, True, True, False] and len(ticks) == 4
    right = np.log(np.exp(5) + 9 * np.exp(-5)) - 5
    assert np.allclose(nll, [right, right + 5, right, right, right + 5], atol=1e-5)


def test_judged_agrees_with_numpy():
    logits = mx.random.normal((5, 7), key=mx.random.key(1))
    x = np.array(logits, np.float64)
    right, losses = judged(logits.astype(mx.float32), [3, 1, 0, 6, 2])
    log = np.log(np.exp(x).sum(1))
    assert np.allclose(losses, log - x[range(5), [3, 1, 0, 6, 2]], atol=1e-5)
    assert right.tolist() == (x.argmax(1) == [3, 1, 0, 6, 2]).tolist()


class Plain:
    """A forward by the definition, and no cache."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, start, stop):
        return naive.forward(self.model, ids)[0, start:stop]


def asked(seed: int = 1) -> list[Question]:
    """Random questions, three of a text, with answers of two and one ids."""
    found = []
    for text in range(2):
        body = _models.tokens(61, seed=seed + text)[0].tolist()
        for i in range(3):
            own = _models.tokens(9, seed=10 * seed + i)[0].tolist()
            answers = [(64, 66), (69, 70)] if i else [(67, 70)]
            found.append(Question("digits", text, body + own, answers, 61, 0.0, 60))
    return found


@pytest.mark.parametrize("variant", ["released layout", "two summaries", "different windows"])
def test_cached_reads_what_the_definition_says(variant):
    """A text is read once, in steps; each question goes on from there."""
    model = _models.build(**_models.VARIANTS[variant])
    expected = score(Plain(model), asked())
    for step in (2048, 7):
        found = score(Cached(model, step=step), asked())
        assert np.allclose(found.nll, expected.nll, atol=1e-3) and len(found.nll) == 10
        assert (found.exact == expected.exact).all()
    # Without `begin`, and a text that does not begin as the last one.
    reads = Cached(model)
    for q in asked():
        ids, start, stop = mx.array([q.ids]), q.answers[0][0] - 1, len(q.ids) - 1
        assert _models.worst(reads(ids, start, stop), Plain(model)(ids, start, stop)) < 1e-3


def test_kv_bits_pass_through():
    """Caches are quantised to the bits asked for."""
    model = _models.build(head_dim=32, summary_sliding_chunk_num="[2]*2+[2000]*1")
    plain = score(Cached(model), asked()).nll
    errors = {}
    for bits in (8, 4):
        reads = Cached(model, Quantised(bits, 32, 0))
        errors[bits] = np.abs(score(reads, asked()).nll - plain).mean()
        assert {getattr(c, "bits", None) or c.storage.bits for c in reads.cache} == {bits}
    assert 0 < errors[8] < errors[4] / 4


def test_the_embedded_model_answers(loaded):
    """The pieces together: what it says greedily is what is called exact."""
    model, tokenizer = loaded
    asked = questions("digits", 300, 8, 1, tokenizer, chat="bare")
    found = score(Cached(model), asked)
    assert isinstance(found, Scores) and found.exact.mean() >= 0.7
    assert found.nll[found.exact].max() < np.log(2)
    for q, exact in zip(asked[:2], found.exact, strict=False):
        (start, stop), said = q.answers[0], []
        cache, ids = model.make_cache(), q.ids[:start]
        for _ in range(stop - start):
            ids = [model(mx.array([ids]), cache=cache)[0, -1].argmax().item()]
            said += ids
        assert exact == (said == q.ids[start:stop])


# Intervals


def test_wilson():
    """The examples of Newcombe, Statistics in Medicine 17 (1998), table I, method 3."""
    for right, total, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert np.allclose(intervals.wilson(right, total, 0.95), (low, high), atol=5e-5)
    assert np.isclose(intervals.wilson(30, 30, 0.9)[0], 30 / (30 + 1.6448536**2))
    assert intervals.wilson(0, 0) == (0, 1)


def test_bootstrap():
    rng = np.random.default_rng(1)
    x = rng.normal(2, 1, 400)
    low, high = intervals.bootstrap(x)
    # As the normal approximation of the mean has it.
    spread = 1.645 * x.std() / 20
    assert np.allclose([low, high], [x.mean() - spread, x.mean() + spread], atol=0.01)
    assert intervals.bootstrap(x) == (low, high) != intervals.bootstrap(x, seed=1)
    wide = intervals.bootstrap(x, level=0.99)
    assert wide[0] < low and high < wide[1]


def test_bootstrap_draws_models_together():
    """A gap that is the same in every block is known exactly, however the blocks differ."""
    hard = np.random.default_rng(1).normal(3, 1, 50)
    rows = np.stack([hard + 0.5, hard, hard + 1])
    share = lambda m: (m[:, 2] - m[:, 0]) / (m[:, 2] - m[:, 1])
    assert np.allclose(intervals.bootstrap(rows, share), (0.5, 0.5))
    assert all(np.isnan(intervals.bootstrap(np.zeros((3, 0)), share)))


def test_blocks():
    x = np.arange(10.0)
    assert intervals.blocks(x, 4).tolist() == [1.5, 5.5]
    assert intervals.blocks(np.stack([x, x + 1]), 5).tolist() == [[2, 7], [3, 8]]
    assert intervals.blocks(x, 64).tolist() == [4.5]


def test_texts_are_endless(tokenizer):
    texts = Texts("words", 200, 1, Prompts(tokenizer))
    every = iter(texts)
    assert [next(every) for _ in range(3)] == [texts.text(i) for i in range(3)]
