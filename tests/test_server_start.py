"""python -m ksa_mlx server: a start serves or ends, the end is quiet; what stock still needs."""

import http.client
import inspect
import shutil
import signal
import socket
import subprocess
import sys
import time

import mlx_lm.server
import pytest
from huggingface_hub.errors import CacheNotFound
from mlx_lm.server import APIHandler

from ksa_mlx.stock import commands

from ._server import ENDLESS, OURS, STOCK, Server, busy, environment, post, serving


@pytest.fixture
def stock_restored(monkeypatch):
    """Ours takes the place of mlx-lm's classes in its module: only while a test runs."""
    for name in (
        "LRUPromptCache", "ModelProvider", "ResponseGenerator", "BatchGenerator", "APIHandler",
        "run", "argparse",
    ):  # fmt: skip
        monkeypatch.setattr(mlx_lm.server, name, getattr(mlx_lm.server, name))
    monkeypatch.setattr("logging.basicConfig", lambda **kwargs: None)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--port", "99999"], "--port: found 99999, expected 0 to 65535"),
        (["--port", "-5"], "--port: found -5"),
        (["--host", "nosuch.invalid"], "--host nosuch.invalid --port 8080: cannot serve there"),
        (["--model", "./nosuch"], "--model: ./nosuch: no such file or folder"),
        (["--model", "BARE"], "bare: found no tokenizer, such as tokenizer.json"),
        (["--draft-model", "./nosuch"], "--draft-model: ./nosuch: no such file or folder"),
        (["--adapter-path", "./nosuch"], "--adapter-path: ./nosuch: no such folder"),
        (["--kv-bits", "7"], "--kv-bits: found 7, expected 2, 3, 4, 5, 6 or 8"),
        (["--kv-bits", "4", "--kv-group-size", "5"], "--kv-group-size: found 5, expected 32, 64"),
        (["--prompt-lookup", "0"], "--prompt-lookup: found 0, expected 1 to 64"),
        (["--prompt-lookup", "4", "--num-draft-tokens", "5"], "--num-draft-tokens: needs --draft"),
        (["--kv-text-bits", "8"], "--kv-text-bits: needs --kv-bits"),
        (["--kv-bits", "4", "--kv-value-bits", "1"], "--kv-value-bits: found 1, expected 2, 3"),
        (["--prompt-cache-dir", "FILE"], "--prompt-cache-dir: "),
        (["--prompt-cache-disk-size", "1GB"], "--prompt-cache-disk-size: needs --prompt-cache-dir"),
        (["--memory-limit", "0"], "--memory-limit: found 0, expected more than 0"),
        (["--model", "BROKEN", "--port", "0"], "broken/model.safetensors"),
    ],
)
def test_a_start_that_cannot_serve(notebook_models, tmp_path, capsys, stock_restored, flags, says):
    bare = shutil.copytree(
        notebook_models[0], tmp_path / "bare", ignore=shutil.ignore_patterns("token*")
    )
    broken = shutil.copytree(notebook_models[0], tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"x" * 100)
    places = {"BARE": str(bare), "BROKEN": str(broken), "FILE": str(bare / "config.json")}
    flags = [places.get(f, f) for f in flags]
    assert commands.run("server", ["--model", str(notebook_models[0]), *flags]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: server: ") and says in line


@pytest.mark.slow
@pytest.mark.parametrize("wrong", ["the port", "the model"])
def test_a_process_that_cannot_serve_ends(notebook_models, wrong):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1] if wrong == "the port" else 0
        done = subprocess.run(
            [sys.executable, "-m", *OURS, "--model", notebook_models[0], "--port", str(port)],
            capture_output=True,
            text=True,
            timeout=120,
            env=environment(**({} if port else {"KSA_MLX_ROLLBACK": "x"})),
        )
    (line,) = done.stderr.strip().splitlines()
    assert done.returncode == 1
    assert ("Address already in use" if port else "KSA_MLX_ROLLBACK: found 'x'") in line


@pytest.mark.slow
@pytest.mark.parametrize("when", ["at once", "after requests", "in the middle of one"])
def test_ctrl_c(notebook_models, tmp_path, when):
    server = Server(OURS, notebook_models[0], tmp_path / "log")
    try:
        server.wait()
        if when != "at once":
            for seed in (None, 1):
                post(server, {"prompt": "The", "max_tokens": 3, "seed": seed})
        if when == "in the middle of one":
            server._post({**ENDLESS, "max_tokens": 30_000, "seed": 1}, False)
            time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(30) in (0, 130)
    finally:
        server.process.kill()
        server.process.wait()
    log = server.log.read_text()
    assert "Traceback" not in log and "terminate" not in log


# What of this stock mlx-lm still needs


@pytest.mark.slow
def test_stock_still_needs_it(notebook_models, tmp_path):
    """When this fails, look which parts of ksa_mlx/stock/ mlx-lm does itself now."""
    flags = ("--trust-remote-code",)
    with serving(STOCK, notebook_models[0], tmp_path / "log", *flags) as server:
        c = server._post({**ENDLESS, "max_tokens": 10**6}, False)
        time.sleep(0.5)
        c.close()
        time.sleep(1)
        assert busy(server) > 20, "a client that leaves stops its generation: stock/replies.py"
        with pytest.raises((http.client.HTTPException, ConnectionError, RuntimeError)):
            server.ask({"prompt": ["a", "b"], "max_tokens": 3})
        end = time.monotonic() + 20
        while server.get("/health")[0] == 200:
            assert time.monotonic() < end, (
                "requests are checked: stock/requests.py, stock/server.py"
            )
            time.sleep(0.2)
        server.process.kill()


def test_stock_models_still_need_a_hub_cache():
    """mlx-lm#632."""
    assert "scan_cache_dir()" in inspect.getsource(APIHandler.handle_models_request)
    with pytest.raises(CacheNotFound):
        mlx_lm.server.scan_cache_dir("/nosuch")
        pytest.fail("mlx-lm does it itself now: remove handler.handle_models_request")
