"""mlx-lm's commands in this process, with KSA models known to them.

In comparison with `mlx_lm.chat --trust-remote-code` and so on: `--trust-remote-code` is not needed,
also for draft models, which mlx-lm loads without it; with `--draft-model` the caches can take back
tokens, whatever the config says; `lora` has a flag of ours (see `adapters.py`); `server` is ours in
part (see `server.py`); and what a command refuses it refuses in one line.
"""

import argparse
import contextlib
import io
import os
import re
import sys
from pathlib import Path

import mlx_lm.cli

from ..cache.rollback import ENOUGH, ROLLBACK
from ..checkpoint.source import fetch_config
from ..errors import KSAError, one_line
from . import adapters, server

# Which extra of mlx-lm brings a package that a fresh install lacks.
EXTRAS = {"datasets": "train", "lm_eval": "evaluate", "PIL": "vision"}


def names() -> list[str]:
    """mlx-lm's commands, as its own help lists them: it keeps them in a local variable."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        _main(["--help"])
    return re.findall(r"'(\w+)'", out.getvalue())


def run(command: str, argv: list[str]) -> int:
    """Run a command of mlx-lm with its own flags. Returns the exit status."""
    args = _flags(argv)
    if args.max_kv_size is not None:
        # mlx-lm drops it without a word for models with caches of their own.
        print(
            "warning: --max-kv-size: a KSA model ignores it, as it keeps summaries of all old "
            "text instead of dropping it",
            file=sys.stderr,
        )
    if command == "server":
        server.install()
    elif command == "lora":
        adapters.install_flag()
    try:
        for flag, name in (("--model", args.model), ("--draft-model", args.draft_model)):
            if name is not None:
                _check_is_there(flag, name)
        _main([command, *argv], reach_of_drafts(args))
    except KeyboardInterrupt:
        return 130
    except EOFError:
        if command == "chat":  # its way to end where standard input is no terminal
            return 0
        print(f"error: {command}: standard input has ended", file=sys.stderr)
    except ModuleNotFoundError as e:
        package = (e.name or "").partition(".")[0]
        extra = f": pip install 'mlx-lm[{EXTRAS[package]}]'" if package in EXTRAS else ""
        print(f"error: {command}: needs the package {package}{extra}", file=sys.stderr)
    except Exception as e:  # whatever mlx-lm, MLX or the Hub's client make of a bad argument
        kind = "" if isinstance(e, (ValueError, OSError, RuntimeError)) else f"{type(e).__name__}: "
        print(f"error: {command}: {kind}{one_line(e)}", file=sys.stderr)
    else:
        return 0
    return 1


def _flags(argv: list[str]) -> argparse.Namespace:
    """The flags of mlx-lm that concern us; its own parser has the last word on all."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    for flag in (
        "--model",
        "--draft-model",
        "--max-kv-size",
        "--num-draft-tokens",
        "--prompt-lookup",
    ):
        parser.add_argument(flag)
    try:
        return parser.parse_known_args(argv)[0]
    except argparse.ArgumentError:
        return parser.parse_args([])


def _check_is_there(flag: str, name: str):
    """Say which model is missing, or its tokenizer: the libraries that mlx-lm asks name neither."""
    try:
        fetch_config(name)
    except KSAError as e:
        raise KSAError(f"{flag}: {e}") from None
    # More than a KSA model's: any model of mlx-lm's may be asked for.
    kinds = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
    folder = Path(name)
    if folder.is_dir() and not any(any(folder.glob(kind)) for kind in kinds):
        raise KSAError(f"{flag}: {name}: found no tokenizer, such as tokenizer.json")


def reach_of_drafts(args: argparse.Namespace) -> int | None:
    """The rollback that a command line with drafts needs; None without."""
    if args.draft_model is None and args.prompt_lookup is None:
        return None
    number = args.num_draft_tokens or ""
    return max(ENOUGH, int(number) if number.isdecimal() else 0)


def _main(argv: list[str], rollback: int | None = None):
    """mlx-lm's entry point. It has no parameters: the command line goes in as `sys.argv`, and the
    rollback of the models that it will load as an environment variable, which ours read."""
    if rollback is not None:
        os.environ.setdefault(ROLLBACK, str(rollback))
    before, sys.argv = sys.argv, ["mlx_lm", *argv]
    try:
        mlx_lm.cli.main()
    finally:
        sys.argv = before
