"""The server's flags that mlx-lm's own does not have."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx_lm.server

from ..memory.room import parse_size


def size(text: str) -> int:
    """A flag's bytes."""
    try:
        return parse_size(text)
    except ValueError as e:
        raise argparse.ArgumentTypeError(str(e)) from None


def _prompt_cache(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--prompt-cache-dir",
        type=Path,
        metavar="DIR",
        help="Keep prompt caches in files there, which outlive the server",
    )
    parser.add_argument(
        "--prompt-cache-disk-size",
        type=size,
        default=20 * 10**9,
        metavar="SIZE",
        help="All files together; those used least recently leave first (default: 20GB)",
    )


def _memory(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--memory-limit",
        type=size,
        metavar="SIZE",
        help="Refuse what weights, caches and reading would need more for, such as 12GB "
        "(default: what the device recommends)",
    )


# One function a subject, in the order of the help.
GROUPS: list[Callable[[argparse.ArgumentParser], None]] = [_prompt_cache, _memory]


class Parser(argparse.ArgumentParser):
    """mlx-lm's parser, which it makes in a function of its own, with our flags."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        for group in GROUPS:
            group(self)
        return super().parse_args(*args, **kwargs)


def install():
    """Make mlx_lm.server's command line know our flags."""
    mlx_lm.server.argparse = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
