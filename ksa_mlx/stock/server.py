"""mlx_lm.server with a prompt cache that fits KSA models: python -m ksa_mlx --model FOLDER

All flags are mlx_lm.server's. Without a draft model the stock command serves a KSA model as well
(`mlx_lm.server --model FOLDER --trust-remote-code`): a default cache is not trimmable, so the
server reuses whole cached prefixes only, which it keeps at the end of the system prompt, of the
user's turn and of the answer. What this command changes, as of mlx-lm 0.32:

- A prompt that is exactly a cached text: stock has nothing left to read, and its generation
  thread dies of it (mlx-lm#1887). Here one token is always left to read.
- A draft model needs caches that take tokens back, and stock takes `is_trimmable()` for "any
  number of tokens": it drops shorter prefixes and trims a longer text to the common prefix. A
  rollback that is exceeded raises, and the request fails. Here such caches are reused whole only.
- After speculative decoding stock files the cache under the prompt and the answer, but it may be
  a token behind (see `rollback.settle`); the next request would go on without that token. Here
  an entry's key is what the caches have read.
- A request's `num_draft_tokens` is cut to the rollback.
"""

from typing import Any

import mlx_lm.server
from mlx_lm.models.cache import LRUPromptCache, _BaseCache

from ..cache.rollback import settle
from ..cache.rolling import RollingSummaryCache


class _Whole(_BaseCache):
    """Stands behind the layers' caches of an entry: the entry is to be reused whole, or not."""

    nbytes = 0


class PromptCache(LRUPromptCache):
    """mlx-lm's prompt cache, for caches that take back only so many tokens."""

    def fetch_nearest_cache(self, model: Any, tokens: list[int]):
        """A copy of the longest cached prefix, and the tokens behind it, one at least."""
        cache, rest = super().fetch_nearest_cache(model, tokens[:-1])
        if cache is not None and isinstance(cache[-1], _Whole):
            cache = cache[:-1]
        return cache, rest + tokens[-1:]

    def insert_cache(
        self,
        model: Any,
        tokens: list[int],
        prompt_cache: list[Any],
        *,
        cache_type: str = "assistant",
    ):
        """Keep the caches of `tokens`, as far as they have read them."""
        if any(isinstance(c, RollingSummaryCache) for c in prompt_cache):
            tokens = tokens[: settle(prompt_cache)]
            if not tokens:
                return
            prompt_cache = [*prompt_cache, _Whole()]
        super().insert_cache(model, tokens, prompt_cache, cache_type=cache_type)


class ResponseGenerator(mlx_lm.server.ResponseGenerator):
    """mlx-lm's, with a request's number of draft tokens within the model's reach."""

    def _serve_single(self, request, *stream):  # mlx-lm 0.31 has no stream
        args, rollback = request[-1], getattr(self.model_provider.model, "rollback", 0)
        if rollback:
            args.num_draft_tokens = min(args.num_draft_tokens, rollback)
        super()._serve_single(request, *stream)


def install():
    """Make mlx_lm.server, in this process, use the classes above."""
    mlx_lm.server.LRUPromptCache = PromptCache
    mlx_lm.server.ResponseGenerator = ResponseGenerator
