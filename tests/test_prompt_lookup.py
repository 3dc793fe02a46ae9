"""Drafts from the text itself: the same text as without, in fewer steps where it copies."""

import functools
import itertools
import os
from collections import Counter

import mlx.core as mx
import pytest
from mlx_lm.generate import generate_step, stream_generate
from mlx_lm.sample_utils import make_logits_processors, make_sampler

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.chat.report import report
from ksa_mlx.chat.session import Session
from ksa_mlx.generate import main
from ksa_mlx.stock.prompt_lookup import Matches, PromptLookup, lookup_step

from ._models import VARIANTS, build, tokens
from ._server import OURS, serving
from .test_batch_quantized import SHAPE
from .test_speculative import draft_of, notes

# The long run: KSA_MLX_LOOKUP_TOKENS=10000 pytest -s tests/test_prompt_lookup.py -k long_run
LONG_RUN = int(os.environ.get("KSA_MLX_LOOKUP_TOKENS", 200))

NAMES = ["released layout", "two summaries", "inner chunk", "no window"]

model_of = functools.lru_cache(None)(lambda name: build(**VARIANTS[name]))


def copying(n: int, seed: int) -> list[int]:
    """A text that has come before, in part."""
    text = tokens(n, seed=seed)[0].tolist()
    return text + text[: n // 2]


def looked_up(model, prompt, n, most, cache=None, **kwargs):
    """Ids, and how many of them were drafts."""
    cache = cache or (ksa_mlx.make_cache(model, most) if hasattr(model, "rollback") else None)
    steps = lookup_step(
        mx.array(prompt), model, PromptLookup(), mx.default_stream(mx.default_device()),
        num_draft_tokens=most, max_tokens=n, prompt_cache=cache, **kwargs,
    )  # fmt: skip
    out = list(steps)
    return [t for t, _, _ in out], sum(d for _, _, d in out)


def plain(model, prompt, n, **kwargs):
    return [int(t) for t, _ in generate_step(mx.array(prompt), model, max_tokens=n, **kwargs)]


def test_matches():
    """The longest ending that came before decides, its last place; drafts go round."""
    assert Matches([1, 2, 3]).drafts(4) == []
    assert Matches([1, 2, 3, 4, 9, 1, 2]).drafts(3) == [3, 4, 9]
    assert Matches([1, 2, 3, 5, 1, 2, 4, 1, 2]).drafts(2) == [4, 1]
    assert Matches([5, 1, 2, 3, 6, 1, 2, 4, 5, 1, 2]).drafts(1) == [3]
    assert Matches([7, 7, 7]).drafts(4) == [7] * 4
    assert Matches([1, 2, 1, 2, 1]).drafts(5) == [2, 1, 2, 1, 2]
    assert Matches([]).drafts(4) == []


@pytest.mark.feature(
    "Prompt lookup: drafts from the text itself", "`--prompt-lookup` of `generate.py` and `python -m ksa_mlx server`",
    "works with our commands: greedy the same text, sampled the same distribution; one request after the other",
)  # fmt: skip
@pytest.mark.parametrize("name", NAMES)
def test_same_text(name):
    """Greedy, from prompts that end before, at and behind the edges of chunk and window."""
    model, drafts = model_of(name), 0
    for most, length in ((1, 5), (3, 22), (7, 24), (8, 25)):
        prompt = copying(length, seed=length)
        got, n = looked_up(model, prompt, 30, most, prefill_step_size=10)
        assert got == plain(model, prompt, 30), (most, length)
        drafts += n
    assert drafts


def test_a_plain_model():
    model, prompt = draft_of("plain Qwen3", ""), copying(30, seed=1)
    got, drafts = looked_up(model, prompt, 60, 5)
    assert got == plain(model, prompt, 60) and drafts


def test_logits_processors():
    """They see the prompt and all that was said, also behind a draft."""
    model, prompt = model_of("two summaries"), copying(20, seed=2)
    given = {"logits_processors": make_logits_processors(None, 1.3, 15)}
    got, _ = looked_up(model, prompt, 40, 4, **given)
    assert got == plain(model, prompt, 40, **given) != plain(model, prompt, 40)


@pytest.mark.parametrize("start", [0, 40])
def test_quantised(start):
    """No token that is quantised is read in one call with one that is not."""
    model, prompt = build(**SHAPE), copying(20, seed=3)
    bits = {"kv_bits": 4, "kv_group_size": 32, "quantized_kv_start": start}
    cache = ksa_mlx.make_cache(model, 6)
    got, drafts = looked_up(model, prompt, 60, 6, cache, **bits)
    assert all(hasattr(c, "bits") or c.storage.bits == 4 for c in cache)
    expected = ksa_mlx.make_cache(model)
    if not start:  # mlx-lm reads the first step of a prompt before it quantises
        expected = [c.to_quantized(32, 4) for c in expected]
    assert got == plain(model, prompt, 60, prompt_cache=expected, **bits) and drafts


@pytest.mark.slow
def test_long_run():
    """Texts of all models and drafts of 1 to 16 tokens: zero differences."""
    runs = list(itertools.product(NAMES, [1, 4, 8, 16], [20, 100]))
    each, total, drafts, different = -(-LONG_RUN // len(runs)), 0, 0, 0
    for i, (name, most, length) in enumerate(runs):
        prompt = copying(length, seed=i)
        got, n = looked_up(model_of(name), prompt, each, most)
        expected = plain(model_of(name), prompt, each)
        different += sum(a != b for a, b in itertools.zip_longest(got, expected))
        total, drafts = total + len(got), drafts + n
    print(f"\n{len(runs)} prompts, {total} tokens, {drafts} of them drafts, {different} differ")
    assert different == 0 and total >= LONG_RUN and drafts > total / 10


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 8])
def test_left_in_the_middle(stop):
    """The caches have then read no more than what was handed out, and at most one token less."""
    model, prompt = model_of("released layout"), copying(30, seed=4)
    cache = ksa_mlx.make_cache(model, 6)
    steps = lookup_step(
        mx.array(prompt), model, PromptLookup(), mx.default_stream(mx.default_device()),
        num_draft_tokens=6, max_tokens=60, prompt_cache=cache,
    )  # fmt: skip
    said = [t for t, _, _ in itertools.islice(steps, 20 + stop)]
    steps.close()
    (read,) = {c.offset for c in cache}
    assert len(prompt) + len(said) - 1 <= read <= len(prompt) + len(said)
    text = [*(prompt + said)[:read], 5, 6]
    expected = model(mx.array([text]))[:, read:]
    assert mx.abs(model(mx.array([text[read:]]), cache=cache) - expected).max() < 1e-3


@pytest.mark.slow
def test_sampled_texts_have_the_same_distribution():
    """Three sampled tokens behind a prompt that invites drafts: counts as without them."""
    model, prompt = build(seed=3), [5, 6, 7, 8, 5, 6, 7, 8, 5, 6]
    sampler, counts = make_sampler(temp=4.0), []
    for way in (plain, lambda *a, **k: looked_up(a[0], a[1], a[2], 4, **k)[0]):
        mx.random.seed(1)
        counts.append(Counter(tuple(way(model, prompt, 2, sampler=sampler)) for _ in range(500)))
    for position in (0, 1):
        tallies = [Counter() for _ in counts]
        for tally, count in zip(tallies, counts, strict=True):
            for text, n in count.items():
                tally[text[position]] += n
        likely = [t for t, n in (tallies[0] + tallies[1]).items() if n >= 20]
        assert len(likely) > 5
        chi = sum((tallies[0][t] - tallies[1][t]) ** 2 / (tallies[0][t] + tallies[1][t])
                  for t in likely)  # fmt: skip
        # Six standard deviations of a chi-square of so many.
        assert chi < len(likely) + 6 * (2 * len(likely)) ** 0.5, position


def test_refused(notebook_models, capsys):
    model = str(notebook_models[0])
    for flags, says in (
        (["--prompt-lookup", "0"], "--prompt-lookup: found 0, expected 1 to 64"),
        (["--prompt-lookup", "4", "--draft-model", model], "not together with --draft-model"),
        (["--prompt-lookup", "4", "--num-draft-tokens", "2"], "needs --draft-model"),
    ):
        assert main(["--model", model, "--prompt", "a", *flags]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: --") and says in line
    model = model_of("released layout")
    with pytest.raises(ValueError, match="not trimmable, expected a rollback"):
        looked_up(model, [1, 2], 3, 2, cache=ksa_mlx.make_cache(model))


@pytest.mark.slow
def test_a_conversation_and_the_server(notebook_models, tmp_path, capsys):
    """Turns on one cache, and requests on the server's: the answers are those without drafts."""
    model, tokenizer = ksa_mlx.load(notebook_models[0])
    about = {"system_prompt": notes(), "max_tokens": 15}
    without = Session(model, tokenizer, "m", **about)
    drafted = Session(model, tokenizer, "m", **about, draft_model=PromptLookup())
    for question in ("What is the phone of Hugo?", "What is the phone of Hugo?", "Why?"):
        assert "".join(without.answer(question)) == "".join(drafted.answer(question))
        assert drafted.tokens[-1] == without.tokens[drafted.offset - 1]
        assert {c.offset for c in drafted.cache} == {drafted.offset}
    assert "Prompt lookup: proposed" in report(drafted)
    ask = ["--model", str(notebook_models[0]), "--prompt", notes(8), "--max-tokens", "40"]
    ask += ["--ignore-chat-template", "--verbose", "False"]
    assert main(ask) == 0
    expected = capsys.readouterr().out
    assert main([*ask, "--prompt-lookup", "6"]) == 0
    assert capsys.readouterr().out == expected
    bodies = [{"prompt": "\n".join(notebook.notes().splitlines()[:n]), "max_tokens": 20 + n}
              for n in (2, 9, 9, 20)]  # fmt: skip
    with serving(OURS, notebook_models[0], tmp_path / "log", "--prompt-lookup", "6") as server:
        for body in bodies:
            parts = stream_generate(model, tokenizer, body["prompt"], body["max_tokens"])
            assert server.ask(body)["text"] == "".join(r.text for r in parts)
