"""References: what an answer's tokens attended to, by the definition, and what it is good for."""

import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.chat.notebook import QUESTIONS
from ksa_mlx.chat.report import cache_bytes
from ksa_mlx.chat.session import Session
from ksa_mlx.chat.turns import show_references
from ksa_mlx.references import trace as tracing
from ksa_mlx.references.trace import passages, pieces, question_start, trace_answer
from training.measure_references import Figures, measure
from training.tokenizer import load_tokenizer

from ._chat import ask_once
from ._models import VARIANTS, build, tokens, worst

ROOT = Path(__file__).resolve().parent.parent


def by_definition(model, ids, question, monkeypatch):
    """Attention of every text row by chunk, from `naive.forward`: [(heads, n, chunks)] a layer.
    Text keys from the question on count for no chunk of the context."""
    k, s = model.args.summary_chunk_size, model.args.summary_token_num
    n, softmax, found = len(ids), mx.softmax, []

    def spy(scores, **kwargs):
        weights = softmax(scores, **kwargs)
        found.append(np.array(weights[0, :, :n]))
        return weights

    with monkeypatch.context() as m:
        m.setattr(naive.mx, "softmax", spy)
        mx.eval(naive.forward(model, mx.array([ids])))
    chunk_of = np.concatenate([np.arange(n) // k, np.arange(n // k * s) // s])
    one_hot = np.eye(-(-n // k), dtype=np.float32)[chunk_of]
    one_hot[question : -(-question // k) * k] = 0
    return [weights @ one_hot for weights in found]


# What is recorded


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("prompt, question", [(7, 7), (8, 8), (9, 7), (41, 40), (41, 41), (42, 33)])
def test_trace_is_the_definitions_attention(name, prompt, question, monkeypatch):
    model = build(**VARIANTS[name])
    k, answer = model.args.summary_chunk_size, 7
    ids = tokens(prompt + answer)[0].tolist()
    mass = by_definition(model, ids, question, monkeypatch)
    trace = trace_answer(model, ids[:prompt], ids[prompt:], question, prefill_step_size=16)
    chunks = -(-question // k)
    assert trace.chunks == chunks
    rows = np.array([m[:, prompt - 1 : -1, :chunks] for m in mass])
    np.testing.assert_allclose(trace.attention, rows.mean((1, 2)), atol=1e-5)
    if rows[..., 0].mean() > 0.25:  # a sink
        rows[..., 0] = 0
    np.testing.assert_allclose(trace.by_layer, (rows**2).sum((1, 2)), atol=2e-5)
    token = (rows**2).sum((0, 1))
    kept = np.take_along_axis(token, trace.token_chunks, axis=1)
    np.testing.assert_allclose(trace.token_weights, kept, atol=2e-5)


@pytest.mark.parametrize("name", ["released layout", "two summaries", "full layer inside"])
def test_small_blocks_change_nothing(name, monkeypatch):
    model, ids = build(**VARIANTS[name]), tokens(90)[0].tolist()
    expected = trace_answer(model, ids[:80], ids[80:], 80)
    monkeypatch.setattr(tracing, "BLOCK", 8)
    trace = trace_answer(model, ids[:80], ids[80:], 80)
    np.testing.assert_allclose(trace.by_layer, expected.by_layer, rtol=1e-4, atol=1e-6)


def test_summaries_and_text_are_told_apart():
    model, ids = build(summary_sliding_chunk_num=[2, 2000, 0]), tokens(45)[0].tolist()
    trace = trace_answer(model, ids[:41], ids[41:], 41)
    part = (trace.summaries / trace.by_layer)[:, 1:]
    # Queries 40 .. 43 are in chunk 10.
    np.testing.assert_array_equal(part[0], [1] * 7 + [0] * 3)
    np.testing.assert_array_equal(part[1], [0] * 10)
    np.testing.assert_array_equal(part[2], [1] * 9 + [0])


def quantized(cache):
    return [c.to_quantized(group_size=32, bits=8) for c in cache]


def mixed(cache):
    held = [c.to_quantized(group_size=32, bits=6, text_bits=8) for c in cache]
    assert all(len({one.form.bits for one in c.visible}) == 2 for c in held)
    return held


@pytest.mark.parametrize("form, layout", [(quantized, [1, 2000, 3]), (mixed, [1, 2, 3])])
def test_quantized_caches(form, layout):
    model = build(head_dim=32, summary_sliding_chunk_num=layout)
    ids = tokens(70)[0].tolist()
    expected = trace_answer(model, ids[:60], ids[60:], 60)
    cache = model.make_cache()
    model(mx.array([ids[:50]]), cache=cache)
    trace = trace_answer(model, ids[:60], ids[60:], 60, form(cache))
    assert 0 < np.abs(trace.weights() - expected.weights()).max() < 0.02


def test_a_cache_saves_reading_and_stays_as_it_is():
    model, ids = build(summary_sliding_chunk_num=[1, 2000, 3]), tokens(60)[0].tolist()
    tokenizer = Letters()
    plain = ksa_mlx.references(model, tokenizer, ids[:50], ids[50:])
    cache, other = model.make_cache(), model.make_cache()
    for c in (cache, other):
        model(mx.array([ids[:45]]), cache=c)
    found = ksa_mlx.references(model, tokenizer, ids[:50], ids[50:], cache=cache)
    assert [(r.start, r.stop) for r in found] == [(r.start, r.stop) for r in plain]
    np.testing.assert_allclose([r.weight for r in found], [r.weight for r in plain], rtol=1e-4)
    assert [c.offset for c in cache] == [45] * 3
    # Read on, it gives the very logits that an untouched one gives.
    rest = mx.array([ids[45:]])
    assert mx.array_equal(model(rest, cache=cache), model(rest, cache=other))


def test_nothing_is_left_in_the_model():
    model, ids = build(), tokens(60)
    before, layers = model(ids), list(model.layers)
    trace_answer(model, ids[0, :50].tolist(), ids[0, 50:].tolist(), 50)
    assert all(a is b for a, b in zip(model.layers, layers, strict=True))
    assert all(type(layer).__module__ == "ksa_mlx.model" for layer in model.layers)
    assert mx.array_equal(model(ids), before)
    cache = model.make_cache()
    cached = model(ids, cache=cache)
    assert worst(cached, before) < 1e-3


def test_workspace_at_128k_is_bounded():
    """One full layer and 131,072 keys: what is held grows with the chunks, not with the scores."""
    cache, n, heads = KVCache(), 131072, 8
    cache.keys = mx.random.normal((1, 2, n, 16))
    cache.values, cache.offset = mx.zeros((1, 2, n, 1)), n
    queries = mx.random.normal((1, heads, 8, 16))
    mx.eval(cache.keys, cache.values, queries)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mass = tracing.chunk_mass(queries, cache, 8)
    mx.eval(mass)
    used = mx.get_peak_memory() - before
    assert mass.shape == (heads, 8, n // 8)
    np.testing.assert_allclose(mass.sum(-1), 1, atol=1e-4)
    scores = heads * 8 * n * 4
    assert used < 0.75 * scores, f"{used:,} bytes, all scores at once are {scores:,}"


# References


class Letters:
    """A tokenizer of single letters, for models without one."""

    bos_token = None

    def encode(self, text, add_special_tokens=False):
        return [min(ord(c) - 32, 63) for c in text]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i + 32) for i in ids)


def test_references_of_ids_text_and_layers():
    model, tokenizer = build(), Letters()
    prompt = "SOME NOTES ABOUT A LOCKER AND A GATE.\nWHICH GATE?"
    found = ksa_mlx.references(model, tokenizer, prompt, "GATE 7")
    question = prompt.index("WHICH")
    assert found and all(0 <= r.start < r.stop <= question for r in found)
    assert all(r.text == prompt[r.start : r.stop] for r in found)
    assert [r.weight for r in found] == sorted((r.weight for r in found), reverse=True)
    assert sum(r.weight for r in found) <= 1 + 1e-5
    same = ksa_mlx.references(
        model,
        tokenizer,
        tokenizer.encode(prompt),
        tokenizer.encode("GATE 7"),
        question="WHICH GATE?",
    )
    assert same == found
    layers = ksa_mlx.references(model, tokenizer, prompt, "GATE 7", by_layer=True, top=2)
    assert len(layers) == 3 and all(1 <= len(one) <= 2 for one in layers)
    everything = ksa_mlx.references(model, tokenizer, tokenizer.encode(prompt), "GATE 7", top=99)
    assert sum(r.weight for r in everything) == pytest.approx(1, abs=1e-4)


def test_bad_input():
    model, ids = build(), tokens(30)[0].tolist()
    with pytest.raises(ValueError, match="prompt: found zero tokens"):
        ksa_mlx.references(model, Letters(), [], ids)
    with pytest.raises(ValueError, match="answer: found zero tokens"):
        ksa_mlx.references(model, Letters(), ids, "")
    cache = model.make_cache()
    model(mx.array([ids]), cache=cache)
    with pytest.raises(ValueError, match="cache: found 30 tokens read, expected at most 19"):
        ksa_mlx.references(model, Letters(), ids[:20], ids[20:], cache=cache)
    assert ksa_mlx.references(model, Letters(), ids[:9], ids[9:], question=9) == []
    model.layers[-1].self_attn.n_heads = 2
    with pytest.raises(ValueError, match="found a part of one"):
        ksa_mlx.references(model, Letters(), ids[:20], ids[20:])


def test_passages_join_heavy_neighbours():
    w = np.array([0.01, 0.3, 0.04, 0, 0.2, 0.2, 0.2, 0.03, 0.02, 0.01])
    assert passages(w, 2) == [(1, 3), (4, 8)]
    assert sorted(passages(w, 99)) == [(0, 1), (1, 3), (4, 8), (8, 10)]
    assert passages(np.zeros(4), 3) == [] and passages(np.zeros(0), 3) == []


def test_question_is_the_last_line_or_sentence():
    def start(text):
        ids = [ord(c) for c in text]
        return question_start(lambda t: [ord(c) for c in t], text, ids)

    assert start("A note.\nAnother. And?\n") == len("A note.\n")
    assert start("A note. What is it?") == len("A note. ")
    assert start("What is it?") == 0


def test_pieces_join_to_the_text(loaded):
    _, tokenizer = loaded
    text = "The box of Zoé is 12€ — 日本語 🎉🎉🎉.\n The  gate\tof Omar is B7."
    ids = tokenizer.encode(text)
    for cuts in (range(len(ids) + 1), [0, *range(3, len(ids), 8), len(ids)]):
        parts = list(pieces(tokenizer, ids, cuts))
        assert "".join(parts) == tokenizer.decode(ids) and "\ufffd" not in "".join(parts)


# On the loaded model


@pytest.mark.slow
def test_top_references_hold_the_answers_and_matter(loaded):
    """A small `python -m training.measure_references`: containment, and the deletion test."""
    tokenizer, total = load_tokenizer(ROOT / "ksa_mlx/notebook/tokenizer.model"), Figures()
    for _, figures in measure(loaded[0], tokenizer, (160, 320), notebooks=3, asked=4, seed=3):
        total.add(figures)
    print(total.line("all"))
    assert total.asked >= 20 and total.right >= 6
    assert total.contained >= 0.75 * total.right
    assert total.changed >= 0.6 * total.asked
    assert total.changed > 3 * total.changed_random


def test_first_chunk_counts_unless_it_is_a_sink(monkeypatch):
    model, ids = build(), tokens(60)[0].tolist()
    for limit, counts in ((1.0, True), (0.0, False)):
        monkeypatch.setattr(tracing, "SINK", limit)
        trace = trace_answer(model, ids[:50], ids[50:], 50)
        assert (trace.weights()[0] > 0) == counts and trace.attention[:, 0].min() > 0
        assert ((trace.token_weights[trace.token_chunks == 0] > 0) == counts).all()


@pytest.mark.slow
def test_session_gives_what_a_reading_of_its_own_gives(notebook_models):
    """In float32: in half precision another order of the same sums rounds otherwise."""
    model, tokenizer = loaded = ksa_mlx.load(notebook_models[0])
    session, answer, trace = ask_once(loaded)
    no_answer = {"add_generation_prompt": False}
    assert tokenizer.decode(trace.tokens[trace.prompt_length :]).strip() == answer
    expected = trace_answer(
        model,
        trace.tokens[: trace.prompt_length],
        trace.tokens[trace.prompt_length :],
        len(session.conversation.render(session.conversation.messages[:1], **no_answer)),
    )
    # The session counts the mark of the user to the context: it is in its last chunk.
    chunks = expected.chunks - 1
    assert 0 <= trace.chunks - expected.chunks <= 1
    np.testing.assert_allclose(
        trace.by_layer[:, :chunks], expected.by_layer[:, :chunks], rtol=1e-3, atol=1e-4
    )
    messages = [*session.conversation.messages[:1], {"role": "user", "content": QUESTIONS[0][0]}]
    found = ksa_mlx.references(
        model, tokenizer, messages, trace.tokens[trace.prompt_length :], top=3
    )
    same = trace.references(tokenizer, 3)
    assert [(r.start, r.text) for r in found] == [(r.start, r.text) for r in same]


def test_session_keeps_nothing_when_off(loaded):
    session = Session(*loaded, "notebook", system_prompt="The badge of Olga is 6967.")
    text = "".join(session.answer("What is the badge of Olga?"))
    assert session._said is None
    assert session.trace() is None
    traces = []
    other = Session(*loaded, "notebook", system_prompt="The badge of Olga is 6967.")
    other.on_references = traces.append
    assert "".join(other.answer("What is the badge of Olga?")) == text
    show_references(other)
    assert len(traces) == 1 and other._said is None
    assert other.tokens == session.tokens and cache_bytes(other) == cache_bytes(session)
    again = ["".join(s.answer("And the badge of Olga?")) for s in (session, other)]
    assert again[0] == again[1]


@pytest.mark.slow
def test_command_line(tmp_path):
    file = tmp_path / "page.html"
    command = [sys.executable, "generate.py", "--references", "--references-html"]
    prompt = (
        "The locker of Maria is 4821.\\nThe gate of Omar is B7.\\nThe river was quiet all day.\\n"
        "The hat of Felix is blue.\\nWhat is the locker of Maria?"
    )
    done = subprocess.run(
        [*command, str(file), "-p", prompt], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"^\[\d+%, .*tokens [\d,]+ to [\d,]+\]$", done.stderr, re.MULTILINE)
    assert ">>" in done.stderr and ">>" not in done.stdout
    assert "<main" in file.read_text(encoding="utf-8")
    done = subprocess.run(
        [*command, str(tmp_path / "no" / "page.html"), "-p", prompt],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--references-html" in done.stderr and "Traceback" not in done.stderr
