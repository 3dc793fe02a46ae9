"""The server's flags that mlx-lm's own does not have, and what those of the KV cache may be."""

import argparse
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ..cache.rollback import ENOUGH
from ..errors import KSAError
from ..memory.room import parse_size

BITS = (2, 3, 4, 5, 6, 8)


def _one_of(*values: int) -> tuple[Callable[[Any], bool], str]:
    *most, last = values
    return lambda n: n in values, f"{', '.join(map(str, most))} or {last}"


# What a flag's value must be.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "kv_bits": _one_of(*BITS),
    "kv_text_bits": _one_of(*BITS),
    "kv_value_bits": _one_of(*BITS),
    "kv_group_size": _one_of(32, 64, 128),
    "quantized_kv_start": (lambda n: n >= 0, "at least 0"),
    "prompt_lookup": (lambda n: 1 <= n <= ENOUGH, f"1 to {ENOUGH}"),
    "memory_limit": (lambda n: n > 0, "more than 0"),
}
SERVERS = {**LIMITS, "prompt_cache_disk_size": (lambda n: n > 0, "more than 0")}

# A text does not draft beside a draft model.
LOOKUP = ("prompt_lookup", "draft_model", "both propose tokens")

# Flags that mean something beside another one only.
NEEDS = {
    "kv_text_bits": "kv_bits",
    "kv_value_bits": "kv_bits",
    "prompt_cache_disk_size": "prompt_cache_dir",
}


def add_kv(parser: argparse.ArgumentParser):
    """Add the flags that say which parts of a quantised cache have bits of their own."""
    parser.add_argument(
        "--kv-text-bits",
        type=int,
        help="Those of the text in the windows, where a few more bits cost little (--kv-bits).",
    )
    parser.add_argument(
        "--kv-value-bits", type=int, help="Those of the values, if not of all else (--kv-bits)."
    )


def _prompt_cache(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--prompt-cache-dir",
        type=Path,
        metavar="DIR",
        help="Keep prompt caches in files there, which outlive the server",
    )
    parser.add_argument(
        "--prompt-cache-disk-size",
        type=parse_size,
        metavar="SIZE",
        help="All files together; those used least recently leave first (default: 20GB)",
    )


def add_lookup(parser: argparse.ArgumentParser):
    """Add the flag that lets a text draft for itself."""
    parser.add_argument(
        "--prompt-lookup",
        type=int,
        metavar="N",
        help="Propose up to N tokens that followed the last ones before: same answer, in fewer "
        "steps where it copies.",
    )


def add_memory(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--memory-limit",
        type=parse_size,
        metavar="SIZE",
        help="Refuse what weights, caches and reading would need more for, such as 12GB "
        "(default: what the device recommends)",
    )


# One function a subject, in the order of the help.
GROUPS: list[Callable[[argparse.ArgumentParser], None]] = [
    _prompt_cache,
    add_memory,
    add_kv,
    add_lookup,
]


def flag(name: str) -> str:
    """The flag that an argument comes from."""
    return f"--{name.replace('_', '-')}"


def check(
    given: Mapping[str, Any],
    limits: Mapping[str, tuple[Callable[[Any], bool], str]],
    needs: Mapping[str, str],
    error: type[KSAError] = KSAError,
):
    """Raise an error for a value that makes no sense, or a flag without the one that it needs.

    Args: given: what flags say, by name. limits: what a value must be, and in words. needs: flags
    that mean something beside another one only.
    """
    for name, (sensible, expected) in limits.items():
        if name in given and not sensible(given[name]):
            raise error(f"{flag(name)}: found {given[name]}, expected {expected}")
    for name, other in needs.items():
        if name in given and other not in given:
            raise error(f"{flag(name)}: needs {flag(other)}")


def exclude(
    given: Mapping[str, Any],
    pairs: Iterable[tuple[str, str, str]],
    error: type[KSAError] = KSAError,
):
    """Raise an error for two flags that exclude each other; pairs: both names, and why."""
    for name, other, why in pairs:
        if name in given and other in given:
            raise error(f"{flag(name)}: not together with {flag(other)}: {why}")


class Parser(argparse.ArgumentParser):
    """mlx-lm's parser, which it makes in a function of its own, with our flags."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        for group in GROUPS:
            group(self)
        found = super().parse_args(*args, **kwargs)
        given = {name: x for name, x in vars(found).items() if x is not None}
        check(given, SERVERS, NEEDS)
        exclude(given, [LOOKUP])
        if found.prompt_lookup is not None:
            if found.num_draft_tokens != self.get_default("num_draft_tokens"):
                raise KSAError("--num-draft-tokens: needs --draft-model")
            found.num_draft_tokens = found.prompt_lookup  # which a request can lower
        return found


# What mlx_lm.server is to find under the name of the module.
ARGPARSE = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
