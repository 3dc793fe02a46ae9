"""A real server process on loopback, and a plain HTTP client for it."""

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STOCK = ("mlx_lm", "server")
OURS = ("ksa_mlx", "server")

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
# It goes on and on: the same token is always chosen.
ENDLESS = {"prompt": "The", "max_tokens": 10**9, "logit_bias": {"100": 100}}


def environment(**extra) -> dict:
    """The environment of a command that finds this checkout and no network."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **extra}


class Server:
    """`python -m COMMAND --model FOLDER ...` until `stop`; logs go to a file."""

    def __init__(self, command, model, log, *argv, env=None):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.log = Path(log)
        argv = ["-m", *command, "--model", str(model), "--port", str(self.port), *argv]
        with open(self.log, "wb") as f:
            self.process = subprocess.Popen(
                [sys.executable, *argv], stdout=f, stderr=f, env=environment(**(env or {}))
            )

    def wait(self, seconds: float = 120):
        """Wait until the port answers."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError):
                status, _ = self.get("/health")
                if status == 200:
                    return self
            time.sleep(0.1)
        raise RuntimeError(f"the server did not start:\n{self.log.read_text()[-3000:]}")

    def stop(self):
        self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    @property
    def resident(self) -> int:
        """Bytes of the process in memory."""
        pid = self.process.pid
        if Path("/proc/self/statm").exists():
            return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()
        return int(subprocess.check_output(["ps", "-o", "rss=", "-p", str(pid)])) * 1024

    def connect(self, timeout: float = 120):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def get(self, path):
        with contextlib.closing(self.connect(5)) as c:
            c.request("GET", path)
            r = c.getresponse()
            return r.status, r.read()

    def _post(self, body: dict, chat: bool):
        c = self.connect()
        path = "/v1/chat/completions" if chat else "/v1/completions"
        c.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        return c

    def send(self, body: dict, chat: bool = False):
        """Send a request; returns the connection and its response."""
        c = self._post(body, chat)
        return c, c.getresponse()

    def send_only(self, body: dict, chat: bool = False):
        """Send a request and hang up at once."""
        self._post(body, chat).close()

    def ask(self, body: dict, chat: bool = False) -> dict:
        """The whole answer. Raises if the server refuses or hangs up."""
        connection, response = self.send(body, chat)
        with contextlib.closing(connection):
            data = json.loads(response.read())
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {data}")
        choice = data["choices"][0]
        return {
            "text": choice["message"]["content"] or "" if chat else choice["text"],
            "why": choice["finish_reason"],
            **data["usage"],
            "cached": data["usage"].get("prompt_tokens_details", {}).get("cached_tokens"),
        }

    def stream(self, body: dict, chat: bool = False, hang_up_after=None) -> dict:
        """An answer as it comes, in pieces; hangs up after so many of them if told."""
        connection, response = self.send({**body, "stream": True}, chat)
        pieces, why = [], None
        with contextlib.closing(connection):
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()}")
            for line in response:
                if not line.startswith(b"data: "):
                    continue
                if line.strip() == b"data: [DONE]":
                    break
                choice = json.loads(line[6:])["choices"][0]
                pieces.append(choice["delta"].get("content", "") if chat else choice["text"])
                why = choice["finish_reason"] or why
                if hang_up_after is not None and len(pieces) >= hang_up_after:
                    return {"text": "".join(pieces), "why": None, "pieces": len(pieces)}
            else:
                raise RuntimeError("the server hung up in the middle of an answer")
        return {"text": "".join(pieces), "why": why, "pieces": len(pieces)}


@contextlib.contextmanager
def serving(*args, **kwargs):
    server = Server(*args, **kwargs)
    try:
        yield server.wait()
    finally:
        server.stop()


def post(server, body, path=TEXT, headers=None):
    """The status and the answer, whatever it is."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.closing(server.connect(60)) as c:
        c.request("POST", path, raw, headers or {})
        response = c.getresponse()
        return response.status, json.loads(response.read())


def busy(server, seconds=1.5):
    """CPU ticks of the server's process in a while."""
    if not os.path.exists("/proc/self/stat"):
        pytest.skip("reads /proc")

    def ticks():
        with open(f"/proc/{server.process.pid}/stat") as f:
            return sum(map(int, f.read().rsplit(")", 1)[1].split()[11:13]))

    before = ticks()
    time.sleep(seconds)
    return ticks() - before
