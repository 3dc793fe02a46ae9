"""Thousands of random requests: after each the server is healthy, and right answers stay right.

KSA_MLX_FUZZ=20000 pytest tests/test_server_fuzz.py      # more of them
"""

import contextlib
import http.client
import json
import os
import random
import socket

import pytest

from ksa_mlx.chat import notebook

from ._server import CHAT, OURS, TEXT, post, serving

COUNT = int(os.environ.get("KSA_MLX_FUZZ", 2000))

NOTES = notebook.notes().splitlines()
RIGHT = {"messages": [{"role": "user", "content": NOTES[0] + " What is it?"}], "max_tokens": 6}

ODD = [None, True, False, 0, 1, -1, 2, 3.5, -0.0, 1e300, -1e300, 2**31, 2**63, 2**64, 10**30]
ODD += ["", "a", "5", "\x00", "\ud800", "é👍🏽", "a" * 3000, [], {}, [None], [[]], [{}], {"": None}]
ODD += [["a", "b"], [5, 6], [5, "a"], [1279], [1280], [-1], {"5": 1}, {"1280": 1}, {"type": "text"}]

FIELDS = """model stream stream_options max_tokens max_completion_tokens temperature top_p top_k
min_p num_draft_tokens repetition_penalty repetition_context_size presence_penalty
presence_context_size frequency_penalty frequency_context_size xtc_probability xtc_threshold
top_logprobs logprobs n best_of seed stop logit_bias draft_model adapters role_mapping
chat_template_kwargs tools tool_choice response_format echo suffix user metadata unheard_of""".split()


def sensible(pick: random.Random, field: str):
    """A value that a client could mean."""
    return {
        "stream": lambda: pick.random() < 0.5,
        "stream_options": lambda: {"include_usage": pick.random() < 0.5},
        "temperature": lambda: pick.choice([0, 0.7, 1, 2]),
        # Few values: MLX compiles the sampling for each anew.
        "top_p": lambda: pick.choice([0, 0.5, 0.9]),
        "top_k": lambda: pick.choice([0, 1, 40, 1279, 1280]),
        "min_p": lambda: pick.choice([0, 0.1]),
        "repetition_penalty": lambda: 1 + pick.random(),
        "presence_penalty": lambda: pick.uniform(-2, 2),
        "frequency_penalty": lambda: pick.uniform(-2, 2),
        "xtc_probability": lambda: pick.choice([0, 0.5]),
        "logprobs": lambda: pick.choice([True, 1, 5]),
        "top_logprobs": lambda: pick.randint(0, 20),
        "n": lambda: pick.randint(1, 3),
        "seed": lambda: pick.choice([0, 7, 2**64 - 1]),
        "stop": lambda: pick.choice([".", ["a", "\n"], " ", "e"]),
        "logit_bias": lambda: {str(pick.randint(0, 1600)): pick.uniform(-100, 100)},
        "tools": lambda: [{"type": "function", "function": {"name": "f"}}],
    }.get(field, lambda: None)()


def text(pick: random.Random):
    return pick.choice([
        *("", " ", "\n", "a", "<|user|>", "<|end|><|assistant|>", "\x00\x01", "ü漢字👍🏽\u202e"),
        *(pick.choice(NOTES), "\n".join(pick.sample(NOTES, pick.choice([2, 10, 30])))),
        "".join(chr(pick.randrange(1, 0x2FFF)) for _ in range(pick.randrange(1, 60))),
    ])  # fmt: skip


def a_body(pick: random.Random) -> tuple[str, dict]:
    """A request in which most is as it should be, and something is not."""
    path = pick.choice([CHAT, TEXT])
    body = {"max_tokens": pick.randint(1, 4)}
    if path == TEXT:
        ids = lambda: [pick.randrange(0, 1536) for _ in range(pick.randint(1, 30))]
        odd = lambda: [pick.choice([5, 1535, 1536, -1, 2**40, "a", None]) for _ in range(3)]
        body["prompt"] = pick.choice(
            [lambda: text(pick), lambda: [text(pick), text(pick)], ids, lambda: [ids(), ids()], odd]
        )()
    else:
        roles = ["system", "user", "assistant", "tool", "developer", "nobody"]
        weights = [2, 8, 3, 1, 1, 1]
        body["messages"] = [
            {"role": pick.choices(roles, weights)[0], "content": text(pick)}
            for _ in range(pick.randint(1, 4))
        ]
    for field in pick.sample(FIELDS, pick.choice([0, 0, 1, 2, 5])):
        body[field] = pick.choice(ODD) if pick.random() < 0.5 else sensible(pick, field)
    for name in ("max_tokens", "max_completion_tokens"):
        if isinstance(body.get(name), int) and body[name] > 64:
            body[name] = 64  # more would be right too, and take minutes
    if pick.random() < 0.1:
        body["messages" if path == CHAT else "prompt"] = pick.choice(ODD)
    if pick.random() < 0.05 and path == CHAT:
        body["messages"] = [pick.choice([{"role": "user", "content": pick.choice(ODD)}, *ODD])]
    return path, body


def a_request(pick: random.Random) -> tuple[str, bytes]:
    path, body = a_body(pick)
    raw = json.dumps(body, ensure_ascii=pick.random() < 0.5).encode("utf-8", "surrogatepass")
    spoil = pick.random()
    if spoil < 0.05:
        place = pick.randrange(len(raw))
        raw = raw[:place] + bytes([pick.randrange(256)]) + raw[place + 1 :]
    elif spoil < 0.08:
        raw = raw[: pick.randrange(len(raw))]
    elif spoil < 0.1:
        raw = raw.decode("utf-8", "replace").encode(pick.choice(["utf-16", "utf-32", "utf-7"]))
    elif spoil < 0.11:
        raw = bytes(pick.randrange(256) for _ in range(pick.randrange(200)))
    return path, raw


def leave(server, path, raw, pick: random.Random):
    """Send a part of a request, or all of it, read a part of the answer, or none, and leave."""
    head = f"POST {path} HTTP/1.1\r\nContent-Length: {len(raw)}\r\n\r\n".encode()
    whole = head + raw
    with socket.create_connection(("127.0.0.1", server.port), 30) as s:
        s.sendall(whole[: pick.choice([pick.randrange(1, len(whole)), len(whole)])])
        if pick.random() < 0.3:
            s.settimeout(0.2)
            with contextlib.suppress(OSError):
                s.recv(50)


def ask(server, path, raw) -> int:
    with contextlib.closing(server.connect(120)) as c:
        c.request("POST", path, raw)
        response = c.getresponse()
        answer = response.read()
    if response.status != 200:
        error = json.loads(answer)["error"]
        assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    elif answer.startswith((b"data: ", b": ")):
        assert answer.endswith(b"data: [DONE]\n\n") or b'"error"' in answer
    else:
        assert json.loads(answer)["choices"]
    return response.status


def test_the_same_numbers_make_the_same_requests():
    made = [[a_request(random.Random(seed)) for seed in range(50)] for _ in "ab"]
    assert made[0] == made[1] and len({raw for _, raw in made[0]}) > 40


@pytest.mark.slow
def test_random_requests(notebook_models, tmp_path):
    pick, seen = random.Random(1), {}
    flags = ("--log-level", "ERROR", "--max-tokens", "8")
    with serving(OURS, notebook_models[0], tmp_path / "log", *flags) as server:
        right = post(server, RIGHT, CHAT)[1]["choices"]
        for n in range(COUNT):
            path, raw = a_request(pick)
            if pick.random() < 0.15:
                leave(server, path, raw, pick)
                what = "left"
            else:
                try:
                    what = ask(server, path, raw)
                except (http.client.HTTPException, OSError, AssertionError) as e:
                    raise AssertionError(f"request {n}: {path} {raw!r}") from e
                assert what in (200, 400, 404), (n, raw)
            seen[what] = seen.get(what, 0) + 1
            assert server.get("/health") == (200, b'{"status": "ok"}'), (n, raw)
            if n % 25 == 0:
                assert post(server, RIGHT, CHAT)[1]["choices"] == right, (n, raw)
        assert post(server, RIGHT, CHAT)[1]["choices"] == right
        assert server.process.poll() is None
    print(f"\n{COUNT} requests: {seen}")
    assert seen[200] > COUNT / 5 and seen[400] > COUNT / 5 and seen["left"] > COUNT / 10
    assert "Traceback" not in server.log.read_text()
