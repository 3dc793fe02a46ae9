"""Ctrl-C, and what must live through it."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def children_spared() -> Iterator[None]:
    """Child processes begun in the block do not see Ctrl-C, which a terminal sends to all; this
    process does, and its handler runs as ever.

    On a CPU, MLX has a compiler write its fused operations. Killed, it leaves no library, which
    MLX (0.32) tries to load all the same: an error where one only wanted to stop. MLX starts it by
    a shell, and Debian's (dash) blocks no signal whatever it inherits: see `compiler_stops`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    done = threading.Event()
    # Children inherit that a signal is blocked. Another thread takes it meanwhile, and Python runs
    # the handler in this one.
    threading.Thread(target=done.wait, daemon=True).start()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        done.set()


@contextmanager
def compiler_stops(pressed: Callable[[], object]) -> Iterator[None]:
    """Where Ctrl-C was `pressed` and took MLX's compiler with it, MLX's error becomes the
    KeyboardInterrupt that it stands for. What was to be compiled is compiled when next needed."""
    try:
        yield
    except RuntimeError as e:
        if "Could not load C++ shared library" in str(e) and pressed():
            raise KeyboardInterrupt from e
        raise
