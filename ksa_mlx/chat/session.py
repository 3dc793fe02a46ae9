"""A conversation with a model on one cache: its turns, and what they cost."""

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
from jinja2 import TemplateError
from mlx_lm import stream_generate
from mlx_lm.generate import generate_step, maybe_quantize_kv_cache
from mlx_lm.models.cache import make_prompt_cache

from ..cache.rollback import settle
from ..cache.rolling import make_cache
from ..chat import prompt_cache_file
from ..errors import SessionError, one_line
from ..model import Model
from ..references.trace import Trace, question_start, trace_answer


class _Stopped(Exception):
    """Leaves mlx-lm's prefill between two steps."""


@dataclass
class Usage:
    """How the last answer went: counts, tokens a second, why it ended."""

    prompt_tokens: int
    prompt_tps: float
    generation_tokens: int
    generation_tps: float
    finish_reason: str | None
    drafted: int = 0  # tokens that the draft model proposed


class Session:
    """A model, a conversation and the cache that has read it.

    Args:
        model, tokenizer: what `ksa_mlx.load` returns.
        name: what the model is called; saved caches carry it.
        system_prompt: the first message; None for none.
        use_template: whether to use the tokenizer's chat template. Without it (or where there is
            none) a turn is plain text that the model continues.
        template_options: further arguments of the chat template.
        max_tokens: tokens of an answer, -1 for as many as the context holds.
        prefill_step_size: prompt tokens a step.
        options: further arguments of `mlx_lm.stream_generate`: sampler, logits_processors, ...
        progress: called with (tokens read, tokens to read) while a prompt is read.
        draft_model: proposes `num_draft_tokens` tokens at a time; the answer is the same.
        kv: mlx-lm's `kv_bits`, `kv_group_size` and `quantized_kv_start`, for a quantised cache.
        text_bits: those of the windows' text, if not `kv_bits` too.
        on_sources: what `show_sources` does with an answer's `Trace`; None: nothing is kept for it.
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
        prefill_step_size: int = 2048,
        options: dict[str, Any] | None = None,
        progress: Callable[[int, int], None] | None = None,
        draft_model=None,
        num_draft_tokens: int = 3,
        kv: dict[str, int] | None = None,
        text_bits: int | None = None,
        on_sources: Callable[[Trace], None] | None = None,
    ):
        self.model, self.tokenizer, self.name = model, tokenizer, name
        self.system_prompt = system_prompt
        self.has_template = use_template and tokenizer.has_chat_template
        self.template_options = template_options or {}
        self.max_tokens, self.prefill_step_size = max_tokens, prefill_step_size
        self.options = options or {}
        self.progress = progress or (lambda done, total: None)
        self.draft_model, self.num_draft_tokens = draft_model, num_draft_tokens
        self.kv, self.text_bits = kv or {}, text_bits
        self.on_sources = on_sources
        self._said: tuple | None = None  # prompt, answer, its question, a cache before them
        self.stop = False  # set by a signal handler: end the answer after the next token
        self.usage: Usage | None = None
        self.reset()

    def reset(self):
        """Begin again: the system prompt and nothing else."""
        self.messages: list[dict[str, str]] = []
        if self.has_template and self.system_prompt:
            self.messages.append({"role": "system", "content": self.system_prompt})
        self.plain: list[int] = []  # the conversation without a template, as tokens
        if not self.has_template and self.system_prompt:
            self.plain = self.tokenizer.encode(self.system_prompt)
        self.forget()

    def forget(self):
        """Empty the cache. The conversation stays, and is read again with the next turn."""
        if self.draft_model is None:
            self.cache = make_cache(self.model, text_bits=self.text_bits)
        else:
            # Both models' layers in one list, as mlx-lm has it.
            self.cache = self._rolling_back(self.model) + self._rolling_back(self.draft_model)
        self.tokens: list[int] = []  # what the cache has read
        self.stock_tokens = 0  # of a cache that mlx-lm made: how many it has read

    def _rolling_back(self, model) -> list[Any]:
        """A cache that rejected drafts can be taken back from."""
        if not isinstance(model, Model):
            return make_prompt_cache(model)
        rollback = max(model.rollback, self.num_draft_tokens)
        return make_cache(model, rollback, self.text_bits)

    @property
    def own_cache(self) -> list[Any]:
        """The cache without the draft model's."""
        return self.cache[: len(self.model.layers)]

    # Turns

    @property
    def context(self) -> int:
        return self.model.args.max_position_embeddings

    def answer(self, text: str) -> Iterator[str]:
        """Answer a turn piece by piece. Only what the cache has not read yet is read.

        Setting `stop` ends the answer early; it stays in the conversation as far as it got.
        Stopped while the prompt is read, the turn is as if it had not been said.
        """
        self.stop, self.usage, self._said = False, None, None
        prompt, messages = self._prompt(text)
        if len(prompt) <= len(self.plain):
            raise SessionError("prompt: found zero tokens, expected text")
        new = self._unread(prompt)
        room = self.context - self.offset - len(new)
        if room < 1:
            raise SessionError(
                f"prompt: found {self.offset + len(new):,} tokens, expected fewer than the "
                f"context of {self.context:,} (max_position_embeddings)"
            )
        limit = room if self.max_tokens < 0 else min(self.max_tokens, room)
        before, pieces = list(self.tokens), []
        said, read, question = [], None, 0
        if self.on_sources:
            question = question_start(lambda t: self._prompt(t)[0], text, prompt)

        def progress(done: int, total: int):
            nonlocal read
            self.tokens = before + new[:done]
            if self.on_sources and done == total - 1:
                read = copy.deepcopy(self.own_cache)
            self.progress(done, total)
            if self.stop and done < total:
                raise _Stopped

        responses = stream_generate(
            self.model,
            self.tokenizer,
            new,
            max_tokens=limit,
            prompt_cache=self.cache,
            prefill_step_size=self.prefill_step_size,
            **(self._speculate(new) if self.draft_model else self.kv),
            prompt_progress_callback=progress,
            **self.options,
        )
        if self.draft_model:
            self.tokens = before + new  # mlx-lm reports no progress then
        drafted = 0
        try:
            with closing(responses):
                for r in responses:
                    self.tokens.append(r.token)  # mlx-lm has fed it already
                    said.append(r.token)
                    why = r.finish_reason
                    drafted += r.from_draft
                    self.usage = Usage(
                        r.prompt_tokens,
                        r.prompt_tps,
                        r.generation_tokens,
                        r.generation_tps,
                        "context" if why == "length" and limit == room else why,
                        drafted,
                    )
                    pieces.append(r.text)
                    yield r.text
                    if self.stop:
                        self.usage.finish_reason = "stopped"
                        break
        except _Stopped:
            return
        except BaseException:
            # In the middle of a step the layers' caches may disagree.
            self.forget()
            raise
        if self.on_sources and not self.stock_tokens:
            self._said = prompt, said, question, read
        if self.has_template:
            self.messages = [*messages, {"role": "assistant", "content": "".join(pieces)}]
        else:
            self.plain = list(self.tokens)
        if self.draft_model:
            self.tokens = self.tokens[: settle(self.cache)]
            if not self.tokens:
                self.forget()

    def show_sources(self):
        """Call `on_sources` with what the last answer's tokens attended to.

        The answer is read once more, with a draft model the prompt too.
        """
        if not self.on_sources:
            return
        if self.stock_tokens:
            raise SessionError(
                "references: a cache of mlx_lm.cache_prompt does not say which text it holds"
            )
        if not self._said:
            return
        (prompt, answer, question, cache), self._said = self._said, None
        if answer[-1] in self.tokenizer.eos_token_ids:
            answer = answer[:-1]
        if answer:
            step = self.prefill_step_size
            self.on_sources(trace_answer(self.model, prompt, answer, question, cache, step))

    def _speculate(self, new: list[int]) -> dict[str, Any]:
        """Arguments of `stream_generate` for a draft model, and the quantisation they leave out:
        mlx-lm would quantise copies of the cache list here, so it is done before the turn."""
        if self.kv and self.offset + len(new) >= self.kv["quantized_kv_start"]:
            own = self.own_cache
            maybe_quantize_kv_cache(own, 0, self.kv["kv_group_size"], self.kv["kv_bits"])
            self.cache[: len(own)] = own
        return {"draft_model": self.draft_model, "num_draft_tokens": self.num_draft_tokens}

    def read_ahead(self) -> int:
        """Read what is already known of the conversation, the system prompt. Returns its tokens."""
        self.stop = False
        tokens = self._render(self.messages, False) if self.messages else self.plain
        if not tokens:
            return 0
        new = self._unread(tokens)
        if len(tokens) >= self.context:
            raise SessionError(
                f"system prompt: found {len(tokens):,} tokens, expected fewer than the context "
                f"of {self.context:,} (max_position_embeddings)"
            )

        def progress(done: int, total: int):
            self.progress(done, total)
            if self.stop and done < total:
                raise _Stopped

        own = self.own_cache
        drafts = self.cache[len(own) :]
        readers = [(self.model, own, {"prompt_progress_callback": progress, **self.kv})]
        if self.draft_model:
            readers.append((self.draft_model, drafts, {}))
        try:
            for model, cache, options in readers:
                for _ in generate_step(
                    mx.array(new),
                    model,
                    max_tokens=0,
                    prompt_cache=cache,
                    prefill_step_size=self.prefill_step_size,
                    **options,
                ):
                    pass
            self.cache = own + drafts
        except _Stopped:
            self.forget()
            return 0
        except BaseException:
            self.forget()
            raise
        self.tokens = tokens
        return len(tokens)

    def _prompt(self, text: str) -> tuple[list[int], list[dict[str, str]]]:
        """All tokens that must be read before the answer, and the messages they stand for."""
        if not self.has_template:
            # What begins a text (a BOS token) comes once.
            new = self.tokenizer.encode(text, add_special_tokens=not self.plain)
            return self.plain + new, []
        if not text.strip():
            return [], []
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.stock_tokens:
            return self._suffix(messages), messages
        return self._render(messages, True), messages

    def _render(self, messages: list[dict[str, str]], generation: bool, **kwargs):
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generation, **{**self.template_options, **kwargs}
            )
        except (TemplateError, TypeError, KeyError) as e:
            raise SessionError(f"chat template: refused these messages ({one_line(e)})") from None

    def _suffix(self, messages: list[dict[str, str]]) -> list[int]:
        """What follows a cache of `mlx_lm.cache_prompt`: the template from the question on."""
        question = messages[-1]["content"]
        marked = [*messages[:-1], {"role": "user", "content": "<query>"}]
        rendered = self._render(marked, True, tokenize=False)
        rendered = rendered[rendered.index("<query>") :].replace("<query>", question, 1)
        return self.tokenizer.encode(rendered, add_special_tokens=False)

    def _unread(self, prompt: list[int]) -> list[int]:
        """The part of a prompt that is new. Empties the cache if it has read something else."""
        begin = self.model.args.summary_token_begin
        for token in prompt:
            if not 0 <= token < begin:
                word = self.tokenizer.convert_ids_to_tokens([token])[0]
                raise SessionError(
                    f"prompt: found token {token} ({word!r}), expected ids of the text "
                    f"vocabulary, 0 to {begin - 1}"
                )
        if self.stock_tokens:
            return prompt
        known = len(self.tokens)
        if known < len(prompt) and prompt[:known] == self.tokens:
            return prompt[known:]
        # The template renders an earlier turn anew (without its thinking, say), or text that
        # was generated falls into other tokens when it is read.
        self.forget()
        return prompt

    # Statistics

    @property
    def offset(self) -> int:
        """Tokens that the cache has read."""
        return self.stock_tokens + len(self.tokens)

    @property
    def cache_bytes(self) -> int:
        """Bytes that the KV cache holds."""
        return sum(c.nbytes for c in self.own_cache)

    @property
    def full_bytes(self) -> int:
        """Bytes that full attention would hold: keys and values of every token in every layer."""
        args = self.model.args
        size = self.model.model.norm.weight.dtype.size
        row = args.num_key_value_heads * args.head_dim * size
        return 2 * args.num_hidden_layers * row * self.offset

    def cache_line(self) -> str:
        held, full = self.cache_bytes, self.full_bytes
        ratio = f", {full / held:.2f} times as much" if held else ""
        return (
            f"KV cache: {mb(held)} for {self.offset:,} tokens; "
            f"full attention would hold {mb(full)}{ratio}"
        )

    def report(self) -> list[str]:
        """What mlx_lm.generate reports, and the KV cache."""
        lines, u = [], self.usage
        if u is not None:
            lines += [
                f"Prompt: {u.prompt_tokens:,} tokens, {u.prompt_tps:,.1f} tokens-per-sec",
                f"Generation: {u.generation_tokens:,} tokens, "
                f"{u.generation_tps:,.1f} tokens-per-sec",
            ]
            if self.draft_model:
                share = u.drafted / max(u.generation_tokens, 1)
                lines.append(f"Draft model: proposed {u.drafted:,} of them ({share:.0%})")
        lines.append(f"Peak memory: {mx.get_peak_memory() / 1e9:.3f} GB")
        lines.append(self.cache_line())
        return lines

    # Files

    def save(self, file: Path):
        """Write the cache and the conversation, for `load`; whole or not at all."""
        if not self.tokens:
            raise SessionError("nothing has been read yet, so there is nothing to save")
        if self.stock_tokens:
            raise SessionError("this cache came from mlx_lm.cache_prompt, which keeps it")
        about = {"messages": self.messages, "plain": self.plain, "tokens": self.tokens}
        prompt_cache_file.write(file, self.model, self.name, self.own_cache, about)

    def load(self, file: Path):
        """Take over a saved cache and conversation, if they are this model's.

        Also takes a cache of `mlx_lm.cache_prompt`, for one question.
        """
        cache, about = prompt_cache_file.read(file, self.model, self.name)
        if about is None and self.draft_model:
            raise SessionError(
                f"{file}: does not say which text it holds, which a draft model would have to read"
            )
        if about is None:
            self.reset()
            self.cache, self.stock_tokens = cache, cache[0].offset
            return
        self.cache, self.tokens, self.stock_tokens = cache, about["tokens"], 0
        self.messages, self.plain, self.usage = about["messages"], about["plain"], None
        if self.draft_model:
            self.forget()  # the draft model has to read the text too


def mb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"
