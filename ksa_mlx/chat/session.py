"""A conversation with a model on one cache: it reads what is new, answers, stops and settles."""

import copy
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm import stream_generate
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from ..cache.make import make_cache
from ..cache.rollback import settle, take_back
from ..errors import ContextError, SessionError
from ..memory.caches import Quantised
from ..memory.room import Room
from ..model import Model
from ..references.trace import Trace, question_start, trace_answer
from ..stock.ids import unknown
from ..stock.prompt_lookup import PromptLookup
from . import prompt_cache_file, reading
from .conversation import Conversation, Document

# Stands for a token that a cache has read and that nobody has told us.
UNKNOWN = -1


@dataclass
class Usage:
    """How the last answer went: counts, tokens a second, why it ended."""

    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None
    drafted: int = 0  # tokens that the draft model proposed


@dataclass
class _Said:
    """The last answer, for its references: token ids, and a cache that has read the prompt."""

    prompt: list[int]
    question: int
    answer: list[int]
    cache: list[Any]


class Session:
    """A model, a conversation and the cache that has read it.

    Args:
        model, tokenizer: what `ksa_mlx.load` returns.
        name: what the model is called; saved caches carry it.
        system_prompt, use_template, template_options: see `Conversation`.
        max_tokens: tokens of an answer, -1 for as many as the context holds.
        options: further arguments of `mlx_lm.stream_generate`: sampler, logits_processors,
            prefill_step_size (at most; steps are shorter on a slow machine), kv_bits, ...
        draft_model: proposes tokens, options' `num_draft_tokens` at a time; the answer is the same.
            Or a `PromptLookup`.
        text_bits: those of the windows' text in a quantised cache, if not `kv_bits` too.
        memory_limit: bytes that all of it may take; None: what the device has.
        rollback: tokens before the furthest one read that the cache can always take back.

    Attributes:
        stop: set by a signal handler: end the answer after the next token, reading after the step.
        progress: called with (tokens read, tokens to read) while a prompt is read.
        reread: of the tokens that are read now, those that the cache had read and could not keep.
        on_references: what is done with the `trace` of an answer; None: nothing is kept for it.
    """

    def __init__(
        self,
        model,
        tokenizer,
        name: str,
        system_prompt: str | None = None,
        use_template: bool = True,
        template_options: dict[str, Any] | None = None,
        max_tokens: int = 256,
        options: dict[str, Any] | None = None,
        draft_model=None,
        text_bits: int | None = None,
        memory_limit: int | None = None,
        rollback: int = 0,
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.conversation = Conversation(tokenizer, system_prompt, use_template, template_options)
        self.max_tokens = max_tokens
        self.options = {"prefill_step_size": 2048, "num_draft_tokens": 3, **(options or {})}
        self.draft_model, self.text_bits = draft_model, text_bits
        self.memory_limit = memory_limit
        self._room: Room | None = None
        self.rollback = max(rollback, self.options["num_draft_tokens"] if draft_model else 0)
        self.stop, self.reread = False, 0
        self.progress: Callable[[int, int], None] = lambda done, total: None
        self.on_references: Callable[[Trace], None] | None = None
        self.usage: Usage | None = None
        self._said: _Said | None = None
        self.forget()

    def reset(self) -> None:
        """Begin again: the system prompt and nothing else."""
        self.conversation.reset()
        self.forget()

    def forget(self) -> None:
        """Empty the cache. The conversation stays, and is read again with the next turn."""
        # Both models' layers in one list, as mlx-lm has it.
        self.cache = [c for m in self._models for c in self._make_cache(m)]
        self.tokens: list[int] = []  # what the cache has read

    @property
    def _models(self) -> list[Any]:
        drafts = self.draft_model
        return [self.model] if isinstance(drafts, PromptLookup | None) else [self.model, drafts]

    def _make_cache(self, model) -> list[Any]:
        if not isinstance(model, Model):
            return make_prompt_cache(model)
        return make_cache(model, max(model.rollback, self.rollback), self.text_bits)

    @property
    def own_cache(self) -> list[Any]:
        """The cache without the draft model's."""
        return self.cache[: len(self.model.layers)]

    @property
    def offset(self) -> int:
        """Tokens that the cache has read."""
        return len(self.tokens)

    @property
    def context(self) -> int:
        """Tokens that a conversation may have."""
        return self.model.args.max_position_embeddings

    # Turns

    def answer(self, text: str, begun: str = "") -> Generator[str, None, None]:
        """Answer a turn piece by piece. Only what the cache has not read yet is read.

        begun: how the answer begins; the pieces go on from there.

        Setting `stop` ends the answer early; it stays in the conversation as far as it got.
        Stopped while the prompt is read, the turn is as if it had not been said.
        """
        self.stop = False
        prompt, question = self._prompt(text, begun)
        if not prompt:
            raise SessionError("prompt: found zero tokens, expected text")
        pieces = [begun]
        with closing(self.go_on(prompt, question)) as said:
            for piece in said:
                pieces.append(piece)
                yield piece
        if self.usage is not None:
            self.conversation.answered(text, "".join(pieces), self.tokens)

    def again(self) -> Generator[str, None, None]:
        """Take the last answer back and answer its turn once more."""
        if self.conversation.documents:
            raise SessionError("again: found a document that waits for its question")
        return self.answer(self.conversation.undo())

    def undo(self) -> str:
        """Take back what `Conversation.undo` does, which see.

        Where the cache does not reach so far back it is emptied, and `reread` says how many tokens
        must be read again.
        """
        text = self.conversation.undo()
        self.usage, self._said = None, None
        self._unread(self.conversation.opening(), "conversation", asks=False)
        return text

    def _prompt(self, text: str, begun: str = "") -> tuple[list[int], int]:
        """All tokens that must be read before the answer, and where in them the question begins."""
        prompt = self.conversation.prompt(text, begun)
        if not self.on_references or not prompt:
            return prompt, len(prompt)
        return prompt, question_start(lambda t: self.conversation.prompt(t, begun), text, prompt)

    def read_ahead(self) -> int:
        """Read what is already known of the conversation, the system prompt. Returns its tokens.

        Setting `stop` ends it early; what is read stays read.
        """
        self.stop = False
        tokens = self.conversation.opening()
        what = ", ".join(d.name for d in self.conversation.documents) or "system prompt"
        if tokens:
            new = self._unread(tokens, what, asks=False)
            self._read(new, len(new))
        return len(tokens)

    def go_on(self, prompt: list[int], question: int) -> Generator[str, None, None]:
        """Read a prompt, as far as it is new, and write what follows it, piece by piece.

        question: where in the prompt the question begins, which is no reference.
        """
        self.usage, self._said = None, None
        new = self._unread(prompt, "prompt")
        room = self.context - len(prompt)
        limit = room if self.max_tokens < 0 else min(self.max_tokens, room)
        said: list[int] = []
        drafted, begin, read = 0, time.perf_counter(), None
        try:
            if not self._read(new[:-1], len(new)):
                return
            if self.on_references:
                read = copy.deepcopy(self.own_cache)
            with closing(self._responses(new, limit)) as responses:
                for r in responses:
                    if not said:
                        seconds = time.perf_counter() - begin
                        self.tokens.append(prompt[-1])
                        self.progress(len(new), len(new))
                    said.append(r.token)
                    self.tokens.append(r.token)  # mlx-lm has fed it already
                    drafted += r.from_draft
                    why = r.finish_reason
                    self.usage = Usage(
                        len(new),
                        len(new) / seconds,
                        r.generation_tokens,
                        r.generation_tps,
                        "context" if why == "length" and limit == room else why,
                        drafted,
                    )
                    yield r.text
                    if self.stop:
                        self.usage.finish_reason = "stopped"
                        break
        except BaseException:
            # In the middle of a step the layers' caches may disagree.
            self.forget()
            raise
        if read is not None:
            self._said = _Said(prompt, question, said, read)
        if self.draft_model:
            self.tokens = self.tokens[: settle(self.cache)]
            if not self.tokens:
                self.forget()

    def _unread(self, prompt: list[int], what: str, asks: bool = True) -> list[int]:
        """The part of a prompt that is new, its last token at least if it `asks` for an answer.

        What the cache has read beside it is taken back, or, where that is out of reach, all of it.
        Raises SessionError, and changes nothing, for a prompt that the model cannot read.
        """
        if len(prompt) >= self.context:
            raise ContextError(
                f"{what}: found {len(prompt):,} tokens, expected fewer than the context of "
                f"{self.context:,} (max_position_embeddings)"
            )
        self._check_room(what, len(prompt))
        # The template may render an earlier turn anew (without its thinking, say), or text that
        # was generated may fall into other tokens when it is read.
        pairs = zip(prompt[:-1] if asks else prompt, self.tokens, strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        new, begin = prompt[same:], self.model.args.summary_token_begin
        if (token := unknown(new, begin)) is not None:
            word = self.tokenizer.convert_ids_to_tokens([token])[0]
            raise SessionError(
                f"{what}: found token {token} ({word!r}), expected ids of the text "
                f"vocabulary, 0 to {begin - 1}"
            )
        self.reread, behind = 0, len(self.tokens) - same
        if not behind:
            return new
        kept = False
        try:
            kept = same > 0 and take_back((c, behind) for c in self.cache)
        finally:
            self.tokens = self.tokens[:same]
            if not kept:
                self.forget()
        if not kept:
            self.reread, new = same, prompt
        return new

    def _check_room(self, what: str, tokens: int):
        """Raises MemoryLimitError if there is no room for so many tokens and an answer."""
        if self._room is None:
            step, made = self.options["prefill_step_size"], self._quantize()
            names = ("kv_bits", "kv_group_size", "quantized_kv_start")
            quantised = Quantised(*(made[name] for name in names)) if made else None
            makers = [partial(self._make_cache, m) for m in self._models]
            self._room = Room(self._models, self.memory_limit, quantised, step, makers)
        # An answer without a limit of its own may end before there is no room.
        self._room.check(what, (tokens, min(max(self.max_tokens, 0), self.context - tokens)))

    def _read(self, new: list[int], total: int) -> bool:
        """Read tokens, of `total` that are to be read. Returns False if `stop` came first."""
        own, before = self.own_cache, list(self.tokens)
        drafts = self.cache[len(own) :]
        readers = [(self.model, own)]
        if self.draft_model:
            readers.append((self.draft_model, drafts))
        longest = self.options["prefill_step_size"]
        try:
            with closing(reading.read(readers, new, longest, self._quantize())) as steps:
                for done in steps:
                    self.cache, self.tokens = own + drafts, before + new[:done]
                    self.progress(done, total)
                    if self.stop:
                        return False
        except BaseException:
            self.forget()
            raise
        return True

    def _quantize(self) -> dict[str, int]:
        """Arguments of mlx-lm's `maybe_quantize_kv_cache`; empty if the cache stays as it is."""
        names = ("kv_bits", "kv_group_size", "quantized_kv_start")
        given = {name: self.options[name] for name in names if name in self.options}
        return {"kv_group_size": 64, "quantized_kv_start": 5000, **given} if given else {}

    def _responses(self, new: list[int], limit: int) -> Generator[Any, None, None]:
        """mlx-lm's answer to a prompt, of which `new` was new and all but the last is read."""
        options, quantize = dict(self.options), self._quantize()
        if processors := options.pop("logits_processors", None):
            head = mx.array(new[:-1], mx.uint32)
            # They are shown what mlx-lm would show them, had it read all that was new.
            options["logits_processors"] = [
                lambda tokens, logits, p=p: p(mx.concatenate([head, tokens]), logits)
                for p in processors
            ]
        options["draft_model"] = self.draft_model
        if isinstance(self.draft_model, PromptLookup):
            self.draft_model.text = [*self.tokens, *new[-1:]]
        elif self.draft_model:
            # mlx-lm would quantise copies of the cache list, so it is done before the answer.
            if quantize and len(self.tokens) + 1 >= quantize["quantized_kv_start"]:
                own = self.own_cache
                maybe_quantize_kv_cache(own, **{**quantize, "quantized_kv_start": 0})
                self.cache[: len(own)] = own
            for name in quantize:
                options.pop(name, None)
        options |= {"max_tokens": limit, "prompt_cache": self.cache}
        return stream_generate(self.model, self.tokenizer, new[-1:], **options)

    # References

    def trace(self) -> Trace | None:
        """What the last answer's tokens attended to; None if nothing was kept for it.

        The answer is read once more.
        """
        said, self._said = self._said, None
        if not self.on_references or said is None:
            return None
        if said.prompt[0] == UNKNOWN:
            raise SessionError(
                "references: a cache of mlx_lm.cache_prompt does not say which text it holds"
            )
        answer = said.answer
        if answer[-1] in self.tokenizer.eos_token_ids:
            answer = answer[:-1]
        if not answer:
            return None
        step = self.options["prefill_step_size"]
        return trace_answer(self.model, said.prompt, answer, said.question, said.cache, step)

    # Files

    def save(self, file: Path):
        """Write the cache and the conversation, for `load`; whole or not at all."""
        if not self.tokens:
            raise SessionError("nothing has been read yet, so there is nothing to save")
        talk = self.conversation
        said = {"messages": talk.messages, "plain": talk.plain, "asked": talk.asked}
        about = {**said, "documents": talk.documents, "tokens": self.tokens}
        prompt_cache_file.write(file, self.model, self.name, self.own_cache, about)

    def load(self, file: Path):
        """Take over a saved cache and conversation, if they are this model's."""
        cache, about = prompt_cache_file.read(file, self.model, self.name)
        if about is None:
            raise SessionError(
                f"{file}: found a cache of mlx_lm.cache_prompt, which answers one question: "
                "give --prompt-cache-file and --prompt"
            )
        self.cache, self.tokens, self.usage = cache, about["tokens"], None
        for name in ("messages", "plain", "asked"):
            setattr(self.conversation, name, about[name])
        self.conversation.documents = [Document(*one) for one in about["documents"]]
        if self.draft_model:
            self.forget()  # the draft model has to read the text too
