"""Prompt caches are written behind the server's back: no token waits for the disk."""

import logging
from threading import Condition, Thread
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from ..errors import one_line
from ..memory.caches import arrays
from .disk import Disk


class _Job(NamedTuple):
    identity: str
    tokens: list[int]
    caches: list[Any]
    trimmable: bool
    nbytes: int

    def serves_for(self, other: "_Job") -> bool:
        n = len(other.tokens)
        same = self.identity == other.identity and self.tokens[:n] == other.tokens
        return same and (self.trimmable or len(self.tokens) == n)


class Writer:
    """Writes prompt caches to a `Disk` in a thread of its own, one after the other.

    What waits is held in memory, `most` jobs of it: a disk that is slower than the server loses
    the oldest.
    """

    def __init__(self, disk: Disk, most: int):
        self.disk, self.most = disk, max(most, 1)
        self.waiting: list[_Job] = []
        self._busy = self._ends = False
        self._change = Condition()
        self._thread = Thread(target=self._run, name="prompt caches", daemon=True)
        self._thread.start()

    def keep_within(self, n_bytes: int):
        """Let no more than so many bytes wait."""
        with self._change:
            while sum(job.nbytes for job in self.waiting) > n_bytes:
                del self.waiting[0]

    def put(self, identity: str, tokens: list[int], caches: list[Any], trimmable: bool):
        """Have caches written, which nobody may change any more; from the generation thread.

        What is still to be computed of them is computed here: the other thread only reads.
        """
        still = [type(c).from_state(tree_map(_contiguous, c.state)) for c in caches]
        parts = arrays([c.state for c in still])
        mx.async_eval(parts)
        job = _Job(identity, list(tokens), still, trimmable, sum(x.nbytes for x in parts))
        with self._change:
            self.waiting = [w for w in self.waiting if not job.serves_for(w)] + [job]
            del self.waiting[: -self.most]
            self._change.notify_all()

    def close(self):
        """Write what waits, and end."""
        with self._change:
            self._ends = True
            self._change.notify_all()
        self._thread.join()

    def wait(self):
        """Wait until nothing waits to be written."""
        with self._change:
            self._change.wait_for(lambda: not self.waiting and not self._busy)

    def _run(self):
        while True:
            with self._change:
                self._change.wait_for(lambda: self.waiting or self._ends)
                if not self.waiting:
                    return
                job, self._busy = self.waiting.pop(0), True
            try:
                self.disk.write(*job[:4])
            except (OSError, RuntimeError, ValueError) as e:
                logging.warning(f"{self.disk.folder}: a prompt cache is not kept ({one_line(e)})")
            del job
            with self._change:
                self._busy = False
                self._change.notify_all()


def _contiguous(x: Any) -> Any:
    # Keys and values: numbers of a state are there already, and are looked at at once.
    return mx.contiguous(x) if isinstance(x, mx.array) and x.ndim > 1 else x
