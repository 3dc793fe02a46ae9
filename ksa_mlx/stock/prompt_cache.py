"""mlx_lm.server's prompt cache, for caches that take back only so many tokens."""

from typing import Any

from mlx_lm.models.cache import LRUPromptCache, _BaseCache

from ..cache.rollback import settle
from ..cache.rolling import RollingSummaryCache


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
    """

    def __init__(self, max_size: int = 10, max_bytes: int = 1 << 63):
        super().__init__(max_size, max_bytes)
        self.most_bytes = max_bytes

    def keep_within(self, n_bytes: int):
        """Hold so many bytes at most, until the next call."""
        self.max_bytes = min(max(n_bytes, 0), self.most_bytes)
        self.trim_to(n_bytes=self.max_bytes)

    def fetch_nearest_cache(self, model: Any, tokens: list[int], *args, **kwargs):
        """A copy of the longest cached prefix, and the tokens behind it, one at least."""
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1], *args, **kwargs)
        if cache is not None and isinstance(cache[-1], _Whole):
            cache = cache[:-1]
        return cache, rest + tokens[-1:]

    def insert_cache(self, model: Any, tokens: list[int], prompt_cache: list[Any], *args, **kwargs):
        """Keep the caches of `tokens`, as far as they have read them."""
        if any(isinstance(c, RollingSummaryCache) for c in prompt_cache):
            tokens = tokens[: settle(prompt_cache)]
            if not tokens:
                return
            prompt_cache = [*prompt_cache, _Whole()]
        super().insert_cache(model, tokens, prompt_cache, *args, **kwargs)
