"""Prompt caches in files: the longest prefix of the same model, whole or not at all, within a size."""

import fcntl
import hashlib
import logging
import os
import shutil
import time

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache

from ksa_mlx.errors import KSAError
from ksa_mlx.stock.disk import Disk
from ksa_mlx.stock.identity import identity
from ksa_mlx.stock.prompt_cache import PromptCache

from ._models import build, tokens
from .test_memory import qwen


def named(key):
    """An identity for a key of mlx-lm's."""
    return hashlib.sha256(key.encode()).hexdigest()


MINE, OTHER = named("mine"), named("other")
LARGE = 10**9


def read(model, text):
    """Caches that have read a text."""
    cache = make_prompt_cache(model)
    model(mx.array([text]), cache=cache)
    mx.eval([c.state for c in cache])
    return cache


def greedy(model, text, cache=None, n=8):
    return [
        int(t) for t, _ in generate_step(mx.array(text), model, max_tokens=n, prompt_cache=cache)
    ]


@pytest.fixture(scope="module")
def plain():
    model = qwen()
    mx.eval(model.parameters())
    return model


@pytest.fixture(scope="module")
def text():
    return tokens(120)[0].tolist()


def put(disk, name, model, text):
    caches = read(model, text)
    disk.write(name, text, caches, can_trim_prompt_cache(caches))


def test_the_longest_prefix(plain, text, tmp_path):
    disk = Disk(tmp_path / "made", LARGE)
    for n in (10, 40, 70):
        disk.write(MINE, text[:n], read(plain, text[:n]), False)
    assert disk.find(MINE, text[:9]) == (0, None) or disk.find(MINE, text[:9])[0] == 0
    for asked, expected in ((10, 10), (39, 10), (40, 40), (69, 40), (120, 70)):
        assert disk.find(MINE, text[:asked])[0] == expected
    assert disk.find(MINE, [*text[:50], 1, 2, 3, *text[53:]])[0] == 40
    assert disk.find(OTHER, text)[1] is None
    # The next server finds the same, and what it reads is what was written.
    n, entry = Disk(tmp_path / "made", LARGE).find(MINE, text)
    assert n == 70 and entry.tokens.tolist() == text[:70]
    for a, b in zip(disk.read(entry), read(plain, text[:70]), strict=True):
        assert all(mx.array_equal(x, y) for x, y in zip(a.state[:2], b.state[:2], strict=True))


def test_a_longer_text_that_can_be_taken_back(plain, text, tmp_path):
    disk = Disk(tmp_path, LARGE)
    put(disk, MINE, plain, text[:30])
    put(disk, MINE, plain, text[:90])
    assert len(disk.files()) == 1  # the longer one serves for the shorter
    assert disk.find(MINE, [*text[:50], 1])[0] == 50


@pytest.mark.parametrize("make", [build, qwen])
def test_through_the_prompt_cache(make, text, tmp_path, monkeypatch):
    """Answers from the disk are those of the text read anew; in memory comes what was read."""
    model = make()
    mx.eval(model.parameters())
    first = PromptCache(10, disk=Disk(tmp_path, LARGE), identity=named)
    first.insert_cache("model", text[:80], read(model, text[:80]))
    first.insert_cache("model", text[:30], read(model, text[:30]))
    first.close()
    for size in (10, 0):
        again = PromptCache(size, disk=Disk(tmp_path, LARGE), identity=named)
        for asked, n in ((text, 80), (text[:81], 80), ([*text[:30], 5, 6], 30)):
            cache, rest = again.fetch_nearest_cache("model", asked)
            assert len(asked) - len(rest) == n
            assert greedy(model, rest, cache) == greedy(model, asked)
        assert again.fetch_nearest_cache("another", text) == (None, text)
        assert len(again) == min(size, 1 if make is qwen else 2)
        # Now from memory, if it holds any.
        monkeypatch.setattr(again.disk, "read", None if size else again.disk.read)
        assert len(again.fetch_nearest_cache("model", text)[1]) == 40
        monkeypatch.undo()
        again.close()


@pytest.mark.parametrize("make", [build, qwen])
def test_quantised_caches(make, text, tmp_path):
    """What is in a file is what is in memory, bit by bit, whatever its form."""
    model = make(head_dim=32, rollback=3) if make is build else make(head_dim=32)
    written = [c.to_quantized(32, 4) for c in read(model, text)]
    Disk(tmp_path, LARGE).write(MINE, text, written, False)
    disk = Disk(tmp_path, LARGE)
    _, entry = disk.find(MINE, text)
    for a, b in zip(disk.read(entry), written, strict=True):
        assert type(a) is type(b)
        pairs = zip(tree_flatten(a.state), tree_flatten(b.state), strict=True)
        assert all(name == other and mx.array_equal(x, y) for (name, x), (other, y) in pairs)


def test_evicted_from_memory(text, tmp_path):
    model = build()
    kept = PromptCache(1, disk=Disk(tmp_path, LARGE), identity=named)
    for start in (0, 10, 20):
        kept.insert_cache("model", text[start:], read(model, text[start:]))
    kept.writer.wait()
    assert len(kept) == 1 and len(kept.disk.files()) >= 1
    kept.keep_within(0)
    assert len(kept) == 0
    cache, rest = kept.fetch_nearest_cache("model", [*text[20:], 3])
    assert rest == [3] and cache[0].offset == 100
    kept.close()


def test_least_recently_used_leave_first(plain, text, tmp_path):
    disk = Disk(tmp_path, LARGE)
    for n, start in enumerate((0, 1, 2)):
        put(disk, MINE, plain, text[start:50])
        for file, _ in disk.files()[n:]:
            os.utime(file, (n, n))
    one = disk.files()[0][1].st_size
    used, entry = disk.find(MINE, text[:60])
    assert used == 50 and disk.read(entry)
    small = Disk(tmp_path, 3 * one + one // 2)
    put(small, OTHER, plain, text[3:50])  # the fourth
    assert len(small.files()) == 3
    assert sum(stat.st_size for _, stat in small.files()) <= small.most
    found = [Disk(tmp_path, LARGE).find(MINE, text[start:60])[0] for start in (0, 1, 2)]
    assert found == [50, 0, 48]
    # What is larger than everything is not kept, and nothing leaves for it.
    put(Disk(tmp_path, one // 2), MINE, plain, text[4:50])
    assert len(disk.files()) == 3


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "a bit", "no entry"])
def test_a_damaged_file(plain, text, tmp_path, caplog, how):
    put(Disk(tmp_path, LARGE), MINE, plain, text)
    ((file, _),) = Disk(tmp_path, LARGE).files()
    data = bytearray(file.read_bytes())
    data[-3000] ^= 4
    damaged = {
        "cut": data[:-100],
        "empty": b"",
        "garbage": os.urandom(5000),
        "a bit": data,
        "no entry": bytes(data).replace(b"checksum", b"checksun"),
    }
    file.write_bytes(damaged[how])
    disk = Disk(tmp_path, LARGE)
    with caplog.at_level(logging.WARNING):
        _, entry = disk.find(MINE, text)
        assert entry is None or disk.read(entry) is None
    (record,) = caplog.records
    assert f"{file}: found a damaged prompt cache, removed (" in record.getMessage()
    assert "\n" not in record.getMessage() and not file.exists()
    assert disk.find(MINE, text) == (0, None)


def test_a_file_that_another_server_has_dropped(plain, text, tmp_path, caplog):
    disk = Disk(tmp_path, LARGE)
    put(disk, MINE, plain, text)
    _, entry = disk.find(MINE, text)
    entry.file.unlink()
    assert disk.read(entry) is None and not caplog.records
    assert disk.find(MINE, text) == (0, None)


def test_leftovers_and_files_of_others(plain, text, tmp_path):
    others = ["model.safetensors", "prompt-notes.safetensors", ".hidden", "prompt.txt"]
    for name in others:
        (tmp_path / name).write_bytes(b"x" * 1000)
    (tmp_path / "folder").mkdir()
    dead = tmp_path / f".prompt-{'a' * 16}-{'0' * 32}.1.safetensors"
    written = tmp_path / f".prompt-{'a' * 16}-{'1' * 32}.2.safetensors"
    dead.write_bytes(b"half")
    with open(written, "wb") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        disk = Disk(tmp_path, 1)
        assert not dead.exists() and written.exists()
    assert disk.make_room(1) and disk.files() == []
    Disk(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*others, "folder"])


def test_a_folder_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(KSAError, match=r"--prompt-cache-dir: .*file: "):
        Disk(tmp_path / "file", LARGE)


def test_what_cannot_be_written(plain, text, tmp_path, caplog):
    kept = PromptCache(3, disk=Disk(tmp_path / "gone", LARGE), identity=named)
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "gone").write_text("in the way")
    kept.insert_cache("model", text, read(plain, text))
    kept.writer.wait()
    (record,) = caplog.records
    assert "a prompt cache is not kept" in record.getMessage()
    assert kept.fetch_nearest_cache("model", [*text, 1])[1] == [1]
    kept.close()


def test_writing_waits_for_nobody(text, tmp_path, monkeypatch):
    """Insertion returns at once, however slow the disk; the newest of what waits are written."""
    disk = Disk(tmp_path, LARGE)
    write = disk.write
    monkeypatch.setattr(disk, "write", lambda *args: (time.sleep(0.2), write(*args)))
    model = build()
    kept = PromptCache(2, disk=disk, identity=named)
    caches = [(text[i : i + 40], read(model, text[i : i + 40])) for i in range(6)]
    begin = time.perf_counter()
    for some, cache in caches:
        kept.insert_cache("model", some, cache)
    assert time.perf_counter() - begin < 0.15
    kept.close()
    written = [disk.find(named("model"), some)[0] for some, _ in caches]
    assert written[-2:] == [40, 40] and 2 <= len(disk.files()) <= 4


class Words:
    def __init__(self, *words):
        self.words = words

    def get_vocab(self):
        return {w: i for i, w in enumerate(self.words)}


def test_identities():
    words = Words("a", "b")
    found = [
        identity([build()], words, {}),
        identity([build(seed=1)], words, {}),
        identity([build()], Words("b", "a"), {}),
        identity([build()], words, {"kv_bits": 4}),
        identity([build(), build()], words, {}),
        identity([build(summary_sliding_chunk_num=3)], words, {}),
        identity([build(rollback=4)], words, {}),
        identity([qwen()], words, {}),
    ]
    for change in ("one weight", "two rows", "two columns", "type"):
        model = build()
        w = np.array(model.layers[1].mlp.up_proj.weight)
        if change == "one weight":
            w[5, 3] = np.nextafter(w[5, 3], 1)
        elif change == "two rows":
            w[[2, 7]] = w[[7, 2]]
        elif change == "two columns":
            w[:, [2, 7]] = w[:, [7, 2]]
        new = mx.array(w)
        model.layers[1].mlp.up_proj.weight = new.astype(mx.float16) if change == "type" else new
        found.append(identity([model], words, {}))
    assert len(set(found)) == len(found)
    assert identity([build()], words, {}) == found[0]
