"""mlx_lm.server's prompt cache, for caches that take back only so many tokens; and on disk."""

import copy
from collections.abc import Callable
from typing import Any

from mlx_lm.models.cache import (
    LRUPromptCache,
    _BaseCache,
    can_trim_prompt_cache,
    trim_prompt_cache,
)

from ..cache.rollback import settle
from ..cache.rolling import RollingSummaryCache
from .disk import Disk
from .writer import Writer


class _Whole(_BaseCache):
    """Stands behind the layers' caches of an entry: the entry is to be reused whole, or not."""

    nbytes = 0


class PromptCache(LRUPromptCache):
    """mlx-lm's, in which every entry holds what its key says and is taken back only in reach.

    - A prompt that is exactly a cached text leaves nothing to read, and the generation thread dies
      of it (mlx-lm#1215, #1887). Here one token is always left to read.
    - `is_trimmable()` is taken for "any number of tokens" (mlx-lm#1494): shorter prefixes are
      dropped and longer texts trimmed. Caches with a rollback are reused whole only.
    - After speculative decoding an entry's key is the prompt and the answer, while its caches may
      be a token behind (see `rollback.settle`). Here the key is what the caches have read.
    - With a `disk` every entry is written to a file as well, soon and by another thread, and what
      memory has lost, or another server has read, comes from there (mlx-lm#1178).

    Args:
        max_size, max_bytes: of what is in memory, as mlx-lm's.
        disk: where entries are kept besides; None: nowhere.
        identity: says which identity a key of mlx-lm's, `model`, stands for now.
    """

    def __init__(
        self,
        max_size: int = 10,
        max_bytes: int = 1 << 63,
        disk: Disk | None = None,
        identity: Callable[[Any], str] = str,
    ):
        super().__init__(max_size, max_bytes)
        self.most_bytes, self.disk, self.identity = max_bytes, disk, identity
        self.writer = None if disk is None else Writer(disk, max_size)

    def keep_within(self, n_bytes: int):
        """Hold so many bytes at most, until the next call."""
        self.max_bytes = min(max(n_bytes, 0), self.most_bytes)
        self.trim_to(n_bytes=self.max_bytes)
        if self.writer is not None:
            self.writer.keep_within(self.max_bytes)

    def begin(self, model: Any):
        """Look at the files of a model before its first request does."""
        if self.disk is not None:
            self.disk.find(self.identity(model), [])

    def fetch_nearest_cache(self, model: Any, tokens: list[int], *args, **kwargs):
        """A copy of the longest cached prefix, and the tokens behind it, one at least."""
        known = tokens[:-1]
        cache, rest = super().fetch_nearest_cache(model, known, *args, **kwargs)
        if self.disk is not None:
            cache, rest = self._from_disk(model, known, cache, rest)
        if cache is not None and isinstance(cache[-1], _Whole):
            cache = cache[:-1]
        return cache, rest + tokens[-1:]

    def _from_disk(self, model: Any, tokens: list[int], cache: Any, rest: list[int]):
        """The same from a file, if that holds more of it; the file's text is then in memory."""
        assert self.disk is not None
        n, entry = self.disk.find(self.identity(model), tokens)
        known = len(tokens) - len(rest)
        # A few tokens are not worth a file.
        if entry is None or n <= known + known // 16 or (found := self.disk.read(entry)) is None:
            return cache, rest
        text = entry.tokens.tolist()
        marked = found if entry.trimmable else [*found, _Whole()]
        super().insert_cache(model, text, copy.deepcopy(marked))
        if n < len(text):
            trim_prompt_cache(found, len(text) - n)
        return found, tokens[n:]

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], *args, **kwargs):
        """Keep the caches of `tokens`, as far as they have read them."""
        marked = prompt_cache
        if any(isinstance(c, RollingSummaryCache) for c in prompt_cache):
            tokens = tokens[: settle(prompt_cache)]
            if not tokens:
                return
            marked = [*prompt_cache, _Whole()]
        if self.writer is not None:
            trimmable = can_trim_prompt_cache(marked)
            self.writer.put(self.identity(model), tokens, prompt_cache, trimmable)
        super().insert_cache(model, tokens, marked, *args, **kwargs)

    def close(self):
        """Let what is in memory reach the disk."""
        if self.writer is not None:
            self.writer.close()
