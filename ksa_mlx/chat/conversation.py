"""What was said, as tokens: messages through a chat template, or plain text that goes on."""

from itertools import takewhile
from typing import Any, NamedTuple

from jinja2 import TemplateError

from ..errors import SessionError, one_line


class Document(NamedTuple):
    """A text that the next turn is about, and what it is called."""

    name: str
    text: str


class Conversation:
    """The turns so far, and how the tokenizer spells them. Knows nothing of a model.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper`.
        system_prompt: the first message; None for none.
        use_template: whether to use the tokenizer's chat template. Without it (or where there is
            none) a turn is plain text that the model continues.
        template_options: further arguments of the chat template.

    Attributes:
        documents: what stands before the next turn.
    """

    def __init__(
        self,
        tokenizer,
        system_prompt: str | None = None,
        use_template: bool = True,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        self.tokenizer, self.system_prompt = tokenizer, system_prompt
        self.has_template = use_template and tokenizer.has_chat_template
        self.template_options = template_options or {}
        self.reset()

    def reset(self) -> None:
        """Begin again: the system prompt and nothing else."""
        self.messages: list[dict[str, str]] = []
        self.documents: list[Document] = []
        # Without a template: the conversation as tokens; its turns, and where in it they begin.
        self.plain: list[int] = []
        self.asked: list[tuple[str, int]] = []
        if self.system_prompt and self.has_template:
            self.messages = [{"role": "system", "content": self.system_prompt}]
        elif self.system_prompt:
            self.plain = self._begin(self.system_prompt)

    def prompt(self, text: str, begun: str = "") -> list[int]:
        """All tokens that must be read before the answer to a turn; empty for an empty one.

        begun: how the answer begins.
        """
        check_utf8("prompt", text)
        if not self.has_template:
            return self._after(self.opening(), text) if text else []
        if not text.strip():
            return []
        messages = [*self.messages, user(self._turn(text))]
        if begun:
            messages.append(assistant(begun))
        return self.render(
            messages, add_generation_prompt=not begun, continue_final_message=bool(begun)
        )

    def answered(self, text: str, answer: str, tokens: list[int]):
        """Add a turn and its answer; tokens: all of the conversation, these two included."""
        if self.has_template:
            self.messages += [user(self._turn(text)), assistant(answer)]
        else:
            self.asked.append((self._turn(text), len(self.plain)))
            self.plain = list(tokens)
        self.documents = []

    @property
    def begun(self) -> bool:
        """Whether there is a turn that was answered."""
        return bool(self.asked) or any(m["role"] == "user" for m in self.messages)

    def undo(self) -> str:
        """Take back the last turn and its answer. Returns the turn, its documents included.

        Of a turn that is not asked yet, the last document. Raises SessionError if there is nothing.
        """
        if self.documents:
            return self.documents.pop().name
        if not self.begun:
            raise SessionError("found no turn to take back")
        if self.has_template:
            *self.messages, asked, _ = self.messages
            return asked["content"]
        text, begin = self.asked.pop()
        self.plain = self.plain[:begin]
        return text

    def _turn(self, text: str) -> str:
        """A turn with the documents before it; a template's model is told what they are called."""
        if not self.has_template:
            return "".join([*(_lines(d.text) for d in self.documents), text])
        named = [f"{d.name}:\n{d.text.strip()}" for d in self.documents]
        return "\n\n".join([*named, text])

    def opening(self) -> list[int]:
        """The tokens that begin every prompt from here on, as far as they are known."""
        if not self.has_template:
            tokens = self.plain
            for document in self.documents:
                tokens = self._after(tokens, _lines(document.text))
            return tokens
        if not self.messages and not self.documents:
            return []
        # What two questions have in common. Some templates do without a turn of the user's, most
        # do not; and the last token may be another one before another question.
        two = (self.render([*self.messages, user(self._turn(text))]) for text in ("a", "1"))
        common = [a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*two, strict=False))]
        if self.documents:
            return common[:-1]
        try:
            known = self.render(self.messages, add_generation_prompt=False)
        except SessionError:
            known = []
        return known if known and common[: len(known)] == known else common[:-1]

    def suffix(self, text: str) -> list[int]:
        """The template's tokens from the question on: what follows a `mlx_lm.cache_prompt`."""
        if not self.has_template:
            return self._encode(text)
        rendered = self.render([*self.messages, user("<query>")], tokenize=False)
        return self._encode(rendered[rendered.index("<query>") :].replace("<query>", text, 1))

    def render(self, messages: list[dict[str, str]], **options) -> Any:
        """The chat template's tokens. Raises SessionError if it refuses the messages."""
        options = {"add_generation_prompt": True, **self.template_options, **options}
        try:
            return self.tokenizer.apply_chat_template(messages, **options)
        except (TemplateError, TypeError, KeyError) as e:
            raise SessionError(f"chat template: refused these messages ({one_line(e)})") from None

    def _after(self, tokens: list[int], text: str) -> list[int]:
        """Tokens, and those of a text that goes on from them."""
        return tokens + self._encode(text) if tokens else self._begin(text)

    def _begin(self, text: str) -> list[int]:
        """The tokens of a text's beginning, with one BOS, whether or not the text has it."""
        bos = self.tokenizer.bos_token
        return self._encode(text, bos is None or not text.startswith(bos))

    def _encode(self, text: str, special: bool = False) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=special)


def _lines(text: str) -> str:
    """A text that ends its last line."""
    return text if text.endswith("\n") else f"{text}\n"


def user(text: str) -> dict[str, str]:
    """A turn of the user's."""
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    """An answer."""
    return {"role": "assistant", "content": text}


def check_utf8(what: str, text: str) -> None:
    """Refuse what came as other bytes than UTF-8, which Python keeps as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise SessionError(f"{what}: the text is not UTF-8") from None
