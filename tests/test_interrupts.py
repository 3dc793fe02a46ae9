"""Ctrl-C goes to a whole group of processes; MLX's compiler, one of them, has to live."""

import signal
import subprocess
import sys

import pytest

from ksa_mlx.interrupts import compiler_stops

# A group of its own, so that the test's lives.
PROGRAM = """
import os, signal, subprocess, time
from contextlib import nullcontext
from ksa_mlx.interrupts import children_spared

seen = []
signal.signal(signal.SIGINT, lambda number, frame: seen.append(time.monotonic()))
with {block}:
    child = subprocess.Popen(["sleep", "1"])
    time.sleep(0.2)
    sent = time.monotonic()
    os.killpg(0, signal.SIGINT)
    while not seen and time.monotonic() < sent + 30:
        time.sleep(0.01)
    answered = seen[0] - sent
    status = child.wait()
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
os.kill(os.getpid(), signal.SIGINT)
print(status, answered < 0.5, len(seen), signal.SIGINT in blocked)
"""


@pytest.mark.parametrize(
    "block, status", [("children_spared()", 0), ("nullcontext()", -signal.SIGINT)]
)
def test_ctrl_c_kills_no_child_and_is_handled_at_once(block, status):
    program = PROGRAM.format(block=block)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, start_new_session=True
    )
    assert done.stdout.split() == [str(status), "True", "2", "False"], done.stderr


def test_a_compiler_that_ctrl_c_killed_is_no_error():
    gone = "Could not load C++ shared library /tmp/mlx/x.so: no such file"
    for message, pressed, expected in (
        (gone, [1], KeyboardInterrupt),
        (gone, [], RuntimeError),
        ("out of memory", [1], RuntimeError),
    ):
        with pytest.raises(expected), compiler_stops(lambda pressed=pressed: pressed):
            raise RuntimeError(message)
