"""What the generation thread puts for one request, and the connection's thread takes."""

from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

from mlx_lm.server import GenerationContext, Response

Progress = Callable[[int, int], None] | None


class HungUp(ConnectionError):
    """The client has left."""


class Replies(Queue):
    """A request's queue: its context, progress, tokens and None, or an exception at any time.

    Args:
        hung_up: says whether the client has left.
        alive: says whether the generation thread still answers.
    """

    def __init__(self, hung_up: Callable[[], bool], alive: Callable[[], bool]):
        super().__init__()
        self.hung_up, self.alive = hung_up, alive
        self.gone = False  # nobody reads any more
        self.answers = self.done = False  # whether the answer has begun, and ended
        self.alone = False  # the generation thread does nothing else meanwhile
        self.ctx: GenerationContext | None = None

    def put(self, item: Any, *args, **kwargs):
        if isinstance(item, GenerationContext):
            self.ctx = item
        self.answers = self.answers or isinstance(item, Response)
        self.done = self.done or item is None or isinstance(item, Exception)
        if not self.gone:
            super().put(item, *args, **kwargs)
            return
        if self.ctx is not None:
            self.ctx.stop()
        if self.alone and isinstance(item, tuple):
            raise HungUp  # out of the reading of a long prompt, where mlx-lm asks nobody

    def abandon(self):
        """Stop the request, wherever it is."""
        self.gone = True
        if self.ctx is not None:
            self.ctx.stop()

    def context(self) -> GenerationContext:
        item = self._take()
        while not isinstance(item, GenerationContext):
            item = self._take()
        return item

    def tokens(self, progress: Progress = None) -> Iterator[Response]:
        while (item := self._take()) is not None:
            if not isinstance(item, tuple):
                yield item
            elif progress is not None:
                progress(*item)

    def _take(self) -> Any:
        while True:
            if self.hung_up():
                raise HungUp
            try:
                item = self.get(timeout=0.25)
            except Empty:
                if not self.alive():
                    raise RuntimeError("generation thread died") from None
                continue
            if isinstance(item, Exception):
                raise item
            return item
