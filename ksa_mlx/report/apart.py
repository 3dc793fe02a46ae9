"""Running a stage, on a Mac in a process of its own, where a hang or a crash costs one case."""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any

from .stage import Found, Options, Stage, measured

CHILD = [sys.executable, "-m", "ksa_mlx.report.child"]
STARTS = 4  # processes of a stage: one, and one after each of three cases that ended it
SETTLING = 30  # seconds that a process may take to start, beside its first case


def run(stage: Stage, options: Options, seconds: float) -> Iterator[tuple[str, Found]]:
    """Names of cases and what they found, as they come; {"error": line} for what failed.

    Without Metal nothing is dangerous: what there is runs here, as processes take seconds to start.
    """
    if options.metal:
        yield from run_apart(stage, options, seconds)
        return
    until = time.monotonic() + seconds
    for name, measure in stage.cases(options).items():
        late = time.monotonic() >= until
        yield name, {"error": "no time was left"} if late else measured(measure)
        if late:
            return


def run_apart(stage: Stage, options: Options, seconds: float) -> Iterator[tuple[str, Found]]:
    """The same in a process.

    A case that crashes its process, or takes longer than it may, is an error, and the stage goes on
    behind it; not after `seconds`, nor after several such cases.
    """
    names, until, at = list(stage.cases(options)), time.monotonic() + seconds, 0
    for _ in range(STARTS):
        with _Child(stage, options, at) as child:
            patience: float = SETTLING
            while at < len(names):
                left = until - time.monotonic()
                event = child.next(max(min(patience, left), 0))
                if event is None or "late" in event:
                    break
                if "found" in event:
                    yield event["case"], event["found"]
                    at += 1
                patience = stage.case_seconds
            else:
                return
            if event is None:
                fault = child.fault()
            elif left <= patience:
                yield names[at], {"error": "no time was left"}
                return
            else:
                fault = f"took more than {patience:.0f} s"
        yield names[at], {"error": fault}
        at += 1


class _Child:
    """A process that runs a stage's cases from one of them on, and says so in lines of JSON."""

    def __init__(self, stage: Stage, options: Options, start: int):
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        what = json.dumps([stage.name, options, start])
        self._process = subprocess.Popen(
            [*CHILD, what],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **stage.env},
            start_new_session=True,
        )
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                event = json.loads(line)
            except ValueError:
                continue  # something that a library printed
            if isinstance(event, dict) and "case" in event:
                self._events.put(event)
        self._events.put(None)

    def next(self, seconds: float) -> dict[str, Any] | None:
        """The next event; {"late": ...} if none came, None when the process has ended."""
        try:
            return self._events.get(timeout=seconds)
        except queue.Empty:
            return {"late": seconds}

    def fault(self) -> str:
        """In one line, how the process ended."""
        code = self._process.wait()
        self._errors.seek(max(self._errors.seek(0, os.SEEK_END) - 4000, 0))
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        how = f"status {code}" if code >= 0 else signal.Signals(-code).name
        return f"its process ended with {how}: {last}"[:200].rstrip(": ")

    def __enter__(self) -> "_Child":
        return self

    def __exit__(self, *_):
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)  # a GPU that hangs may keep it for longer
        self._errors.close()
