"""python -m ksa_mlx server: a request is answered or refused, and the next one is answered."""

import json
import shutil
import socket
import sys
import time

import mlx_lm
import mlx_lm.server
import pytest
from mlx_lm import stream_generate
from mlx_lm.generate import BatchGenerator

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.stock.flags import ARGPARSE
from ksa_mlx.stock.prompt_cache import PromptCache
from ksa_mlx.stock.replies import HungUp, Replies
from ksa_mlx.stock.server import ResponseGenerator

from ._convert_helpers import add_tokenizer, hub_folder
from ._server import CHAT, ENDLESS, OURS, TEXT, busy, post, serving

ASK = {
    "messages": [{"role": "user", "content": "The badge of Olga is 6967. What is it?"}],
    "max_tokens": 8,
}


@pytest.fixture(scope="module")
def server(notebook_models, tmp_path_factory):
    place = tmp_path_factory.mktemp("server")
    no_cache = {"HF_HUB_CACHE": str(place / "none")}
    with serving(OURS, notebook_models[0], place / "log", env=no_cache) as server:
        yield server


@pytest.fixture(scope="module")
def alone(notebook_models):
    """The greedy text of a prompt's ids."""
    model, tokenizer = ksa_mlx.load(notebook_models[0])

    def answer(prompt, n):
        ids = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        return "".join(r.text for r in stream_generate(model, tokenizer, ids, max_tokens=n))

    return answer


def texts(answer):
    return [c["text"] for c in sorted(answer["choices"], key=lambda c: c["index"])]


@pytest.mark.feature(
    "Server, requests of all kinds",
    "`python -m ksa_mlx server`",
    "checked and answered with our command: lists of prompts, ids, `n`, `stop`, log-probabilities; "
    "in `mlx_lm.server` one such request ends the service (mlx-lm#1505)",
)
def test_what_is_refused_names_its_field(server):
    for body, path, param, code in (
        ({"prompt": ""}, TEXT, "prompt", None),
        ({"prompt": [5, 1536]}, TEXT, "prompt", None),
        ({"prompt": "x " * 40_000}, TEXT, None, "context_length_exceeded"),
        ({**ASK, "stop": 5}, CHAT, "stop", None),
        ({**ASK, "stop": [["a"]]}, CHAT, "stop", None),
        ({**ASK, "temperature": 1, "top_k": 1536}, CHAT, "top_k", None),
        ({**ASK, "logit_bias": {"1536": 100}}, CHAT, "logit_bias", None),
        ({**ASK, "logit_bias": {"999999": 100}}, CHAT, "logit_bias", None),
        ({**ASK, "seed": -1}, CHAT, "seed", None),
        ({**ASK, "seed": 2**70}, CHAT, "seed", None),
        ({**ASK, "adapters": "nosuch"}, CHAT, "adapters", None),
        ({**ASK, "draft_model": "nosuch"}, CHAT, "draft_model", None),
        ({**ASK, "chat_template_kwargs": {"tokenize": True}}, CHAT, "messages", None),
        ({"messages": []}, CHAT, "messages", None),
        (b"\xff", CHAT, None, None),
        (b"{", TEXT, None, None),
    ):
        status, answer = post(server, body, path)
        assert status == 400, (body, answer)
        error = answer["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]
        assert (error["param"], error["code"]) == (param, code), error
    status, answer = post(server, {**ASK, "model": "no/such"}, CHAT)
    assert status == 404 and answer["error"]["code"] == "model_not_found"
    assert post(server, ASK, "/v1/embeddings")[0] == 404
    assert post(server, b"{}", TEXT, {"Content-Length": "x"})[0] == 400
    assert post(server, b"{}", TEXT, {"Content-Length": str(10**12)})[0] == 413
    assert server.get("/health")[0] == 200


@pytest.mark.slow
def test_what_is_served(server, alone):
    notes = notebook.notes().splitlines()
    prompts = ["\n".join(notes[:n]) for n in (1, 30, 5)]
    status, answer = post(server, {"prompt": prompts, "max_tokens": 12, "n": 2})
    expected = [alone(p, 12) for p in prompts for _ in range(2)]
    assert status == 200 and texts(answer) == expected
    assert answer["usage"]["completion_tokens"] == 6 * 12
    status, answer = post(server, {"prompt": [[7, 8, 9], [9]], "max_tokens": 9})
    assert texts(answer) == [alone([7, 8, 9], 9), alone([9], 9)]
    status, answer = post(server, {"prompt": [7, 8, 9], "max_tokens": 9, "seed": 2**64 - 1})
    assert texts(answer) == [alone([7, 8, 9], 9)]
    model = json.loads(server.get("/v1/models")[1])["data"][0]["id"]
    assert texts(post(server, {"prompt": [9], "max_tokens": 9, "model": model})[1]) == [
        alone([9], 9)
    ]
    assert json.loads(server.get(f"/v1/models/{model}")[1])["id"] == model
    assert server.get("/v1/models/nosuch")[0] == 404


@pytest.mark.slow
def test_the_context_is_kept(notebook_models, tmp_path):
    """A prompt that fills it is refused, a shorter one generates no further than its end."""
    folder = shutil.copytree(notebook_models[0], tmp_path / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 50}))
    with serving(OURS, folder, tmp_path / "log") as server:
        assert post(server, {"prompt": [5] * 50})[1]["error"]["code"] == "context_length_exceeded"
        for length, wanted in ((49, 1), (40, 10), (40, 3)):
            body = {**ENDLESS, "prompt": [5] * length, "max_tokens": 3 if wanted == 3 else 10**12}
            status, answer = post(server, body)
            assert status == 200 and answer["usage"]["completion_tokens"] == wanted
            assert answer["choices"][0]["finish_reason"] == "length"


def test_stop_words(server, alone):
    text = alone("My", 40)
    word = text[13:16]
    before = text[: text.index(word)]
    for stop in (word, ["nosuch", word], [word + "nosuch", word]):
        body = {"prompt": "My", "max_tokens": 40, "stop": stop}
        answer = post(server, body)[1]
        assert texts(answer) == [before] and answer["choices"][0]["finish_reason"] == "stop"
        assert server.stream(body)["text"] == before
    body = {"prompt": "My", "max_tokens": 40, "stop": [text[-3:] + "no"]}
    assert texts(post(server, body)[1]) == [text]  # held back, and text after all


def test_log_probabilities(server, alone):
    body = {"prompt": "My", "max_tokens": 5}
    choice = post(server, {**body, "logprobs": 3})[1]["choices"][0]
    found = choice["logprobs"]
    assert choice["text"] == alone("My", 5) and len(found["tokens"]) == 5
    columns = [found[k] for k in ("tokens", "token_logprobs", "top_logprobs")]
    for token, logprob, top in zip(*columns, strict=True):
        assert len(top) == 3 and max(top.values()) == top[token] == logprob < 0
    assert found["text_offset"][0] == 0 and found["text_offset"] == sorted(found["text_offset"])
    assert "logprobs" not in post(server, body)[1]["choices"][0]
    chat = {**ASK, "logprobs": True, "top_logprobs": 2}
    entries = post(server, chat, CHAT)[1]["choices"][0]["logprobs"]["content"]
    assert all(e["bytes"] == list(e["token"].encode()) for e in entries)
    assert all(e["top_logprobs"][0]["logprob"] == e["logprob"] for e in entries)


@pytest.mark.quick(1)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("alone_in_the_batch", [False, True])
@pytest.mark.slow
def test_a_client_that_leaves_stops_its_generation(server, alone, stream, alone_in_the_batch):
    body = {**ENDLESS, "stream": stream, "max_tokens": 30_000}
    if alone_in_the_batch:  # mlx-lm's other way to generate
        body |= {"seed": 1}
    c = server._post(body, False)
    assert busy(server) > 20
    c.close()
    time.sleep(1)
    assert busy(server) < 20
    answer = post(server, {"prompt": "My", "max_tokens": 5})[1]
    assert texts(answer) == [alone("My", 5)]


def test_clients_that_do_not_finish_their_request(server, alone):
    for raw in (
        b"",
        b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\n",
        b"POST /v1/completions HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
        b"\x00\xff\x16\x03\x01garbage\r\n\r\n",
        b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", server.port), 10) as s:
            s.sendall(raw)
    assert texts(post(server, {"prompt": "My", "max_tokens": 5})[1]) == [alone("My", 5)]


# The generation thread, in this process


@pytest.fixture
def generator(notebook_models):
    flags = vars(mlx_lm_flags("--model", str(notebook_models[0])))
    made = ResponseGenerator(mlx_lm.server.ModelProvider(type("", (), flags)()), PromptCache(4))
    yield made
    made.stop_and_join()


def mlx_lm_flags(*argv):
    """The server's command line as mlx_lm.server reads it."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["server", *argv])
        patch.setattr(mlx_lm.server, "argparse", ARGPARSE)
        patch.setattr("logging.basicConfig", lambda **kwargs: None)
        patch.setattr(mlx_lm.server, "ModelProvider", lambda args: args)
        patch.setattr(mlx_lm.server, "run", lambda host, port, args: found.append(args))
        mlx_lm.server.main()
    return found[0]


def submitted(generator, hung_up=lambda: False, prompt=(7, 8, 9), **fields):
    args = mlx_lm.server.GenerationArguments(
        model=mlx_lm.server.ModelDescription("default_model", "default_model", None),
        sampling=mlx_lm.server.SamplingArguments(
            temperature=0.0, top_p=1.0, top_k=0, min_p=0.0, xtc_probability=0.0, xtc_threshold=0.1
        ),
        logits=mlx_lm.server.LogitsProcessorArguments(
            logit_bias=None,
            repetition_penalty=0.0,
            repetition_context_size=20,
            presence_penalty=0.0,
            presence_context_size=20,
            frequency_penalty=0.0,
            frequency_context_size=20,
        ),
        **{
            "stop_words": [],
            "max_tokens": 5,
            "num_draft_tokens": 3,
            "logprobs": False,
            "top_logprobs": -1,
            "seed": None,
            "chat_template_kwargs": None,
            **fields,
        },
    )
    request = mlx_lm.server.CompletionRequest("text", list(prompt), [], None, None)
    return generator.submit(request, args, hung_up)


def text_of(replies):
    replies.context()
    return "".join(r.text for r in replies.tokens())


def test_a_fault_does_not_end_the_thread(generator, alone, monkeypatch):
    """Wherever it comes from: all requests of that moment fail, and the next one is right."""
    expected = alone([7, 8, 9], 5)
    assert text_of(submitted(generator)) == expected
    for owner, name in (
        (BatchGenerator, "next"),
        (BatchGenerator, "insert_segments"),
        (PromptCache, "fetch_nearest_cache"),
        (mlx_lm.server, "_make_sampler"),
    ):
        with monkeypatch.context() as patch:

            def fail(*args, **kwargs):
                raise RuntimeError("out of\nmemory")

            patch.setattr(owner, name, fail)
            waiting = [submitted(generator) for _ in range(2)]
            for replies in waiting:
                with pytest.raises(RuntimeError, match="out of memory"):
                    text_of(replies)
        assert generator.is_healthy
        assert text_of(submitted(generator)) == expected, name


def test_a_request_that_is_left_while_it_waits(generator):
    """It is never begun or, where mlx-lm had it in hand already, stopped before its first token."""
    here = [False]
    first = submitted(generator, max_tokens=20_000)
    second = submitted(generator, lambda: here[0], seed=1, max_tokens=20_000)
    first.context()
    here[0] = True
    with pytest.raises(HungUp):
        second.context()
    second.abandon()
    first.abandon()
    end = time.monotonic() + 20
    while generator.requests.qsize() and time.monotonic() < end:
        time.sleep(0.05)
    assert text_of(submitted(generator))
    assert second.ctx is None or second.ctx._should_stop
    assert second.empty()


def test_replies_that_nobody_reads():
    replies = Replies(lambda: False, lambda: True)
    stopped = []
    ctx = mlx_lm.server.GenerationContext(False, False, None, None, "normal", [1])
    ctx.stop = lambda: stopped.append(True)
    replies.abandon()
    replies.put(ctx)
    assert stopped and replies.empty()
    replies.put((1, 2))
    replies.alone = True
    with pytest.raises(HungUp):
        replies.put((1, 2))
    dead = Replies(lambda: False, lambda: False)
    with pytest.raises(RuntimeError, match="died"):
        dead.context()


@pytest.mark.slow
def test_a_plain_model(tmp_path):
    """All of this holds for mlx-lm's own models too."""
    folder = hub_folder(tmp_path / "plain", "shared_params", use_summary_attention=None)
    add_tokenizer(folder)
    model, tokenizer = mlx_lm.load(str(folder))
    assert model.model_type == "qwen3"
    width, prompt = model.args.vocab_size, list(range(20))
    right = "".join(r.text for r in stream_generate(model, tokenizer, prompt, max_tokens=6))
    with serving(OURS, folder, tmp_path / "log") as server:
        for body, param in (
            ({"prompt": [width]}, "prompt"),
            ({"prompt": ""}, "prompt"),
            ({"prompt": "w1", "logit_bias": {str(width): 1}}, "logit_bias"),
            ({"prompt": "w1", "temperature": 1, "top_k": width}, "top_k"),
        ):
            status, answer = post(server, body)
            assert (status, answer["error"]["param"]) == (400, param)
            for _ in "ab":  # the second time it is a cached text
                assert texts(post(server, {"prompt": prompt, "max_tokens": 6})[1]) == [right]
