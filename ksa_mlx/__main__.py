"""mlx-lm's own commands with KSA models known to them: python -m ksa_mlx generate --model ...

Every subcommand of mlx-lm (generate, chat, server, cache_prompt, convert, lora, ...) with its own
flags. In comparison with `mlx_lm.generate --trust-remote-code` and so on:

- `--trust-remote-code` is not needed, also for draft models, which mlx-lm loads without it.
- `generate --prompt-cache-file` works: mlx-lm reads that file before the model, when the stock
  command does not know our cache yet (it stops with KeyError: 'RollingSummaryCache'). A damaged
  file, or one that does not fit the model, is refused.
- With `--draft-model` the caches can take back tokens, whatever the config says.
- `server` has a prompt cache that fits KSA models, see `server.py`.
- What a command refuses it refuses in one line.
"""

import argparse
import importlib
import os
import sys
from pathlib import Path

import mlx_lm.cli

from .cache.rollback import ENOUGH, ROLLBACK
from .chat import prompt_cache_file
from .errors import one_line
from .model import Model
from .stock import server


def reach_of_drafts(argv: list[str]) -> int | None:
    """The rollback that a command line with a draft model needs; None without one."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--draft-model")
    parser.add_argument("--num-draft-tokens", type=int, default=0)
    args, _ = parser.parse_known_args(argv)
    return None if args.draft_model is None else max(ENOUGH, args.num_draft_tokens)


def check_prompt_cache_files():
    """Make mlx_lm.generate, in this process, check the prompt cache that it is given."""
    command = importlib.import_module("mlx_lm.generate")  # the package has a function of that name
    opened, load = [], command.load

    def load_prompt_cache(file_name, return_metadata=False):
        cache, metadata = prompt_cache_file.open_cache(Path(file_name))
        opened.append((Path(file_name), cache))
        return (cache, metadata) if return_metadata else cache

    def load_and_check(*args, **kwargs):
        loaded = load(*args, **kwargs)
        while opened:
            file, cache = opened.pop()
            if isinstance(loaded[0], Model):
                prompt_cache_file.check(file, loaded[0], cache, cache[0].offset)
        return loaded

    command.load_prompt_cache, command.load = load_prompt_cache, load_and_check


def main(argv: list[str] | None = None) -> int:
    """Run a command of mlx-lm. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command = argv[0] if argv else ""
    if (reach := reach_of_drafts(argv)) is not None:
        os.environ.setdefault(ROLLBACK, str(reach))
    if command == "server":
        server.install()
    elif command == "generate":
        check_prompt_cache_files()
    sys.argv = ["mlx_lm", *argv]
    try:
        mlx_lm.cli.main()
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as e:  # MLX's own errors are RuntimeErrors
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
