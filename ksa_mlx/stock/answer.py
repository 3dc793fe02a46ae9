"""One choice of an answer as it is generated: text, reasoning, tool calls, log-probabilities."""

from collections.abc import Callable
from typing import Any

from mlx_lm.generate import TextStateMachine
from mlx_lm.server import GenerationContext, Response, ToolCallFormatter


class StopText:
    """Cuts a text at the first of some words, and holds back what may become one.

    mlx-lm looks for a stop word's own tokens, and takes its letters out of the text without
    stopping where they come in other tokens.
    """

    def __init__(self, words: list[str]):
        self.words, self.held, self.found = words, "", False

    def add(self, text: str) -> str:
        """The text that is safe to show; nothing after `found`."""
        if self.found:
            return ""
        text = self.held + text
        places = [i for i in map(text.find, self.words) if i >= 0]
        if places:
            self.held, self.found = "", True
            return text[: min(places)]
        keep = max((self._begun(text, w) for w in self.words), default=0)
        shown, self.held = text[: len(text) - keep], text[len(text) - keep :]
        return shown

    @staticmethod
    def _begun(text: str, word: str) -> int:
        lengths = range(min(len(word) - 1, len(text)), 0, -1)
        return next((n for n in lengths if text.endswith(word[:n])), 0)


class Answer:
    """What mlx-lm's server makes of a `Response` after the other, for one choice.

    `text`, `reasoning`, `calls` and `logprobs` are what has come since the last `clear`.
    """

    def __init__(self, ctx: GenerationContext, args: Any, tools: Any, stream: bool):
        self.ctx, self.args = ctx, args
        self.stop_text = StopText(args.stop_words)
        self.format_calls = ToolCallFormatter(ctx.tool_parser, tools, stream)
        self.state = ctx.text_sm.make_state(ctx.initial_state)
        self.section = ctx.initial_state
        self.tool_text, self.made_call, self.why, self.tokens = "", False, "", 0
        self.letters = 0  # of the tokens whose log-probabilities are out
        self.clear()

    def clear(self) -> None:
        self.text, self.reasoning = "", ""
        self.calls: list[str] = []
        self.logprobs: list[dict[str, Any]] = []

    def add(self, gen: Response):
        """Take a token. `why` says afterwards whether it was the last."""
        self.tokens += 1
        if gen.finish_reason == "stop":
            self.state, section = TextStateMachine.discard(self.state)
            parts = [(section, "")]
        else:
            self.state, parts = TextStateMachine.split(self.state, gen.text)
            if gen.finish_reason == "length":
                self.state, rest, section = TextStateMachine.flush(self.state)
                parts.append((section, rest))
        for section, text in parts:
            self._part(section, text)
        if self.args.logprobs:
            self.logprobs.append(_logprob(gen, self.args.piece))
        self.why = "stop" if self.stop_text.found else gen.finish_reason or ""
        if self.why:
            self._end(gen)

    def _part(self, section: str, text: str):
        if section == "reasoning":
            self.reasoning += text
        elif section == "tool":
            self.tool_text += text
        elif section == "normal":
            if self.section == "tool":
                self._call()
            self.text += self.stop_text.add(text)
        self.section = section

    def _call(self):
        self.calls.append(self.tool_text)
        self.tool_text, self.made_call = "", True

    def _end(self, gen: Response):
        # What was held back is text after all, unless its stop word came in the word's own tokens.
        if self.why == "length" or self.args.is_eos(gen.token):
            self.text += self.stop_text.held
        if self.section == "tool" and self.tool_text:
            self._call()
        if self.why == "stop" and self.made_call:
            self.why = "tool_calls"

    @property
    def has_news(self) -> bool:
        return self.section != "tool" and bool(self.text or self.calls or self.reasoning)


def _logprob(gen: Response, piece: Callable[[int], str]) -> dict[str, Any]:
    """OpenAI's entry for a token; `id` is mlx-lm's."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text = piece(token)
        # JSON has no infinity: what is never predicted is as unlikely as can be said.
        logprob = max(logprob, -9999.0)
        return {"id": token, "token": text, "bytes": list(text.encode()), "logprob": logprob}

    top = sorted(gen.top_tokens, key=lambda t: -t["logprob"])
    return {
        **entry(gen.token, gen.logprob),
        "top_logprobs": [entry(t["id"], t["logprob"]) for t in top],
    }


def text_logprobs(entries: list[dict[str, Any]], top: int, offset: int = 0) -> dict[str, Any]:
    """The same in the form of OpenAI's completions; offset: letters of the answer before."""
    offsets = []
    for e in entries:
        offsets.append(offset)
        offset += len(e["token"])
    return {
        "tokens": [e["token"] for e in entries],
        "token_logprobs": [e["logprob"] for e in entries],
        "top_logprobs": [{t["token"]: t["logprob"] for t in e["top_logprobs"]} for e in entries]
        if top > 0
        else None,
        "text_offset": offsets,
    }
