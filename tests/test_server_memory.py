"""python -m ksa_mlx server and generate.py: what does not fit is refused before it is read."""

import threading
import time

import pytest

from ksa_mlx.chat import notebook
from ksa_mlx.checkpoint.load import load
from ksa_mlx.generate import main
from ksa_mlx.memory.room import Room

from ._server import ENDLESS, OURS, post, serving

NOTES = notebook.notes()


@pytest.mark.slow
@pytest.mark.feature(
    "Server, requests beyond the memory",
    "`python -m ksa_mlx server --memory-limit 12GB`",
    "refused by a 400 that says what is needed, what there is and what fits; in `mlx_lm.server` "
    "the process ends (mlx#3186)",
)
def test_the_server_refuses_what_does_not_fit(notebook_models, tmp_path):
    model, tokenizer = load(notebook_models[0])
    prompt = len(tokenizer.encode(NOTES))
    room = Room([model], 1, step=256)
    # For the notes alone, not beside another endless answer.
    limit = room.need((prompt, 8)).total + 1000
    flags = ("--memory-limit", str(limit), "--prefill-step-size", "256", "--log-level", "WARNING")
    with serving(OURS, notebook_models[0], tmp_path / "log", *flags) as server:
        body = {"prompt": NOTES, "max_tokens": 8}
        answer = server.ask(body)["text"]
        status, refused = post(server, {"prompt": NOTES * 2, "max_tokens": 8})
        error = refused["error"]
        assert status == 400 and error["code"] == "insufficient_memory"
        assert "need " in error["message"] and f"{limit / 1e6:.2f} MB" in error["message"]
        assert "what fits: " in error["message"]

        endless = {**ENDLESS, "max_tokens": 500}
        other = threading.Thread(target=server.ask, args=[endless], daemon=True)
        other.start()
        time.sleep(0.5)
        status, refused = post(server, body)
        assert status == 400 and "without 1 other request" in refused["error"]["message"]
        assert other.is_alive()
        other.join()
        assert server.ask(body)["text"] == answer


def test_generate_says_it_before_it_reads(capsys):
    ask = ["--system-prompt", NOTES, "--prompt", "What is the badge of Olga?", "--memory-limit"]
    assert main([*ask, "5MB"]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: prompt: 3,")
    assert "and there are 5.00 MB (--memory-limit); what fits: " in captured.err
    with pytest.raises(SystemExit, match="2"):
        main([*ask, "five"])
    assert "--memory-limit: found 'five', expected a size such as 20GB" in capsys.readouterr().err
