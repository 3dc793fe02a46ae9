"""What the generation thread puts for one request, and the connection's thread takes."""

from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

from mlx_lm.server import GenerationContext, Response

# Called a few times a second while something is waited for.
Tick = Callable[[], None]


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
        self.state = "waiting"

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

    def context(self, tick: Tick = lambda: None) -> GenerationContext:
        item = self._take(tick)
        while not isinstance(item, GenerationContext):
            item = self._take(tick)
        self._has_read(0, len(item.prompt) - max(item.prompt_cache_count, 0))
        return item

    def tokens(self, tick: Tick = lambda: None) -> Iterator[Response]:
        while (item := self._take(tick)) is not None:
            if isinstance(item, tuple):
                self._has_read(*item)
            else:
                self.state = "answering"
                yield item

    def _has_read(self, done: int, rest: int):
        """So many tokens of the rest behind what was cached."""
        cached = max(self.ctx.prompt_cache_count, 0) if self.ctx else 0
        self.state = f"read {cached + done} of {cached + rest} tokens"

    def _take(self, tick: Tick) -> Any:
        while True:
            if self.hung_up():
                raise HungUp
            tick()
            try:
                item = self.get(timeout=0.25)
            except Empty:
                if not self.alive():
                    raise RuntimeError("generation thread died") from None
                continue
            if isinstance(item, Exception):
                raise item
            return item
