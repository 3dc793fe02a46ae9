"""Speculative decoding through mlx-lm: the same greedy text as without a draft model.

float32 models: a step of several rows and one of a single row round differently, so that in half
precision two near-equal logits may swap, here as in every model of mlx-lm.
"""

import functools
import itertools
import os
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

import ksa_mlx
from ksa_mlx.cache.rollback import ROLLBACK, settle
from ksa_mlx.chat import notebook
from ksa_mlx.chat.report import report
from ksa_mlx.chat.session import Session
from ksa_mlx.errors import ConfigError
from ksa_mlx.generate import main

from ._models import BASE, VARIANTS, build, tokens
from ._server import environment

# The long run: KSA_MLX_SPECULATIVE_TOKENS=10000 pytest -s tests/test_speculative.py -k long_run
LONG_RUN = int(os.environ.get("KSA_MLX_SPECULATIVE_TOKENS", 240))

NAMES = ["released layout", "two summaries", "inner chunk"]

model_of = functools.lru_cache(None)(lambda name: build(**VARIANTS[name]))


@functools.lru_cache(None)
def draft_of(kind, name):
    """A draft model that is always right, mostly right, sometimes right, or no KSA model."""
    if kind == "same":
        return model_of(name)
    if kind == "other KSA":
        return build(seed=7, **VARIANTS["different windows"])
    if kind == "plain Qwen3":
        shape = {k: v for k, v in BASE.items() if not k.startswith("summary")}
        model = qwen3.Model(qwen3.ModelArgs.from_dict({**shape, "vocab_size": 64}))
        mx.eval(model.parameters())
        return model
    model, keys = build(**VARIANTS[name]), iter(mx.random.split(mx.random.key(3), 1000))

    def blur(path, w):
        return w + 0.05 * mx.random.normal(w.shape, key=next(keys)) if w.ndim > 1 else w

    model.update(tree_map_with_path(blur, model.parameters()))
    mx.eval(model.parameters())
    return model


def caches(model, draft, rollback):
    """Caches of both models, of which no more can be taken back than asked for."""
    made = [
        ksa_mlx.make_cache(m, rollback) if hasattr(m, "rollback") else qwen3_cache(m)
        for m in (model, draft)
    ]
    return made[0] + made[1]


def qwen3_cache(model):
    return [KVCache() for _ in model.layers]


def plain(model, prompt, n):
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n)]


def speculated(model, draft, prompt, n, num_draft, rollback=None, **kwargs):
    """Greedy ids with a draft model, and how many of them the draft proposed."""
    cache = caches(model, draft, num_draft if rollback is None else rollback)
    out = list(
        speculative_generate_step(
            mx.array(prompt),
            model,
            draft,
            num_draft_tokens=num_draft,
            max_tokens=n,
            prompt_cache=cache,
            **kwargs,
        )
    )
    return [int(t) for t, _, _ in out], sum(from_draft for _, _, from_draft in out)


@pytest.mark.quick(4)
@pytest.mark.feature(
    "Speculative decoding, any draft",
    "`stream_generate(..., draft_model=...)`",
    "works; greedy text as without a draft",
)
@pytest.mark.parametrize("kind", ["same", "blurred", "other KSA", "plain Qwen3"])
@pytest.mark.parametrize("name", NAMES)
def test_same_text(name, kind):
    model, draft = model_of(name), draft_of(kind, name)
    accepted = 0
    # Prompts that end before, at and behind the edges of chunk and window.
    for num_draft, length in zip((1, 2, 3, 5), (1, 11, 12, 13), strict=True):
        prompt = tokens(length, seed=length)[0].tolist()
        got, n = speculated(model, draft, prompt, 20, num_draft)
        assert got == plain(model, prompt, 20), (num_draft, length)
        accepted += n
    assert accepted >= 4 * 20 * 0.5 if kind == "same" else accepted < 4 * 20


@pytest.mark.quick(1)
@pytest.mark.parametrize("num_draft", [4, 6, 7, 8])
def test_every_number_of_drafts(num_draft):
    """From a prompt within the window into eviction, in steps of all sizes."""
    model, draft = model_of("released layout"), draft_of("blurred", "released layout")
    prompt = tokens(5, seed=num_draft)[0].tolist()
    got, accepted = speculated(model, draft, prompt, 40, num_draft, prefill_step_size=3)
    assert got == plain(model, prompt, 40)
    assert 0 < accepted < 40


def test_ksa_as_draft_of_plain_qwen3():
    model, draft = draft_of("plain Qwen3", ""), model_of("released layout")
    prompt = tokens(30)[0].tolist()
    got, _ = speculated(model, draft, prompt, 40, 3)
    assert got == plain(model, prompt, 40)


def test_logits_processors():
    """Processors see the same tokens, also after a rejection (but mlx-lm does not show them the
    prompt when it speculates: this one looks at the last token only)."""

    def no_repeats(seen, logits):
        return logits.at[:, seen[-1:]].add(-1e9)

    model, draft = model_of("two summaries"), draft_of("blurred", "two summaries")
    prompt = tokens(20)[0].tolist()
    got, _ = speculated(model, draft, prompt, 40, 4, logits_processors=[no_repeats])
    expected = generate_step(mx.array(prompt), model, max_tokens=40, logits_processors=[no_repeats])
    assert got == [int(t) for t, _ in expected]


@pytest.mark.slow
def test_quantised_caches():
    """`kv_bits` from the start: rejected drafts leave no trace in a quantised cache either."""
    shape = dict(head_dim=32, hidden_size=64, **VARIANTS["released layout"])
    model, prompt = build(**shape), tokens(30)[0].tolist()
    draft = build(seed=1, **shape)
    bits = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    got, _ = speculated(model, draft, prompt, 40, 3, **bits)
    expected = generate_step(
        mx.array(prompt), model, max_tokens=40, prompt_cache=model.make_cache(), **bits
    )
    assert got == [int(t) for t, _ in expected]


@pytest.mark.slow
def test_long_run():
    """At least 20 prompts in all, zero differences."""
    runs = list(itertools.product(NAMES, ["same", "blurred", "other KSA", "plain Qwen3"], [0, 1]))
    each, total, accepted, different = -(-LONG_RUN // len(runs)), 0, 0, 0
    for i, (name, kind, _) in enumerate(runs):
        prompt = tokens(1 + 13 * i, seed=50 + i)[0].tolist()
        got, n = speculated(model_of(name), draft_of(kind, name), prompt, each, 1 + i % 8)
        expected = plain(model_of(name), prompt, each)
        different += sum(a != b for a, b in zip(got, expected, strict=False)) + abs(
            len(got) - len(expected)
        )
        total, accepted = total + len(got), accepted + n
    print(
        f"\n{len(runs)} prompts, {total} tokens, {accepted} proposed by the draft, {different} differ"
    )
    assert different == 0 and total >= LONG_RUN and len(runs) >= 20


def test_refused_without_rollback():
    model = model_of("released layout")
    with pytest.raises(ValueError, match=r"trimmable.*RollingSummaryCache"):
        speculated(model, model, [1, 2, 3], 5, 2, rollback=0)


def test_more_drafts_than_rollback():
    """A rejection beyond reach raises, naming the rollback; nothing wrong is generated."""
    model, draft = model_of("released layout"), draft_of("other KSA", "")
    prompt = tokens(40)[0].tolist()
    with pytest.raises(ValueError, match=r"cannot take back .* rollback=1"):
        speculated(model, draft, prompt, 60, 8, rollback=1)


def test_environment(monkeypatch):
    monkeypatch.setenv(ROLLBACK, "9")
    model = build()
    assert model.rollback == 9 and all(c.is_trimmable() for c in model.make_cache())
    monkeypatch.setenv(ROLLBACK, "0")
    assert build(rollback=5).rollback == 0
    for wrong in ("-1", "many", "1.5", ""):
        monkeypatch.setenv(ROLLBACK, wrong)
        with pytest.raises(ConfigError, match=f"{ROLLBACK}: found '{wrong}', expected an integer"):
            build()
    monkeypatch.delenv(ROLLBACK)
    assert build(rollback=5).rollback == 5


@pytest.mark.quick(5)
@pytest.mark.parametrize("kind", ["same", "other KSA", "plain Qwen3"])
@pytest.mark.parametrize("stop", [1, 2, 3, 6, 7, 8])
def test_settle(kind, stop):
    """Wherever generation ends, the caches can be made to hold one and the same prefix."""
    model, draft = model_of("released layout"), draft_of(kind, "released layout")
    prompt, num_draft = tokens(30)[0].tolist(), 3
    text = prompt + plain(model, prompt, 40)
    cache = caches(model, draft, num_draft)
    steps = speculative_generate_step(
        mx.array(prompt),
        model,
        draft,
        num_draft_tokens=num_draft,
        max_tokens=40,
        prompt_cache=cache,
    )
    for _ in itertools.islice(steps, stop):
        pass
    steps.close()
    n = settle(cache)
    assert len(prompt) + stop - 2 <= n <= len(prompt) + stop
    assert {c.offset for c in cache} == {n}
    rest, layers = mx.array([text[n : n + 5]]), len(model.layers)
    for m, part in ((model, cache[:layers]), (draft, cache[layers:])):
        expected = m(mx.array([text[: n + 5]]))[:, n:]
        assert mx.abs(m(rest, cache=part) - expected).max() < 1e-3


def test_settle_gives_up_where_it_must():
    model = model_of("released layout")
    a, b = model.make_cache(), model.make_cache()
    model(tokens(30), cache=a)
    model(tokens(20), cache=b)
    assert settle(a + b) == 0
    assert settle(a) == 30
    assert settle([object()]) == 0


# Commands

ASK = ["--prompt", "What is the phone of Hugo?", "--max-tokens", "10"]


def notes(n=25):
    return "\n".join(notebook.notes().splitlines()[:n])


def command(*argv, **env):
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**env),
    )


@pytest.mark.slow
@pytest.mark.feature(
    "Speculative decoding, KSA or plain Qwen3 as draft",
    "`mlx_lm.generate --draft-model`, `generate.py --draft-model`",
    "works, with `KSA_MLX_ROLLBACK` or the config's `rollback` (ours need neither); "
    "refused without",
)
def test_commands(notebook_models, capsys):
    """Stock, stock through ksa_mlx, and ours: one text; the draft needs no flag to load."""
    model, draft = map(str, notebook_models)
    ask = ["--model", model, "--system-prompt", notes(), *ASK]
    assert main(ask) == 0
    expected = capsys.readouterr().out
    assert "891" in expected
    flags = ["--draft-model", draft, "--num-draft-tokens", "4", "--verbose", "False"]
    trust = "--trust-remote-code"
    stock = command("mlx_lm", "generate", trust, *ask, *flags, KSA_MLX_ROLLBACK="8")
    # mlx-lm's prints the answer's leading blank too.
    assert stock.stdout.lstrip() == expected, stock.stderr
    assert command("ksa_mlx", "generate", *ask, *flags).stdout == expected
    assert main([*ask, *flags]) == 0
    assert capsys.readouterr().out == expected
    without = command("mlx_lm", "generate", trust, *ask, *flags)
    assert without.returncode == 1 and not without.stdout
    assert "requires a trimmable prompt cache (got {'RollingSummaryCache'})" in without.stderr
    wrong = command("ksa_mlx", "generate", *ask, *flags, KSA_MLX_ROLLBACK="some")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith(
        "KSA_MLX_ROLLBACK: found 'some', expected an integer of at least 0"
    )


@pytest.mark.slow
def test_conversation_with_a_draft(notebook_models, tmp_path):
    """All turns on one pair of caches: what a plain conversation says, and no text read twice."""
    model, tokenizer = ksa_mlx.load(notebook_models[0])
    draft, _ = ksa_mlx.load(notebook_models[1])
    about = {"system_prompt": notes(), "max_tokens": 15}
    plain = Session(model, tokenizer, "m", **about)
    drafted = Session(
        model, tokenizer, "m", **about, draft_model=draft, options={"num_draft_tokens": 4}
    )
    drafted.read_ahead()
    for question in ("What is the phone of Hugo?", "What is the hotel of Liam?", "Why?"):
        before = drafted.offset
        a, b = "".join(plain.answer(question)), "".join(drafted.answer(question))
        assert a == b
        assert drafted.usage.prompt_tokens < 20 and drafted.offset > before > 300
        assert {c.offset for c in drafted.cache} == {drafted.offset}
    assert 0 < drafted.usage.drafted <= drafted.usage.generation_tokens
    assert "Draft model: proposed" in report(drafted)
    # Left in the middle of an answer, as by Ctrl-C.
    for session in (plain, drafted):
        for n, _ in enumerate(session.answer("What is the train of Jonas?")):
            session.stop = n == 1
    assert drafted.conversation.messages == plain.conversation.messages
    assert "".join(plain.answer("And then?")) == "".join(drafted.answer("And then?"))
    # A saved conversation has no draft model's cache, and goes on with one.
    drafted.save(tmp_path / "saved")
    drafted.load(tmp_path / "saved")
    assert "".join(plain.answer("Who?")) == "".join(drafted.answer("Who?"))


@pytest.mark.slow
def test_a_draft_with_quantised_caches(notebook_models):
    model, tokenizer = ksa_mlx.load(notebook_models[0])
    draft, _ = ksa_mlx.load(notebook_models[1])
    kv = {"kv_bits": 8, "kv_group_size": 32, "quantized_kv_start": 0}
    about = {"system_prompt": notes(), "max_tokens": 15, "options": kv}
    plain = Session(model, tokenizer, "m", **about)
    drafted = Session(model, tokenizer, "m", **about, draft_model=draft)
    for question in ("What is the phone of Hugo?", "What is the hotel of Liam?"):
        assert "".join(plain.answer(question)) == "".join(drafted.answer(question))
    assert all(c.storage.bits == 8 for c in drafted.own_cache)
    assert {c.offset for c in drafted.cache} == {drafted.offset}


def test_generate_py_refuses(notebook_models, capsys, tmp_path):
    model = str(notebook_models[0])
    for flags, words in (
        (["--draft-model", str(tmp_path / "none")], "no such file or folder"),
        (["--draft-model", model, "--num-draft-tokens", "0"], "expected at least 1"),
    ):
        try:
            assert main(["--model", model, *ASK, *flags]) == 1
        except SystemExit as e:
            assert e.code == 2
        assert words in capsys.readouterr().err
