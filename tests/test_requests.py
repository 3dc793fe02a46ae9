"""What a client of the server may send, without a server: fields, stop words, log-probabilities."""

import json
from types import SimpleNamespace

import pytest
from mlx_lm.generate import TextStateMachine

from ksa_mlx.errors import RequestError
from ksa_mlx.stock.answer import StopText, text_logprobs
from ksa_mlx.stock.requests import check_against, parse

FLAGS = SimpleNamespace(
    max_tokens=512, temp=0.0, top_p=1.0, top_k=0, min_p=0.0, num_draft_tokens=3, draft_model=None
)
ASK = {"messages": [{"role": "user", "content": "hi"}]}


def read(body, chat=True, **flags):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return parse(raw, chat, SimpleNamespace(**{**vars(FLAGS), **flags}))


def refused(body, chat=True) -> RequestError:
    with pytest.raises(RequestError) as e:
        read(body, chat)
    message = str(e.value)
    assert "\n" not in message and len(message) < 300
    assert e.value.param is None or message.startswith(e.value.param)
    return e.value


@pytest.mark.parametrize(
    "raw",
    [
        *(
            b"",
            b"{",
            b"[]",
            b"null",
            b"5",
            b"\xff{}",
            b"[" * 100_000,
            b'{"a": 1' + b"0" * 5000 + b"}",
        ),
        *(b'{"a": NaN}', b'{"seed": Infinity}', b'{"prompt": "\\ud800"}', b'{"\\udfff": 1}'),
    ],
)
def test_bodies_that_are_no_objects(raw):
    assert refused(raw).param is None


# field, values that are refused, values that are served
FIELDS = {
    "max_tokens": ([0, -1, 1.5, "5", True, [1]], [1, 10**30, None]),
    "max_completion_tokens": ([0, "5", 2.0], [7, None]),
    "temperature": ([-0.1, "1", 1e300, True, {}], [0, 2, 1e-300, None]),
    "top_p": ([-0.1, 1.1, "1"], [0, 1, 0.5]),
    "top_k": ([-1, 0.5, "3"], [0, 40]),
    "min_p": ([-0.1, 1.1], [0, 0.5]),
    "num_draft_tokens": ([0, -1, 1e3], [1, 300]),
    "repetition_penalty": ([-1, 1e-9, 1e9], [0, 1.1]),
    "repetition_context_size": ([0, -1, 0.5], [20]),
    "presence_penalty": ([1e9, "1"], [-2, 2.0]),
    "frequency_penalty": ([-1e9, []], [-2, 2.0]),
    "xtc_probability": ([-1, 2], [0, 1]),
    "xtc_threshold": ([0.6, -1], [0, 0.5]),
    "top_logprobs": ([21, -2, "1"], [0, 5]),
    "logprobs": ([1, "yes"], [True, False, None]),
    "n": ([0, 65, "2", 1.0], [1, 3]),
    "best_of": ([2, "1"], [1, None]),
    "seed": ([-1, 2**64, 0.5, "1", True], [0, 2**64 - 1, None]),
    "stream": ([1, "true"], [True, False, None]),
    "stream_options": ([5, {"include_usage": 1}], [{"include_usage": True}, {}, None]),
    "stop": ([5, [5], [["a"]], "", [""], {"a": 1}, ["a"] * 65], ["a", ["a", "b"], [], None]),
    "logit_bias": (
        [5, {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 1e9}, {"1": None}, {"9" * 12: 1}, {"²": 1}],
        [{"5": 1}, {"5": -100.0}, {}, None],
    ),
    "model": ([5, ["a"]], ["default_model", None]),
    "draft_model": ([5, "other"], ["default_model", None]),
    "adapters": ([5], [None]),
    "role_mapping": ([5, {"user": 5}], [{"user": "U: "}, None]),
    "chat_template_kwargs": ([5, "a"], [{"enable_thinking": False}, None]),
    "tools": (
        [5, [5], [{}], [{"type": "function", "function": {}}]],
        [[], None, [{"type": "function", "function": {"name": "f"}}]],
    ),
    "tool_choice": (["required", {"type": "function"}, 5], ["auto", "none", None]),
    "response_format": ([{"type": "json_object"}, 5], [{"type": "text"}, None]),
    "echo": ([True], [False, None]),
    "suffix": (["x"], ["", None]),
    "functions": ([[{}]], [[], None]),
    "modalities": ([["audio"]], [["text"], None]),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields(field):
    wrong, right = FIELDS[field]
    for value in wrong:
        assert refused({**ASK, field: value}).param.startswith(field), value
    for value in right:
        read({**ASK, field: value})


def test_a_number_beyond_all_floats():
    assert refused(b'{"messages": [], "temperature": 1e999}').param == "temperature"


def test_what_is_absent_is_the_servers():
    found = read(ASK, temp=0.5, max_tokens=9)
    assert found.numbers["temperature"] == 0.5 and found.numbers["max_tokens"] == 9
    assert read({**ASK, "max_tokens": 5, "max_completion_tokens": 6}).numbers["max_tokens"] == 6
    assert read({**ASK, "temperature": 1e-300}).numbers["temperature"] == 0.0
    assert read({**ASK, "draft_model": "d"}, draft_model="d").model == "default_model"


@pytest.mark.parametrize(
    "messages",
    [None, [], {}, "hi", [5], [{}], [{"role": "x", "content": "a"}], [{"role": ["user"]}]]
    + [[{"role": "user", "content": c}] for c in (None, 5, {}, [5], [{"type": "text"}])]
    + [
        [{"role": "user", "content": [{"type": "image_url", "image_url": u}]}]
        for u in (5, {}, None)
    ]
    + [
        [{"role": "assistant", "content": None, "tool_calls": c}]
        for c in (5, [5], [{}], [{"function": {"name": "f", "arguments": "{"}}])
    ],
)
def test_messages_that_are_refused(messages):
    assert refused({"messages": messages}).param.startswith("messages")


def test_messages():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    found = read({
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "5", "tool_call_id": "1"},
        ]
    })  # fmt: skip
    assert [m["role"] for m in found.messages] == ["system", "user", "assistant", "tool"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    assert read({**ASK, "tools": tools}).tools == tools
    assert read({**ASK, "tools": tools, "tool_choice": "none"}).tools is None
    assert refused({**ASK, "tools": tools, "parallel_tool_calls": False})


def test_prompts():
    for prompt, expected in (
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([5, 6], [[5, 6]]),
        ([[5], [6, 7]], [[5], [6, 7]]),
    ):
        assert read({"prompt": prompt}, chat=False).prompts == expected
    for prompt in (
        None,
        5,
        [],
        {},
        [None],
        ["a", 5],
        [5, "a"],
        [5.0],
        [True],
        [[5], ["a"]],
        [[[5]]],
    ):
        assert refused({"prompt": prompt}, chat=False).param == "prompt"
    assert refused({"prompt": ["a"] * 9, "n": 9}, chat=False).param == "prompt"
    assert read({"prompt": "a", "logprobs": 3}, chat=False).numbers["top_logprobs"] == 3
    for value in (21, -1, "1", 1.0):
        assert refused({"prompt": "a", "logprobs": value}, chat=False).param == "logprobs"


def arguments(**fields):
    args = SimpleNamespace(
        logits=SimpleNamespace(logit_bias=None),
        sampling=SimpleNamespace(top_k=0),
        top_logprobs=-1,
        max_tokens=100,
    )
    for name, value in fields.items():
        place = {"logit_bias": args.logits, "top_k": args.sampling}.get(name, args)
        setattr(place, name, value)
    return args


def test_against_the_model():
    """A model that reads the ids 0 to 63, predicts 0 to 59 and has a context of 10."""
    for prompt, fields, says in (
        ([], {}, "found no tokens"),
        ([5, 64], {}, "found the id 64, expected 0 to 63"),
        ([-1, 5], {}, "found the id -1, expected 0 to 63"),
        ([5], {"logit_bias": {60: 1.0}}, "logit_bias: found the id 60, expected 0 to 59"),
        ([5], {"top_k": 60}, "top_k: found 60, expected less than 60"),
        ([5], {"top_logprobs": 60}, "logprobs: found 60, expected less than 60"),
        (
            [5] * 10,
            {},
            "found a prompt of 10 tokens, expected fewer than the model's context of 10",
        ),
    ):
        with pytest.raises(RequestError) as e:
            check_against(prompt, arguments(**fields), 64, 60, 10)
        assert says in str(e.value)
    assert e.value.code == "context_length_exceeded"
    args = arguments(logit_bias={59: 1.0}, top_k=59, top_logprobs=59)
    check_against([0, 63] * 4, args, 64, 60, 10)
    assert args.max_tokens == 2
    check_against([5] * 1000, arguments(), 64, 60, None)


@pytest.mark.parametrize(
    ("words", "pieces", "shown", "held"),
    [
        ([], ["a", "b"], "ab", ""),
        (["END"], ["so E", "N", "D more"], "so ", None),
        (["END"], ["so E", "N"], "so ", "EN"),
        (["END"], ["so E", "NN"], "so ENN", ""),
        (["aab"], ["aa", "ab"], "a", None),
        (["bc", "b"], ["ab", "c"], "a", None),
        (["\n"], ["one\ntwo"], "one", None),
    ],
)
def test_stop_words_in_text(words, pieces, shown, held):
    stop = StopText(words)
    assert "".join(map(stop.add, pieces)) == shown
    assert stop.found if held is None else (not stop.found and stop.held == held)


def test_stop_words_are_still_needed_in_text():
    """mlx-lm takes a stop word that comes in other tokens out of the text, and goes on."""
    machine = TextStateMachine({"normal": [("END", "normal")]})
    _, parts = TextStateMachine.split(machine.make_state("normal"), "so END more")
    text = "".join(t for _, t in parts)
    assert "END" not in text and "so" in text, "mlx-lm does it itself now: remove answer.StopText"


def test_text_logprobs():
    entries = [
        {"token": t, "logprob": p, "top_logprobs": [{"token": t, "logprob": p}]}
        for t, p in (("ab", -1.0), ("c", -2.0))
    ]
    found = text_logprobs(entries, 1, offset=10)
    assert found["tokens"] == ["ab", "c"] and found["token_logprobs"] == [-1.0, -2.0]
    assert found["text_offset"] == [10, 12] and found["top_logprobs"] == [{"ab": -1.0}, {"c": -2.0}]
    assert text_logprobs(entries, 0)["top_logprobs"] is None
