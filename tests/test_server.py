"""mlx_lm.server: concurrent clients, its prompt cache, clients that hang up, memory; and a draft."""

import argparse
import copy
import gc
import threading

import mlx.core as mx
import mlx_lm.server
import pytest
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step, speculative_generate_step
from mlx_lm.models.cache import KVCache, LRUPromptCache

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.stock.prompt_cache import PromptCache
from ksa_mlx.stock.server import ResponseGenerator

from ._models import VARIANTS, after_drafts, build, tokens
from ._server import OURS, STOCK, serving
from .soak import soak

NOTES = notebook.notes().splitlines()
SYSTEM = {"role": "system", "content": "\n".join(NOTES[:30])}


def user(text):
    return {"role": "user", "content": text}


@pytest.fixture(scope="module")
def folders(notebook_models):
    return notebook_models


@pytest.fixture(scope="module")
def stock(folders, tmp_path_factory):
    log = tmp_path_factory.mktemp("stock") / "log"
    with serving(STOCK, folders[0], log, "--trust-remote-code") as server:
        yield server


@pytest.fixture(scope="module")
def ours(folders, tmp_path_factory):
    log = tmp_path_factory.mktemp("ours") / "log"
    argv = ("--draft-model", str(folders[1]), "--num-draft-tokens", "4")
    with serving(OURS, folders[0], log, *argv) as server:
        yield server


@pytest.fixture(scope="module")
def alone(folders):
    """The greedy answer of mlx_lm.stream_generate to a request."""
    model, tokenizer = ksa_mlx.load(folders[0])

    def answer(body):
        if "messages" in body:
            prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        else:
            prompt = tokenizer.encode(body["prompt"])
        parts = stream_generate(model, tokenizer, prompt, max_tokens=body["max_tokens"])
        return "".join(r.text for r in parts)

    return answer


@pytest.mark.slow
@pytest.mark.feature("Server, chat and completions", "`mlx_lm.server`", "works")
def test_chat_completions_and_streaming(stock, alone):
    for body in (
        {"prompt": "\n".join(NOTES[40:60]), "max_tokens": 15},
        {"messages": [SYSTEM, user("What is the phone of Hugo?")], "max_tokens": 15},
    ):
        chat, expected = "messages" in body, alone(body)
        assert stock.ask(body, chat)["text"] == expected
        streamed = stock.stream(body, chat)
        assert streamed["text"] == expected and streamed["pieces"] > 2


@pytest.mark.slow
@pytest.mark.feature("Server, concurrent clients (batched)", "`mlx_lm.server`", "works")
def test_concurrent_clients_and_hanging_up(stock, alone):
    """Prompts of all lengths at once; two more clients leave without waiting for their answers."""
    bodies = [
        {"prompt": "\n".join(NOTES[60 : 60 + n]), "max_tokens": 10 + n} for n in (1, 2, 7, 25)
    ]
    expected, got = [alone(b) for b in bodies], {}

    def ask(i):
        got[i] = stock.ask(bodies[i])["text"]

    def leave(after):
        body = {"prompt": "\n".join(NOTES[90:120]), "max_tokens": 200}
        if after:
            stock.stream(body, hang_up_after=after)
        else:
            stock.send_only({**body, "stream": True})

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    threads += [threading.Thread(target=leave, args=(n,)) for n in (0, 3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert [got.get(i) for i in range(4)] == expected
    assert stock.get("/health")[0] == 200


@pytest.mark.slow
@pytest.mark.feature("Server, prompt cache with prefix reuse", "`mlx_lm.server`", "works")
def test_prefix_reuse(stock, alone):
    """The second turn reads what is new only; another question shares the system prompt."""
    first = {"messages": [SYSTEM, user(notebook.QUESTIONS[0][0])], "max_tokens": 15}
    a = stock.ask(first, chat=True)
    said = {"role": "assistant", "content": a["text"]}
    second = {**first, "messages": [*first["messages"], said, user("What is the hotel of Liam?")]}
    b = stock.ask(second, chat=True)
    assert b["cached"] == a["total_tokens"] and b["text"] == alone(second)
    assert b["prompt_tokens"] - b["cached"] < 15
    other = {**first, "messages": [SYSTEM, user("What is the train of Jonas?")]}
    c = stock.ask(other, chat=True)
    assert 380 < c["cached"] < c["prompt_tokens"] and c["text"] == alone(other)


@pytest.mark.slow
@pytest.mark.feature(
    "Speculative decoding in the server",
    "`python -m ksa_mlx server --draft-model`",
    "works with our command; `mlx_lm.server` needs `KSA_MLX_ROLLBACK` and `--prompt-cache-size 0`",
)
def test_with_a_draft(ours, alone):
    """No prefix reuse corrupts an answer or fails a request, however prompts overlap."""
    turns, cached = [SYSTEM], []
    for question in ("What is the phone of Hugo?", "What is the hotel of Liam?", "Who?"):
        turns.append(user(question))
        body = {"messages": turns, "max_tokens": 12}
        got = ours.ask(body, chat=True)
        assert got["text"] == alone(body)
        cached.append(got["cached"])
        turns.append({"role": "assistant", "content": got["text"]})
    assert cached[0] == 0 and cached[1] > 380 and cached[2] > cached[1]

    text = "\n".join(NOTES[:40])
    for prompt, drafts in (
        (text, 1),
        (text[:300], 8),  # a prefix of a cached text, far beyond the rollback
        (text[:700] + " Then something else.", 3),
        (text, 300),  # again, and more drafts than can be taken back
        (text + alone({"prompt": text, "max_tokens": 12}), 2),  # a cached text, exactly
        ("The", 3),
        ("The", 3),
    ):
        body = {"prompt": prompt, "max_tokens": 12}
        got = ours.ask({**body, "num_draft_tokens": drafts})
        assert got["text"] == alone(body), (len(prompt), drafts)
    assert ours.get("/health")[0] == 200


@pytest.mark.slow
def test_stock_with_a_draft(folders, alone, tmp_path):
    """The stock server too, if it keeps no prompt cache."""
    argv = ("--trust-remote-code", "--draft-model", str(folders[1]), "--prompt-cache-size", "0")
    with serving(STOCK, folders[0], tmp_path / "log", *argv, env={"KSA_MLX_ROLLBACK": "8"}) as s:
        for text in ("\n".join(NOTES[:20]), "\n".join(NOTES[:10]), "\n".join(NOTES[:20])):
            body = {"prompt": text, "max_tokens": 12}
            assert s.ask(body)["text"] == alone(body)


@pytest.mark.feature(
    "Server, a prompt that is exactly a cached text",
    "`python -m ksa_mlx server`",
    "works with our command; in `mlx_lm.server` any model's server ends (mlx-lm#1887)",
)
def test_an_exact_hit_leaves_one_token_to_read():
    model, text = build(), tokens(30)[0].tolist()
    stock = LRUPromptCache(4)
    stock.insert_cache("model", text, model.make_cache())
    assert stock.fetch_nearest_cache("model", text)[1] == []  # what its server cannot take
    kept = PromptCache(4)
    cache = model.make_cache()
    model(mx.array([text]), cache=cache)
    kept.insert_cache("model", text, cache)
    assert kept.fetch_nearest_cache("model", text) == (None, text)
    got, rest = kept.fetch_nearest_cache("model", [*text, 5])
    assert rest == [5] and [c.offset for c in got] == [30, 30, 30]
    assert kept.fetch_nearest_cache("model", [5])[1] == [5]
    plain = [KVCache()]
    plain[0].update_and_fetch(*[mx.zeros((1, 1, 30, 8))] * 2)
    kept.insert_cache("plain", text, plain)
    got, rest = kept.fetch_nearest_cache("plain", text)
    assert got[0].offset == len(text) - len(rest) > 0


@pytest.mark.slow
def test_entries_hold_what_their_keys_say():
    """After speculative decoding the caches are a token behind; with rollback prefixes stay."""
    model, draft = build(), build(seed=1, **VARIANTS["different windows"])
    text, kept = tokens(40)[0].tolist(), PromptCache(9)
    for stop in range(1, 8):
        cache, said = after_drafts(model, draft, text, stop)
        kept.insert_cache("model", text + said, cache)
        more = [*text, *said, 7, 8]
        before = copy.deepcopy(kept)
        got, rest = kept.fetch_nearest_cache("model", more)
        assert 2 <= len(rest) <= 4 and len(got) == 6
        answer = speculative_generate_step(
            mx.array(rest), model, draft, num_draft_tokens=3, max_tokens=9, prompt_cache=got
        )
        expected = generate_step(mx.array(more), model, max_tokens=9)
        assert [int(t) for t, *_ in answer] == [int(t) for t, _ in expected], stop
        assert len(kept) == len(before)
    # A longer text that shares a prefix is no hit, as it cannot be taken back so far.
    assert kept.fetch_nearest_cache("model", text[:20]) == (None, text[:20])
    # Caches that cannot be brought together are not kept.
    n = len(kept)
    kept.insert_cache("model", text, ksa_mlx.make_cache(model, 4))
    assert len(kept) == n


@pytest.mark.slow
def test_memory_returns(folders):
    """Once its entries are dropped, the server holds after long requests what it held before."""
    cli = argparse.Namespace(
        model=str(folders[0]),
        adapter_path=None,
        draft_model=None,
        pipeline=False,
        trust_remote_code=False,
        chat_template="",
        use_default_chat_template=False,
        chat_template_args={},
        decode_concurrency=4,
        prompt_concurrency=2,
        prefill_step_size=64,
        prompt_cache_size=10,
        prompt_cache_bytes=None,
        kv_bits=None,
        memory_limit=None,
    )
    gc.collect()
    server = ResponseGenerator(mlx_lm.server.ModelProvider(cli), PromptCache(10))
    try:

        def ask(n):
            arguments = mlx_lm.server.GenerationArguments(
                model=mlx_lm.server.ModelDescription("default_model", "default_model", None),
                sampling=mlx_lm.server.SamplingArguments(0.0, 1.0, 0, 0.0, 0.0, 0.1),
                logits=mlx_lm.server.LogitsProcessorArguments(None, 0.0, 20, 0.0, 20, 0.0, 20),
                stop_words=[],
                max_tokens=5,
                num_draft_tokens=3,
                logprobs=False,
                top_logprobs=-1,
                seed=None,
                chat_template_kwargs=None,
            )
            request = mlx_lm.server.CompletionRequest("text", "\n".join(NOTES[:n]), [], None, None)
            _, answer = server.generate(request, arguments)
            return sum(1 for _ in answer)

        def held():
            server.prompt_cache.trim_to(n_sequences=0)
            gc.collect()
            return mx.get_active_memory()

        assert ask(2) == 5
        before = held()
        for n in (3, 60, 20):
            assert ask(n) == 5
        full = mx.get_active_memory()
        assert full > before + server.prompt_cache.nbytes // 2 > before
        # mlx-lm's loop holds on to its last response: end with the first one again.
        assert ask(2) == 5
        assert held() <= before + 1e5
    finally:
        server.stop_and_join()


@pytest.mark.slow
@pytest.mark.feature(
    "Server, minutes of mixed load", "`mlx_lm.server`", "works (`python -m tests.soak`)"
)
def test_soak():
    """Ten seconds of `python -m tests.soak`."""
    figures = soak(10, clients=6, requests=10, seed=3)
    assert figures["faults"] == []
    assert figures["finished"] >= 6
