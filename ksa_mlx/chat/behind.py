"""One answer behind a cache of `mlx_lm.cache_prompt`."""

from collections.abc import Generator
from pathlib import Path

from ..errors import SessionError
from . import prompt_cache_file
from .session import UNKNOWN, Session


def answer_behind(session: Session, file: Path, text: str) -> Generator[str, None, None]:
    """Answer one question behind a cache of `mlx_lm.cache_prompt`, piece by piece.

    The cache holds the beginning of the user's turn, nobody has told which.
    """
    cache, about = prompt_cache_file.read(file, session.model, session.name)
    if about is not None:
        raise SessionError(f"{file}: found a saved conversation, expected a cache of a prompt")
    if session.draft_model:
        raise SessionError(
            f"{file}: does not say which text it holds, which drafts would need; "
            "a conversation saved with /save does"
        )
    suffix = session.conversation.suffix(text)
    if not suffix:
        raise SessionError("prompt: found zero tokens, expected text")
    session.cache, session.tokens = cache, [UNKNOWN] * cache[0].offset
    prompt = session.tokens + suffix
    return session.go_on(prompt, len(prompt))
