"""The flags of generate: mlx-lm's own, ours beside them, and values and pairs that make no sense.

Nothing is accepted and then ignored.
"""

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from mlx_lm.generate import setup_arg_parser

from ..errors import SessionError
from ..stock.flags import LIMITS as SERVER
from ..stock.flags import LOOKUP, add_kv, add_lookup, add_memory, check, exclude, flag

# Flags of mlx-lm's that mean nothing here, and why.
MEANINGLESS = {
    "max_kv_size": "not needed: a KSA model keeps summaries of old text, which stay small",
    "image": "a KSA model reads text only",
    "use_default_chat_template": "not needed: the tokenizer's own template is used if it has one",
}

# What a flag's value must be.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": (lambda n: n == -1 or n >= 1, "at least 1, or -1 for no limit"),
    "temp": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "more than 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "at least 0 and at most 1"),
    "top_k": (lambda n: n >= 0, "at least 0"),
    "xtc_probability": (lambda x: 0 <= x <= 1, "at least 0 and at most 1"),
    "xtc_threshold": (lambda x: 0 <= x <= 0.5, "at least 0 and at most 0.5"),
    "min_tokens_to_keep": (lambda n: n >= 1, "at least 1"),
    "repetition_penalty": (lambda x: 0 < x < math.inf, "a number of more than 0"),
    "repetition_context_size": (lambda n: n >= 1, "at least 1"),
    "seed": (lambda n: 0 <= n < 2**64, "at least 0 and less than 2**64"),
    "prefill_step_size": (lambda n: n >= 1, "at least 1"),
    "num_draft_tokens": (lambda n: n >= 1, "at least 1"),
    **SERVER,
}

# Flags that mean something beside another one only.
NEEDS = {
    "kv_text_bits": "kv_bits",
    "kv_value_bits": "kv_bits",
    "kv_group_size": "kv_bits",
    "quantized_kv_start": "kv_bits",
    "num_draft_tokens": "draft_model",
    "repetition_context_size": "repetition_penalty",
    "xtc_threshold": "xtc_probability",
    "min_tokens_to_keep": "min_p",
    "prefill_response": "prompt",
}

# Flags that choose among likely tokens; a greedy answer takes the likeliest.
SAMPLING = ("top_p", "min_p", "top_k", "xtc_probability")

# Flags that exclude each other, and why.
EXCLUSIVE = (
    LOOKUP,
    ("demo", "prompt", "it asks questions of its own"),
    ("demo", "system_prompt", "it reads a notebook of its own"),
    ("demo", "prompt_cache_file", "it reads a notebook of its own"),
    ("demo", "ignore_chat_template", "it asks questions"),
    ("system_prompt", "prompt_cache_file", "the conversation in the file has its own"),
    ("prefill_response", "ignore_chat_template", "write the beginning behind the prompt"),
    ("chat_template_config", "ignore_chat_template", "there is no template to configure"),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; --help lists the flags\n")


def truth(text: str) -> bool:
    """An argparse type: True or False, T or F."""
    if (word := text.lower()) not in ("true", "t", "false", "f"):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected True or False")
    return word in ("true", "t")


def parser() -> argparse.ArgumentParser:
    """mlx-lm's flags, and ours."""
    p = _Parser(
        prog="generate",
        description="Talk to a KSA model: one answer with --prompt, a chat without.",
        epilog="Without a model, a small one that ships with the package answers questions about "
        "a sample notebook: a chat in a terminal, a short demonstration elsewhere.",
        parents=[setup_arg_parser()],
        add_help=False,
        conflict_handler="resolve",
    )
    p.add_argument(
        "--model",
        help="A converted folder, an unconverted KSA checkpoint in the Hub's layout, or a repo id.",
    )
    p.add_argument("--prompt", "-p", help="Text, - for standard input, or @FILE. Without: a chat.")
    p.add_argument("--system-prompt", help="Text or @FILE.")
    p.add_argument("--demo", action="store_true", help="Run the short demonstration.")
    p.add_argument(
        "--max-tokens", "-m", type=int, default=256, help="Tokens of an answer (256), or -1."
    )
    p.add_argument("--repetition-penalty", type=float, help="Makes repeated tokens less likely.")
    p.add_argument(
        "--repetition-context-size", type=int, default=20, help="Among so many last tokens (20)."
    )
    p.add_argument(
        "--draft-model", help="A smaller model (KSA or plain) that proposes tokens: same answer."
    )
    add_kv(p)
    add_lookup(p)
    add_memory(p)
    p.add_argument(
        "--references", action="store_true", help="Show what each answer was drawn from."
    )
    p.add_argument(
        "--references-html", type=Path, metavar="FILE", help="The same as a page, token by token."
    )
    p.add_argument(
        "--prompt-cache-file",
        type=Path,
        help="A saved conversation (/save) to go on with, or a cache of mlx_lm.cache_prompt.",
    )
    p.add_argument("--verbose", type=truth, default=True, help="False: print only the answer.")
    for name in MEANINGLESS:
        p.add_argument(flag(name), nargs="*", help=argparse.SUPPRESS)
    return p


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Raises SessionError for those that make no sense, or none together."""
    p = parser()
    defaults = vars(p.parse_args([]))
    p.set_defaults(**dict.fromkeys(defaults))  # so that it can be seen what was given
    found = {name: x for name, x in vars(p.parse_args(argv)).items() if x is not None}
    args = argparse.Namespace(**{**defaults, **found})
    given = {name: x for name, x in found.items() if x != defaults[name]}
    for name, why in MEANINGLESS.items():
        if name in found:
            raise SessionError(f"{flag(name)}: {why}")
    check(found, LIMITS, NEEDS, SessionError)
    for name in SAMPLING:
        if name in given and not args.temp:
            raise SessionError(f"{flag(name)}: needs --temp above 0, else an answer is greedy")
    exclude(given, EXCLUSIVE, SessionError)
    if args.model == "":
        raise SessionError("--model: found nothing, expected a folder or a repo id")
    return args
