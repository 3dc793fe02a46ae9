"""What a client of the server may send: every field is read, checked and named in the error here.

`parse` needs no model and runs in the thread of the connection; `check_against` needs one, and its
tokenizer's prompt, and runs where the model is. What OpenAI's API knows and this server does not do
is refused where leaving it out would change the answer.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import RequestError
from .ids import unknown

LARGEST_SEED = 2**64 - 1
LARGEST_BIAS = 100.0
CHOICES = 64  # of one request: prompts times n
ROLES = ("system", "developer", "user", "assistant", "tool", "function")

# number fields: kind, least, most, and the value that an absent one has (None: the server's flag)
NUMBERS: dict[str, tuple[type, float, float, float | None]] = {
    "max_tokens": (int, 1, math.inf, None),
    "temperature": (float, 0, 1e6, None),
    "top_p": (float, 0, 1, None),
    "top_k": (int, 0, 2**31 - 1, None),
    "min_p": (float, 0, 1, None),
    "num_draft_tokens": (int, 1, 1024, None),
    "repetition_penalty": (float, 0, 100, 0.0),
    "repetition_context_size": (int, 1, 2**31 - 1, 20),
    "presence_penalty": (float, -100, 100, 0.0),
    "presence_context_size": (int, 1, 2**31 - 1, 20),
    "frequency_penalty": (float, -100, 100, 0.0),
    "frequency_context_size": (int, 1, 2**31 - 1, 20),
    "xtc_probability": (float, 0, 1, 0.0),
    "xtc_threshold": (float, 0, 0.5, 0.1),
    "top_logprobs": (int, -1, 20, -1),
    "n": (int, 1, CHOICES, 1),
}
# The names that mlx-lm's command line has for those of the server's flags.
FLAGS = {"temperature": "temp"}

# Fields that would change the answer, and the values with which they do not.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "echo": (False,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none",),
    "audio": (),
    "modalities": (["text"],),
    "web_search_options": (),
    "response_format": ({"type": "text"},),
    "guided_json": (),
    "guided_regex": (),
    "guided_grammar": (),
    "grammar": ("",),
}


@dataclass
class Wanted:
    """A checked request: one choice for each of `prompts`, times `n`.

    `prompts` holds texts, lists of ids, or nothing but None for a chat.
    """

    chat: bool
    model: str
    prompts: list[str | list[int] | None]
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    role_mapping: dict[str, str] | None
    stream: bool
    include_usage: bool
    stop: list[str]
    logit_bias: dict[int, float] | None
    logprobs: bool
    adapters: str | None
    seed: int | None
    chat_template_kwargs: dict[str, Any] | None
    numbers: dict[str, Any] = field(default_factory=dict)


def parse(raw: bytes, chat: bool, flags: Any) -> Wanted:
    """Read a body. Raises `RequestError` for whatever is wrong with it.

    Args:
        raw: the body as it came.
        chat: whether it came to chat/completions.
        flags: the server's own, for what a request leaves out.
    """
    body = _object(raw)
    for name, neutral in UNSUPPORTED.items():
        if (value := body.get(name)) is not None and value not in neutral:
            raise RequestError(name, f"found {_short(value)}, which this server does not do")
    numbers = {name: _number(body, name, flags) for name in NUMBERS}
    numbers["max_tokens"] = _max_tokens(body, numbers["max_tokens"])
    if numbers["temperature"] < 1e-6:
        numbers["temperature"] = 0.0  # the limit, without the overflow
    if 0 < numbers["repetition_penalty"] < 0.01:
        raise RequestError("repetition_penalty", "expected 0 (none) or at least 0.01")
    if body.get("best_of") not in (None, numbers["n"]):
        raise RequestError("best_of", f"found {_short(body['best_of'])}, expected n")
    logprobs, numbers["top_logprobs"] = _logprobs(body, chat, numbers["top_logprobs"])
    if _get(body, "draft_model", str, "default_model") not in ("default_model", flags.draft_model):
        raise RequestError("draft_model", "expected the server's own (--draft-model at its start)")
    options = _get(body, "stream_options", dict, {})
    prompts: list[str | list[int] | None] = [None] if chat else _prompts(body)
    if len(prompts) * numbers["n"] > CHOICES:
        raise RequestError("prompt", f"found {len(prompts)}, expected at most {CHOICES} choices")
    seed = _get(body, "seed", int, None)
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise RequestError("seed", f"found {_short(seed)}, expected 0 to 2**64 - 1")
    roles = _get(body, "role_mapping", dict, None)
    if roles is not None and not all(isinstance(v, str) for v in roles.values()):
        raise RequestError("role_mapping", "expected an object of texts")
    return Wanted(
        chat=chat,
        model=_get(body, "model", str, "default_model"),
        prompts=prompts,
        messages=_messages(body) if chat else [],
        tools=_tools(body) if chat else None,
        role_mapping=roles,
        stream=_get(body, "stream", bool, False),
        include_usage=_get(options, "include_usage", bool, False, "stream_options.include_usage"),
        stop=_stop(body),
        logit_bias=_logit_bias(body),
        logprobs=logprobs,
        adapters=_get(body, "adapters", str, None),
        seed=seed,
        chat_template_kwargs=_get(body, "chat_template_kwargs", dict, None),
        numbers=numbers,
    )


def check_against(prompt: list[int], args: Any, ids: int, width: int, context: int | None):
    """Check what only a model can say, and cut `args.max_tokens` to the room that is left.

    Args:
        prompt: its ids.
        args: mlx-lm's `GenerationArguments`.
        ids: how many the model reads.
        width: how many it predicts.
        context: the most tokens that the model reads, if it says.
    """
    if not prompt:
        raise RequestError("prompt", "found no tokens, expected one at least")
    if (found := unknown(prompt, ids)) is not None:
        raise RequestError("prompt", f"found the id {found}, expected 0 to {ids - 1}")
    for token in args.logits.logit_bias or ():
        if not 0 <= token < width:
            raise RequestError("logit_bias", f"found the id {token}, expected 0 to {width - 1}")
    if args.sampling.top_k >= width:
        raise RequestError("top_k", f"found {args.sampling.top_k}, expected less than {width}")
    if args.top_logprobs >= width:
        raise RequestError("logprobs", f"found {args.top_logprobs}, expected less than {width}")
    if context is not None:
        if len(prompt) >= context:
            raise RequestError(
                None,
                f"found a prompt of {len(prompt)} tokens, expected fewer than the model's context "
                f"of {context}",
                code="context_length_exceeded",
            )
        args.max_tokens = min(args.max_tokens, context - len(prompt))


def _object(raw: bytes) -> dict[str, Any]:
    def refuse(constant: str):
        raise ValueError(f"{constant} is no JSON")

    try:
        body = json.loads(raw.decode("utf-8"), parse_constant=refuse)
        # A lone surrogate, which no tokenizer takes.
        json.dumps(body, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise RequestError(None, "the body is not UTF-8") from None
    except (ValueError, RecursionError) as e:
        raise RequestError(None, f"the body is not JSON ({_short(e, str)})") from None
    if not isinstance(body, dict):
        raise RequestError(None, f"the body is {_short(body)}, expected an object")
    return body


def _short(value: Any, text: Callable[[Any], str] = repr) -> str:
    """A value for a message; ids of thousands of digits have no text at all."""
    try:
        found = " ".join(text(value).split())
    except ValueError:
        found = f"a {type(value).__name__}"
    return found if len(found) <= 60 else found[:57] + "..."


def _get(body: dict[str, Any], name: str, kind: type, default: Any, param: str | None = None):
    """A field of this JSON type, or the default where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        names = {dict: "an object", list: "a list", str: "a text", int: "an integer"}
        expected = names.get(kind, "true or false")
        raise RequestError(param or name, f"found {_short(value)}, expected {expected}")
    return value


def _number(body: dict[str, Any], name: str, flags: Any):
    kind, low, high, default = NUMBERS[name]
    value = body.get(name)
    if value is None:
        return getattr(flags, FLAGS.get(name, name)) if default is None else default
    fits = isinstance(value, int) or (kind is float and isinstance(value, float))
    if isinstance(value, bool) or not fits or not low <= value <= high:
        what = "an integer" if kind is int else "a number"
        upto = f" to {high:g}" if high < 1e6 else " or more"
        raise RequestError(name, f"found {_short(value)}, expected {what} of {low:g}{upto}")
    return value


def _max_tokens(body: dict[str, Any], max_tokens: int) -> int:
    newer = _get(body, "max_completion_tokens", int, None)
    if newer is None:
        return max_tokens
    if newer < 1:
        raise RequestError("max_completion_tokens", f"found {newer}, expected 1 or more")
    return newer


def _logprobs(body: dict[str, Any], chat: bool, top: int) -> tuple[bool, int]:
    """Whether to report the tokens' log-probabilities, and how many others beside each."""
    value = body.get("logprobs")
    if value is None or isinstance(value, bool):
        return bool(value) or top > 0, top
    if chat or not isinstance(value, int) or not 0 <= value <= 20:
        expected = "true or false" if chat else "an integer of 0 to 20"
        raise RequestError("logprobs", f"found {_short(value)}, expected {expected}")
    return True, max(value, top)


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(i) is int for i in value)


def _prompts(body: dict[str, Any]) -> list[Any]:
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (_is_ids(prompt) and prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        for kind in (lambda p: isinstance(p, str), _is_ids):
            if all(map(kind, prompt)):
                return prompt
    raise RequestError("prompt", f"found {_short(prompt)}, expected a text, ids, or a list of such")


def _stop(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop")
    stop = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise RequestError("stop", f"found {_short(stop)}, expected a text or a list of texts")
    if len(stop) > 64:
        raise RequestError("stop", f"found {len(stop)} texts, expected at most 64")
    return stop


def _logit_bias(body: dict[str, Any]) -> dict[int, float] | None:
    found = {}
    for key, value in (_get(body, "logit_bias", dict, None) or {}).items():
        if not (key.isdecimal() and key.isascii() and len(key) < 10):
            raise RequestError("logit_bias", f"found {_short(key)}, expected ids")
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not -LARGEST_BIAS <= value <= LARGEST_BIAS:
            raise RequestError("logit_bias", f"found {_short(value)}, expected -100 to 100")
        found[int(key)] = float(value)
    return found or None


def _messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    messages = _get(body, "messages", list, [])
    if not messages:
        raise RequestError("messages", "found none, expected one at least")
    return [_message(m, f"messages[{i}]") for i, m in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict) or message.get("role") not in ROLES:
        raise RequestError(where, f"found {_short(message)}, expected a role of {', '.join(ROLES)}")
    role, content = message["role"], message.get("content")
    calls = _get(message, "tool_calls", list, None, f"{where}.tool_calls")
    for call in calls or ():
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}.tool_calls", f"found {_short(call)}, expected a function")
        arguments = function.get("arguments")
        try:
            if isinstance(arguments, str) and arguments:
                json.loads(arguments)
        except (ValueError, RecursionError):
            raise RequestError(f"{where}.tool_calls", "found arguments that are no JSON") from None
    if isinstance(content, list):
        for part in content:
            _part(part, f"{where}.content")
    elif not (isinstance(content, str) or (content is None and role == "assistant")):
        raise RequestError(f"{where}.content", f"found {_short(content)}, expected a text")
    # Templates know the older name only.
    return {**message, "role": "system" if role == "developer" else role}


def _part(part: Any, where: str):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return
    if kind in ("image_url", "input_image", "image"):
        url = part.get("image_url", part.get("image"))
        if isinstance(url.get("url") if isinstance(url, dict) else url, str):
            return
    raise RequestError(where, f"found {_short(part)}, expected parts of type text")


def _tools(body: dict[str, Any]) -> list[dict[str, Any]] | None:
    tools = _get(body, "tools", list, None)
    for tool in tools or ():
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError("tools", f"found {_short(tool)}, expected a function with a name")
    choice = body.get("tool_choice")
    if choice not in (None, "auto", "none"):
        raise RequestError("tool_choice", f"found {_short(choice)}, expected auto or none")
    if tools and _get(body, "parallel_tool_calls", bool, True) is False:
        raise RequestError("parallel_tool_calls", "found false, which this server does not do")
    return None if choice == "none" else tools or None
