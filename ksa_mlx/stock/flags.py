"""The server's flags that mlx-lm's own does not have."""

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from ..memory.room import parse_size


def _memory(parser: argparse.ArgumentParser):
    parser.add_argument(
        "--memory-limit",
        type=parse_size,
        metavar="SIZE",
        help="Refuse what weights, caches and reading would need more for, such as 12GB "
        "(default: what the device recommends)",
    )


# One function a subject, in the order of the help.
GROUPS: list[Callable[[argparse.ArgumentParser], None]] = [_memory]


class Parser(argparse.ArgumentParser):
    """mlx-lm's parser, which it makes in a function of its own, with our flags."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        for group in GROUPS:
            group(self)
        return super().parse_args(*args, **kwargs)


# What mlx_lm.server is to find under the name of the module.
ARGPARSE = SimpleNamespace(**{**vars(argparse), "ArgumentParser": Parser})
