"""python -m ksa_mlx server while it reads: signs of life, running answers, clients that leave."""

import contextlib
import gc
import json
import re
import time

import pytest
from mlx_lm.generate import PromptProcessingBatch

import ksa_mlx
from ksa_mlx.stock.batching import BatchGenerator
from ksa_mlx.stock.pacing import FIRST, RUNNING, SHORTEST, Pace, PacedGenerator

from ._server import ENDLESS, OURS, serving
from .test_server_requests import generator, submitted, text_of  # noqa: F401


def test_pace():
    pace = Pace()
    assert pace.step(0.25, rows=1, longest=2048) == FIRST
    pace.took(FIRST, FIRST / 400)
    assert pace.step(0.25, 1, 2048) == 64  # 100 tokens
    assert pace.step(1.0, 1, 2048) == 256
    assert pace.step(1.0, 3, 2048) == 128  # 400 tokens in three rows
    assert pace.step(1.0, 1, 100) == 100
    assert pace.step(1e-3, 1, 2048) == SHORTEST
    pace.step(1.0, 1, 2048)
    pace.took(3, 0.1)  # the end of a text: 30 a second, of which nothing follows
    assert pace.step(1.0, 1, 2048) == 256
    pace.took(3, 4.0)  # but this was slow
    assert pace.step(1.0, 1, 2048) == SHORTEST


@pytest.fixture
def model(notebook_models):
    return ksa_mlx.load(notebook_models[0])[0]


def answers(batch, prompts, steps):
    """Greedy tokens by prompt; the second and later prompts come when the first answer runs."""
    found = {}

    def insert(prompt, n):
        (uid,) = batch.insert([prompt], [n])
        found[uid] = []

    insert(prompts[0], steps)
    while not found[0]:
        for r in batch.next()[1]:
            found[r.uid].append(r.token)
    for prompt in prompts[1:]:
        insert(prompt, 4)
    while any(len(found[uid]) < (steps if uid == 0 else 4) for uid in found):
        for r in batch.next()[1]:
            found[r.uid].append(r.token)
    return found


@pytest.mark.slow
def test_steps_are_short_in_time(model, monkeypatch):
    """A machine that reads 400 tokens a second: no step of a long prompt holds up the answer for long."""
    steps, read, rate = [], PromptProcessingBatch.prompt, 400

    def slow(self, tokens):
        begin, count = time.perf_counter(), sum(map(len, tokens))
        read(self, tokens)
        time.sleep(max(0.0, count / rate - (time.perf_counter() - begin)))
        steps.append(count)

    prompts = [[20, 21, 22], list(range(30, 330)), list(range(40, 240))]
    expected = answers(BatchGenerator(model), prompts, 120)
    with monkeypatch.context() as patch:
        patch.setattr(PromptProcessingBatch, "prompt", slow)
        assert answers(BatchGenerator(model), prompts, 120) == expected
    assert sum(steps) >= 497 and max(steps) <= RUNNING * rate


def batches():
    return [x for x in gc.get_objects() if issubclass(type(x), PacedGenerator)]


@pytest.mark.slow
def test_a_client_that_leaves_stops_the_reading(generator):  # noqa: F811
    """Its caches are freed, and the next request is answered."""
    others = batches()
    reading = submitted(generator, prompt=list(range(10, 1000)) * 20)
    while not (isinstance(item := reading.get(timeout=60), tuple) and item[0]):
        pass
    at_work = [x for x in batches() if not any(x is other for other in others)]
    assert 0 < item[0] < item[1] == 19_800
    assert any(x.prompt_cache_nbytes for x in at_work)
    reading.abandon()
    end = time.monotonic() + 20
    while any(x.prompt_cache_nbytes for x in at_work) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(x.prompt_cache_nbytes for x in at_work)
    assert reading.empty()
    assert text_of(submitted(generator))


@pytest.fixture(scope="module")
def server(notebook_models, tmp_path_factory):
    with serving(OURS, notebook_models[0], tmp_path_factory.mktemp("reading") / "log") as server:
        yield server


def lines(response, until: str):
    """Seconds since the line before, and the line, to the first one that starts so."""
    last = time.monotonic()
    for raw in response:
        if line := raw.decode().strip():
            now = time.monotonic()
            yield now - last, line
            if line.startswith(until):
                return
            last = now


READ = re.compile(r": read (\d+) of (\d+) tokens")


@pytest.mark.feature(
    "Server, long prompts",
    "`python -m ksa_mlx server`",
    "read in steps of a quarter of a second while answers run; streams hear how far it is, and "
    "whoever leaves stops it ([server.md](server.md))",
)
@pytest.mark.slow
def test_a_stream_says_how_far_its_prompt_is_read(server):
    begin = time.monotonic()
    connection, response = server.send(
        {"prompt": list(range(10, 1010)) * 5, "max_tokens": 2, "stream": True}
    )
    with contextlib.closing(connection):
        silent = [time.monotonic() - begin]
        found = []
        for seconds, line in lines(response, "data: "):
            silent.append(seconds)
            found.append(line)
    assert max(silent) < 2.5  # 2 on a machine that does nothing else
    read = [tuple(map(int, READ.fullmatch(line).groups())) for line in found[:-1]]
    assert read and all(total == 5000 for _, total in read)
    assert [done for done, _ in read] == sorted(done for done, _ in read)
    assert json.loads(found[-1][6:])["choices"][0]["index"] == 0


@pytest.mark.slow
def test_a_stream_that_waits_hears_of_it(server):
    """Behind a request that is served alone; and what is wrong with it is said all the same."""
    connection, first = server.send({**ENDLESS, "seed": 1, "stream": True})
    first.readline()
    waiting = [server.send({"prompt": p, "max_tokens": 2, "stream": True}) for p in ([5], [1536])]
    heard = [list(lines(response, ": ")) for _, response in waiting]
    first.close()
    connection.close()
    for (connection, response), comments, ends in zip(
        waiting, heard, ("data: [DONE]", 'data: {"error"'), strict=True
    ):
        assert comments[-1][1] == ": waiting" and comments[-1][0] < 2.5
        with contextlib.closing(connection):
            assert response.status == 200
            *_, (_, last) = lines(response, ends)
        assert last.startswith(ends)
    assert json.loads(last[6:])["error"]["param"] == "prompt"


@pytest.mark.slow
def test_openai_takes_the_comments(server):
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(
        base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0
    )
    text = {"model": "default_model", "prompt": list(range(11, 1011)) * 4, "max_tokens": 4}
    chunks = list(client.completions.create(**text, stream=True))
    whole = client.completions.create(**text)
    assert "".join(c.choices[0].text for c in chunks) == whole.choices[0].text
