"""python -m ksa_mlx server --prompt-cache-dir: what was read before a restart is not read again."""

import signal
import subprocess
import sys
import time

import pytest

from ksa_mlx.chat import notebook

from ._server import OURS, Server, environment

NOTES = notebook.notes()
FLAGS = ("--log-level", "WARNING", "--prompt-cache-dir")


def request(question):
    system = {"role": "system", "content": NOTES}
    return {"messages": [system, {"role": "user", "content": question}], "max_tokens": 8}


FIRST, SECOND = map(request, ("What is the badge of Olga?", "What is the hotel of Olga?"))


def files(folder):
    return list(folder.glob("prompt-*.safetensors"))


@pytest.mark.slow
@pytest.mark.feature(
    "Server, prompt caches that outlive it",
    "`python -m ksa_mlx server --prompt-cache-dir DIR`",
    "works with our command, also after `kill -9` (`python -m tests.kills`); `mlx_lm.server` has no "
    "such flag (mlx-lm#1178)",
)
def test_a_restart(notebook_models, tmp_path):
    folder = tmp_path / "caches"
    server = Server(OURS, notebook_models[0], tmp_path / "log", *FLAGS, folder)
    try:
        answer = server.wait().ask(FIRST, chat=True)
        assert not answer["cached"] and answer["prompt_tokens"] > 2900
        until = time.monotonic() + 20
        while len(files(folder)) < 3 and time.monotonic() < until:
            time.sleep(0.05)
        server.process.kill()
        server.process.wait()
        # The notes, the question behind them, and the answer.
        assert len(files(folder)) == 3

        server = Server(OURS, notebook_models[0], tmp_path / "log", *FLAGS, folder).wait()
        again = server.ask(FIRST, chat=True)
        assert again["text"] == answer["text"]
        assert again["cached"] > 0.99 * answer["prompt_tokens"]
        other = server.ask(SECOND, chat=True)
        assert other["cached"] > 2800 and "Tokyo" in other["text"]
        # What is not written yet is when it ends.
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 128 + signal.SIGTERM
        assert len(files(folder)) == 5 == len(list(folder.iterdir()))
        assert "Traceback" not in server.log.read_text()
    finally:
        server.stop()


@pytest.mark.slow
def test_kills():
    """A few of `python -m tests.kills`."""
    argv = [sys.executable, "-m", "tests.kills", "--kills", "8", "--seed", "1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, env=environment())
    assert done.returncode == 0, done.stdout + done.stderr
    hits = int(done.stdout.split(" answers, ")[1].split(" from files")[0])
    assert hits > 0 and ", 0 wrong; faults: 0" in done.stdout
