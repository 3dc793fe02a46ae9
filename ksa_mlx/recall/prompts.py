"""Texts with questions as token ids: as text that goes on, or as a turn of a chat."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from ..errors import KSAError
from .kinds import Asked

# Where the answer of a chat begins: with the beginning of a sentence, or at once.
CHATS = ("sentence", "bare")


def beginning_of(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before any text, such as a token for the beginning."""
    whole, bare = (tokenizer.encode("a", add_special_tokens=x) for x in (True, False))
    return list(whole[: len(whole) - len(bare)]) if whole[-len(bare) :] == bare else []


class Prompt(NamedTuple):
    """A text with questions and answers, its ids, and the answers' place: start, stop of each."""

    text: str
    ids: list[int]
    answers: list[tuple[int, int]]


class Prompts:
    """How a model is asked.

    Args:
        tokenizer: of transformers, or mlx-lm's wrapper of it.
        chat: None: the text goes on with the beginning of the answer; "sentence": a user's turn
            holds text and question, and the answer's turn begins like that; "bare": the answer's
            turn is the answer alone.
        beginning: ids that every text begins with, None: what the tokenizer puts there. A chat's
            come from its template.
    """

    def __init__(self, tokenizer: Any, chat: str | None = None, beginning: list[int] | None = None):
        if chat is not None and not getattr(tokenizer, "chat_template", None):
            raise KSAError("--chat: the model's tokenizer has no chat template")
        self.tokenizer, self.chat = tokenizer, chat
        # The same pieces are counted again for each try at a text's length.
        self.count = lru_cache(1 << 14)(self._count)
        given = [] if chat else beginning_of(tokenizer)
        self.beginning = given if beginning is None else list(beginning)

    def encode(self, text: str) -> list[int]:
        return [*self.beginning, *self.tokenizer.encode(text, add_special_tokens=False)]

    def _count(self, text: str) -> int:
        """Tokens of a piece of text."""
        return len(self.tokenizer.encode(text, add_special_tokens=False))

    def length(self, body: str, asked: Sequence[Asked]) -> int:
        """How many ids `of` has, for less."""
        return len(self.encode(self._write(body, asked)[-1]))

    def of(self, body: str, asked: Sequence[Asked]) -> Prompt:
        """Text, questions and answers.

        Several questions at once are asked one after the other, as text that goes on.
        """
        upto = self._write(body, asked)
        text = upto[-1]
        ids = self.encode(text)
        edges = [_shared(self.encode(part), ids) for part in upto[:-1]] + [len(ids)]
        spans = []
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            while start + 1 < stop and not self.tokenizer.decode([ids[start]]).strip():
                start += 1  # where a blank is a token of its own
            spans.append((start, stop))
        return Prompt(text, ids, spans)

    def _write(self, body: str, asked: Sequence[Asked]) -> list[str]:
        """The text up to where each answer begins, and up to where it ends."""
        text, upto = "", []
        for one in asked:
            before = f"{text}\n" if text else body
            text = self._turn(body, one) if self.chat else before + one.begin
            upto.append(text)
            text += ("" if text[-1:].isspace() else " ") + one.answer
            upto.append(text)
        return upto

    def _turn(self, body: str, asked: Asked) -> str:
        """A chat up to where the answer begins."""
        said = [{"role": "user", "content": f"{body}\n{asked.question}"}]
        prompt = self.tokenizer.apply_chat_template(
            said, add_generation_prompt=True, tokenize=False, enable_thinking=False
        )
        if self.chat == "bare":
            return prompt
        return prompt + ("" if prompt[-1:].isspace() else " ") + asked.begin


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first ids are equal."""
    differ = (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    return next(differ, min(len(a), len(b)))


def shared(every: Sequence[Sequence[int]]) -> int:
    """How many first ids are equal in all."""
    return min(_shared(every[0], ids) for ids in every)
