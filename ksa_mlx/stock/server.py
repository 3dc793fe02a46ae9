"""mlx_lm.server with a prompt cache that fits KSA models: python -m ksa_mlx server --model FOLDER

All flags are mlx_lm.server's. Without a draft model the stock command serves a KSA model as well
(`mlx_lm.server --model FOLDER --trust-remote-code`): a default cache is not trimmable, so the
server reuses whole cached prefixes only, which it keeps at the end of the system prompt, of the
user's turn and of the answer. What this command changes, as of mlx-lm 0.32: the prompt cache (see
`prompt_cache.py`), and a request's `num_draft_tokens` is cut to the rollback.
"""

import mlx_lm.server

from .prompt_cache import PromptCache


class ResponseGenerator(mlx_lm.server.ResponseGenerator):
    """mlx-lm's, with a request's number of draft tokens within the model's reach.

    mlx-lm rewinds any number of drafts, and a cache that cannot raises (mlx-lm#1446).
    """

    def _serve_single(self, request, *args, **kwargs):
        arguments, rollback = request[-1], getattr(self.model_provider.model, "rollback", 0)
        if rollback:
            arguments.num_draft_tokens = min(arguments.num_draft_tokens, rollback)
        return super()._serve_single(request, *args, **kwargs)


def install():
    """Make mlx_lm.server, in this process, use the classes above."""
    mlx_lm.server.LRUPromptCache = PromptCache
    mlx_lm.server.ResponseGenerator = ResponseGenerator
