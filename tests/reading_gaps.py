"""What a long prompt does to the answers that run, and they to it, in the real server.

    python -m tests.reading_gaps                      # the notebook model in float32, 32,000 tokens
    python -m tests.reading_gaps --model FOLDER --steps mlx-lm

Streams run; then a prompt is read beside them. Prints the streams' longest silences before and
meanwhile, the time to the prompt's first token alone and beside them, and the longest silence of
the waiting client, comments included.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import threading
import time
from contextlib import closing
from pathlib import Path

from ksa_mlx import __main__ as command
from ksa_mlx.chat import notebook
from ksa_mlx.convert import convert
from ksa_mlx.stock import pacing

from ._server import ENDLESS, serving


class Stream(threading.Thread):
    """A streaming request: when each line came; `first` is when the first token did."""

    def __init__(self, server, body: dict):
        super().__init__(daemon=True)
        self.server, self.body = server, body
        self.lines: list[tuple[float, str]] = []
        self.begun, self.first, self.over = threading.Event(), 0.0, False
        self.asked = time.monotonic()
        self.start()

    def run(self):
        connection, response = self.server.send({**self.body, "stream": True})
        with closing(connection):
            if response.status != 200:
                raise RuntimeError(f"{response.status}: {response.read()!r}")
            for line in response:
                if line.strip():
                    self.lines.append((time.monotonic(), line.decode().strip()))
                if line.startswith(b"data: {") and not self.first:
                    if "error" in json.loads(line[6:]):
                        raise RuntimeError(line)
                    self.first = time.monotonic()
                    self.begun.set()
                if self.over:
                    return

    def heard(self, begin: float, end: float, start: str = "") -> list[float]:
        """When lines that start so came between two moments."""
        return [t for t, line in list(self.lines) if begin < t < end and line.startswith(start)]

    def silence(self, begin: float, end: float, start: str = "") -> float:
        """The longest time without one of them."""
        times = [begin, *self.heard(begin, end, start), end]
        return max(b - a for a, b in itertools.pairwise(times))


def prompt(tokens: int, ids: int, seed: int) -> list[int]:
    pick = random.Random(seed)
    return [pick.randrange(10, ids) for _ in range(tokens)]


def measure(server, tokens: int, ids: int, streams: int) -> dict:
    """Seconds, by name; and the comments that the waiting client got."""
    body = {"prompt": prompt(tokens, ids, 1), "max_tokens": 1}
    alone = Stream(server, body)
    alone.join()
    running = [Stream(server, {**ENDLESS, "prompt": [10 + i]}) for i in range(streams)]
    for one in running:
        if not one.begun.wait(60):
            raise RuntimeError("a stream did not begin")
    begin = time.monotonic()
    time.sleep(5)
    quiet = time.monotonic()
    beside = Stream(server, {**body, "prompt": prompt(tokens, ids, 2)})
    beside.join()
    pieces = sum(len(one.heard(beside.asked, beside.first, "data")) for one in running)
    for one in running:
        one.over = True
    return {
        "alone": alone.first - alone.asked,
        "beside": beside.first - beside.asked,
        "gap before": max(one.silence(begin, quiet, "data") for one in running),
        "gap": max(one.silence(beside.asked, beside.first, "data") for one in running),
        "pieces a second": pieces / (beside.first - beside.asked) / max(streams, 1),
        "silence": beside.silence(beside.asked, beside.first),
        "comments": [line for _, line in beside.lines if line.startswith(":")],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model")
    parser.add_argument("--tokens", type=int, default=32_000)
    parser.add_argument("--ids", type=int, default=1500, help="the prompts' ids are below")
    parser.add_argument("--streams", type=int, default=2)
    parser.add_argument("--steps", choices=["ours", "mlx-lm"], default="ours")
    flags = parser.parse_args()
    which = ("ksa_mlx", "server") if flags.steps == "ours" else ("tests.reading_gaps", "fixed")
    with tempfile.TemporaryDirectory() as folder:
        model = flags.model or f"{folder}/model"
        if not flags.model:
            convert(str(notebook.CHECKPOINT), model, dtype="float32")
        with serving(which, model, Path(folder) / "log") as server:
            found = measure(server, flags.tokens, flags.ids, flags.streams)
    comments = found.pop("comments")
    print(", ".join(f"{name} {value:.2f}" for name, value in found.items()))
    print(f"{len(comments)} comments: {' '.join(comments[:2] + comments[-1:])}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["fixed"]:  # the server, with mlx-lm's steps
        pacing.PacedGenerator._next = pacing.BatchGenerator._next
        sys.argv[1:2] = ["server"]
        sys.exit(command.main())
    main()
