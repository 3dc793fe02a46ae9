"""The `openai` Python client against python -m ksa_mlx server."""

import pytest

import ksa_mlx
from ksa_mlx.chat import notebook

from ._server import OURS, serving

openai = pytest.importorskip("openai")

ASK = [{"role": "user", "content": "The badge of Olga is 6967. What is the badge of Olga?"}]


@pytest.fixture(scope="module")
def client(notebook_models, tmp_path_factory):
    log = tmp_path_factory.mktemp("openai") / "log"
    with serving(OURS, notebook_models[0], log) as server:
        yield openai.OpenAI(
            base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
        )


@pytest.fixture(scope="module")
def model(client):
    (only,) = client.models.list().data
    assert client.models.retrieve(only.id).id == only.id
    return only.id


def chat(client, model, **fields):
    return client.chat.completions.create(model=model, messages=ASK, max_tokens=8, **fields)


@pytest.mark.feature("OpenAI's Python client", "`python -m ksa_mlx server`", "works")
def test_chat(client, model):
    whole = chat(client, model)
    (choice,) = whole.choices
    assert choice.message.content.strip() == "6967." and choice.finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    three = chat(client, model, n=3)
    assert [c.index for c in three.choices] == [0, 1, 2]
    assert {c.message.content for c in three.choices} == {choice.message.content}
    assert three.usage.prompt_tokens == whole.usage.prompt_tokens
    drawn = [chat(client, model, temperature=1.5, seed=7).choices[0].message.content for _ in "ab"]
    assert drawn[0] == drawn[1]


def test_stream(client, model):
    chunks = list(chat(client, model, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == chat(client, model).choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 7
    assert chunks[-2].choices[0].finish_reason == "stop"
    texts = {0: "", 1: ""}
    for chunk in client.completions.create(
        model=model, prompt=["My", "Olga"], max_tokens=6, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    both = client.completions.create(model=model, prompt=["My", "Olga"], max_tokens=6)
    assert [c.text for c in both.choices] == [texts[0], texts[1]] and all(texts.values())


def test_completions(client, model, notebook_models):
    _, tokenizer = ksa_mlx.load(notebook_models[0])
    prompts = ["\n".join(notebook.notes().splitlines()[:n]) for n in (3, 20)]
    ids = [tokenizer.encode(p) for p in prompts]
    texts = [
        [c.text for c in client.completions.create(model=model, prompt=p, max_tokens=9).choices]
        for p in (prompts, ids)
    ]
    assert len(texts[0]) == 2 and texts[0] == texts[1]


def test_stop(client, model):
    for stop in ("67", ["nosuch", "67"]):
        (choice,) = chat(client, model, stop=stop).choices
        assert choice.message.content.strip() == "69" and choice.finish_reason == "stop"


def test_logprobs(client, model):
    entries = chat(client, model, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert "".join(e.token for e in entries).strip().startswith("6967.")
    assert all(e.top_logprobs[0].token == e.token and len(e.top_logprobs) == 2 for e in entries)
    found = client.completions.create(model=model, prompt="My", max_tokens=4, logprobs=2)
    found = found.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 4
    chunks = list(chat(client, model, logprobs=True, stream=True))
    streamed = [e for c in chunks for e in (c.choices[0].logprobs.content or ())]
    assert [e.token for e in streamed] == [e.token for e in entries]


def test_tools(client, model):
    """The template knows no tools: they are taken, and the answer is a text."""
    function = {"name": "badge", "parameters": {"type": "object", "properties": {}}}
    tools = [{"type": "function", "function": function}]
    for choice in ("auto", "none"):
        (found,) = chat(client, model, tools=tools, tool_choice=choice).choices
        assert found.message.content.strip() == "6967." and not found.message.tool_calls
    call = {"id": "1", "type": "function", "function": {"name": "badge", "arguments": "{}"}}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "6967"},
    ]
    try:
        found = client.chat.completions.create(model=model, messages=messages, max_tokens=4)
        assert found.choices
    except openai.BadRequestError as e:  # a template that takes no such turns
        assert e.param == "messages"
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, model, tools=tools, tool_choice="required")
    assert e.value.param == "tool_choice"


def test_errors(client, model):
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, model, logit_bias={"99999": 5})
    assert e.value.param == "logit_bias" and e.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as e:
        client.completions.create(model=model, prompt="a " * 40_000)
    assert e.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as e:
        chat(client, "no/such-model")
    assert e.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model=model, input="a")
    with pytest.raises(openai.BadRequestError) as e:
        chat(client, model, response_format={"type": "json_object"})
    assert e.value.param == "response_format"
    assert chat(client, model).choices[0].message.content.strip() == "6967."
