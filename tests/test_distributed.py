"""Several machines: two processes on this one, started by mlx.launch with the ring backend."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ksa_mlx.convert import main as convert

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "ksa_mlx" / "notebook"
TIMEOUT = 400  # seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The embedded model, quantised: five windowed layers, four KV heads."""
    flags = ["--dtype", "float32", "-q", "--q-bits", "8", "--q-group-size", "32"]
    folder = tmp_path_factory.mktemp("models") / "notebook"
    assert convert(["--hf-path", str(NOTEBOOK), "--mlx-path", str(folder), *flags]) == 0
    return folder


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def ring_port() -> int:
    """The first of two free ports in a row."""
    while True:
        port = free_port()
        try:
            with socket.socket() as s:
                s.bind(("127.0.0.1", port + 1))
                return port
        except OSError:
            pass


def launch(*command) -> subprocess.Popen:
    """`mlx.launch -n 2 command`, in a process group of its own."""
    launcher = shutil.which(
        "mlx.launch", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    return subprocess.Popen(
        [
            launcher,
            "-n",
            "2",
            "--backend",
            "ring",
            "-p",
            str(ring_port()),
            "--",
            *map(str, command),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def stop(process: subprocess.Popen) -> str:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.communicate()[0]


@pytest.mark.slow
@pytest.mark.feature(
    "Tensor parallel and pipeline",
    "`mlx_lm.utils.sharded_load`, `mlx_lm.chat`, under `mlx.launch`",
    "works; the KV cache is split",
)
@pytest.mark.feature(
    "Splitting one generation over machines",
    "`mlx_lm.generate` under `mlx.launch`",
    "not possible: mlx-lm loads the whole model in every process; use `chat`, `server` or `sharded_load`",
)
def test_two_processes_compute_what_one_does(folder):
    """Logits, caches and refusals of small models; mlx-lm's generation of a converted one."""
    process = launch(sys.executable, "-m", "tests._distributed_worker", folder)
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
    finally:
        stop(process)
    assert process.returncode == 0, output
    assert sorted(x for x in output.splitlines() if "PASSED" in x) == ["PASSED 0", "PASSED 1"], (
        output
    )


def ask(port: int, path: str, body: dict) -> dict:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/{path}",
        json.dumps({"max_tokens": 8, "temperature": 0, **body}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
        return json.load(response)["choices"][0]


@pytest.mark.slow
@pytest.mark.feature(
    "Server on several machines",
    "`mlx_lm.server`, under `mlx.launch`",
    "works; drafts and adapters are refused by mlx-lm",
)
def test_the_stock_server_on_two_processes(folder):
    port = free_port()
    server = Path(sys.executable).parent / "mlx_lm.server"
    process = launch(server, "--model", folder, "--trust-remote-code", "--port", port, "--pipeline")
    # The badge is told 60 tokens before the end, the window is 32 to 39 tokens long.
    notes = "The badge of Olga is 6967.\n Linh's school: Dublin." + "\n The paper came late." * 8
    chat = [
        {"role": "system", "content": notes},
        {"role": "user", "content": "What is the badge of Olga?"},
    ]
    try:
        end = time.monotonic() + TIMEOUT
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < end
                time.sleep(0.2)
        with ThreadPoolExecutor() as pool:
            answers = pool.map(
                lambda job: ask(port, *job),
                [
                    ("chat/completions", {"messages": chat}),
                    ("completions", {"prompt": "The seat of Felix is"}),
                ],
            )
            first, second = answers
    finally:
        output = stop(process)
    assert first["message"]["content"].strip().startswith("6967."), output
    assert second["text"], output
