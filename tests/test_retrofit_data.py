"""Texts of a retrofit: every sequence by its number, whole documents held out, faults in a line."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_mlx.errors import DataError
from ksa_mlx.retrofit.data import Data, indices, open_data, split

PREFIX = list(range(1, 9))
END = 0


class Letters:
    """A tokenizer whose ids are the letters' numbers, and a chat's the roles and contents."""

    eos_token_id = END
    chat_template = "yes"

    def encode(self, text, add_special_tokens=True):
        return [*([7] if add_special_tokens else []), *map(ord, text)]

    def apply_chat_template(self, messages, tools=None, return_dict=False, **_):
        said = "".join(f"{m['role']}:{m['content']}\n" for m in messages)
        return [*self.encode(said), END]


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Documents of ids that say which document and which place: all differ, none is END."""
    starts = np.cumsum([100, *sizes])
    return [np.arange(a, b, dtype=np.int32) for a, b in pairwise(starts)]


def data(sizes: list[int], length: int = 24, seed: int = 0, **options) -> Data:
    return Data(numbered(sizes), numbered([length]), length, PREFIX, END, seed, **options)


sizes = st.lists(st.integers(1, 100), min_size=1, max_size=8).filter(lambda x: sum(x) >= 32)


@given(sizes, st.integers(0, 3), st.lists(st.integers(0, 500), min_size=1, max_size=10))
@settings(deadline=None)
def test_a_sequence_is_its_seed_and_number(sizes, seed, numbers):
    """In whatever order they are asked for, from a new start or not."""
    one = data(sizes, seed=seed)
    first = {i: one.sequence(i).ids.tolist() for i in numbers}
    for i in reversed(numbers):
        ids = data(sizes, seed=seed).sequence(i).ids
        assert ids.tolist() == first[i] and ids.dtype == np.int32
        assert len(ids) == 24 and ids[:8].tolist() == PREFIX


@given(sizes, st.integers(0, 3))
@settings(deadline=None)
def test_an_epoch_shows_nothing_twice(sizes, seed):
    """Nearly everything once, in another order in the next; windows cross no document's edge."""
    texts = data(sizes, seed=seed)
    documents = numbered(sizes)
    whole = {int(d[0]): len(d) for d in documents if len(d) >= 16}
    edges = np.array([d[0] for d in documents])
    for epoch in range(2):
        bodies = [texts.sequence(epoch * texts.epoch + i).ids[8:] for i in range(texts.epoch)]
        seen = np.concatenate(bodies)
        seen = seen[seen != END]
        assert len(set(seen.tolist())) == len(seen)
        assert sum(map(len, bodies)) > texts.tokens - 16 * (len(whole) + 1)
        for body in bodies:
            at = np.searchsorted(edges, body[body != END], side="right")
            if len(set(at.tolist())) > 1:  # several documents: all are short, an end token between
                assert not {int(edges[i - 1]) for i in at} & set(whole)
                assert all(END in body[i : i + 2] for i in np.flatnonzero(np.diff(body) != 1))
            else:
                assert END in body or (np.diff(body) == 1).all()


def test_epochs_differ():
    texts = data([100] * 8)
    first, second = (
        [texts.sequence(i + at).ids[8] for i in range(texts.epoch)] for at in (0, texts.epoch)
    )
    assert sorted(first) != first and set(first) != set(second)  # order, and where windows begin
    assert [data([100] * 8, seed=1).sequence(i).ids[8] for i in range(texts.epoch)] != first


@given(st.integers(0, 50), st.integers(1, 5), st.integers(1, 4))
def test_machines_share_a_step(step, batch, world):
    """Together, in order, what one machine with the whole batch sees; steps follow each other."""
    parts = [indices(step, batch, rank, world) for rank in range(world)]
    together = [i for at in zip(*parts, strict=True) for i in at]
    assert together == indices(step, batch * world)
    assert indices(step + 1, batch * world)[0] == together[-1] + 1


@pytest.mark.parametrize("share", [0.0, 0.2, 0.3, 1 / 3, 0.75])
def test_recall_texts_are_spread_evenly(share):
    """`share` of all sequences, numbered in a row; plain texts go on as if they were alone."""
    asked = []

    def maker(number, length, filler):
        asked.append(number)
        assert len(filler) == length - len(PREFIX)
        return [*PREFIX, *filler[:-1], 5], [length - 1]

    mixed, plain = data([90] * 5, recall=share, maker=maker), data([90] * 5)
    texts = [mixed.sequence(i) for i in range(100)]
    assert asked == list(range(round(100 * share - 1e-9)))
    others = [t.ids.tolist() for t in texts if not len(t.answers)]
    assert others == [plain.sequence(i).ids.tolist() for i in range(len(others))]
    some = [bool(len(t.answers)) for t in texts]
    assert all(abs(sum(some[i : i + 10]) - 10 * share) <= 1 for i in range(90))
    again = next((i for i, x in enumerate(some) if x), None)
    if again is not None:
        assert mixed.sequence(again).ids.tolist() == texts[again].ids.tolist()


@given(sizes, st.floats(0.01, 0.3), st.integers(0, 3))
@settings(deadline=None)
def test_split_loses_and_doubles_nothing(sizes, share, seed):
    documents = numbered(sizes)
    train, held = split(documents, share, 16, seed)
    both = np.concatenate([*train, *held])
    assert sorted(both.tolist()) == np.concatenate(documents).tolist()
    wanted = max(int(share * len(both)), 16)
    assert min(wanted, len(both)) <= sum(map(len, held)) < 3 * wanted
    assert [d.tolist() for d in split(documents, share, 16, seed)[1]] == [d.tolist() for d in held]


def test_files_of_a_folder(tmp_path):
    """Folders in it too; a jsonl line a text, whichever of mlx-lm's forms; no other files."""
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("a" * 60)
    (tmp_path / "deep" / "b.md").write_text("b" * 60)
    (tmp_path / "not.py").write_text("c" * 60)
    chat = [{"role": "user", "content": "d" * 60}, {"role": "assistant", "content": "e" * 60}]
    lines = [{"text": "f" * 60}, {"prompt": "g" * 60, "completion": "h" * 60}, {"messages": chat}]
    (tmp_path / "more.jsonl").write_text("\n\n".join(map(json.dumps, lines)) + "\n")
    texts = open_data(tmp_path, Letters(), 24, PREFIX)
    found = {chr(i) for k in range(texts.epoch) for i in texts.sequence(k).ids[8:] if i}
    held = {chr(i) for k in range(texts.held_out_count) for i in texts.held_out(k).ids[8:] if i}
    assert set("abdefgh") <= found | held and "c" not in found | held
    assert texts.tokens + texts.held_out_tokens == 60 * 7 + len("user:\nassistant:\n\0") * 2
    assert texts.held_out(0).ids.tolist() == texts.held_out(texts.held_out_count).ids.tolist()


def test_mlx_lm_folder(tmp_path):
    """train.jsonl and valid.jsonl as they are; test.jsonl is nobody's."""
    for name, letter in (("train", "a"), ("valid", "b"), ("test", "c")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": letter * 90}) + "\n")
    texts = open_data(tmp_path, Letters(), 24, PREFIX)
    assert set(texts.sequence(0).ids[8:].tolist()) == {ord("a")}
    assert set(texts.held_out(0).ids[8:].tolist()) == {ord("b")}


def test_chats_as_the_template_says(tmp_path):
    message = [{"role": "user", "content": "a" * 40}]
    (tmp_path / "x.jsonl").write_text((json.dumps({"messages": message}) + "\n") * 9)
    texts = open_data(tmp_path, Letters(), 72, PREFIX)
    shown = "".join(map(chr, texts.sequence(0).ids[8:]))
    chat = f"user:{'a' * 40}\n\0"  # without the tokenizer's token for the beginning
    assert shown in chat * 3


REFUSED = {
    "nothing.txt": (None, r"nothing\.txt: no such file or folder"),
    "x.csv": (b"a,b\n", r"x\.csv: found a file '\.csv', expected \.txt, \.md or \.jsonl"),
    "empty.txt": (b"", r"empty\.txt: found no text"),
    "short.txt": (b"ab" * 20, r"short\.txt: found 40 tokens, expected at least 49"),
    "bytes.txt": (b"good \xff\xfe", r"bytes\.txt: byte 5 is not UTF-8"),
    "a.jsonl": (b'{"text": "a"}\n{"text": \n', r"a\.jsonl:2: not JSON: "),
    "b.jsonl": (b"[1]\n", r"b\.jsonl:1: found a list, expected an object with text, prompt"),
    "c.jsonl": (b'{"prompt": "a", "answer": "b"}\n', r"c\.jsonl:1: found 'prompt', 'answer', "),
    "d.jsonl": (b'\n{"text": 3}\n', r"d\.jsonl:2: text: found a number, expected a string"),
    "e.jsonl": (b'{"prompt": "", "completion": null}', r"e\.jsonl:1: completion: found null"),
    "f.jsonl": (b'{"messages": "hi"}', r"f\.jsonl:1: messages: found a string, expected a list"),
    "g.jsonl": (b'{"messages": [{"content": "a"}]}', r"g\.jsonl:1: messages: found an object, ex"),
    "i.jsonl": (rb'{"text": "a \ud83d b"}', r"i\.jsonl:1: text: found \\ud83d, half a surrogate"),
    "j.jsonl": (
        rb'{"messages": [{"role": "user", "content": "\udc00"}]}',
        r"j\.jsonl:1: messages: found \\u",
    ),
    "h.jsonl": (b'{"messages": [{"role": "user"}]}', r"h\.jsonl:1: the chat template fails: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_one_line(tmp_path, name):
    content, message = REFUSED[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as e:
        open_data(tmp_path / name, Letters(), 24, PREFIX)
    assert "\n" not in str(e.value)


def test_too_little_for_what_is_wanted(tmp_path):
    (tmp_path / "a.txt").write_text("a" * 1000)
    open_data(tmp_path, Letters(), 24, PREFIX, least=900)
    with pytest.raises(DataError, match=r"found 1,000 tokens, expected at least 2,0\d\d"):
        open_data(tmp_path, Letters(), 24, PREFIX, least=2000)


def test_folder_without_texts(tmp_path):
    with pytest.raises(DataError, match=r"found no \.txt, \.md or \.jsonl file"):
        open_data(tmp_path, Letters(), 24, PREFIX)


def test_a_chat_without_a_template(tmp_path):
    tokenizer = Letters()
    tokenizer.chat_template = None
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(DataError, match=r"a\.jsonl:1: a chat, and the model's tokenizer has no"):
        open_data(tmp_path, tokenizer, 24, PREFIX)
