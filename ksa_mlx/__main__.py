"""python -m ksa_mlx COMMAND: ours, and mlx-lm's with KSA models known to them."""

import importlib
import sys
import textwrap

from . import __version__
from .stock import commands

# Where the main(argv) of a command of ours is, and what it does.
OURS = {
    "generate": ("ksa_mlx.generate", "answer a prompt, or chat in the terminal"),
    "convert": ("ksa_mlx.convert", "convert a checkpoint to MLX, quantise or dequantise it"),
    "benchmark": ("ksa_mlx.benchmark.__main__", "measure speed and memory against full attention"),
    "retrofit": ("ksa_mlx.retrofit.__main__", "make a KSA model of a Qwen, a Llama or a Mistral"),
    "recall": ("ksa_mlx.recall.__main__", "measure what compression costs: recall and losses"),
    "report": ("ksa_mlx.report.__main__", "measure this machine, in one text to paste"),
}


def usage() -> str:
    """Both kinds of commands, in a few lines."""
    theirs = [name for name in commands.names() if name not in OURS]
    lines = ["usage: python -m ksa_mlx COMMAND ...   (COMMAND --help says more)", ""]
    lines += [f"  {name:<11}{about}" for name, (_, about) in OURS.items()]
    lines += ["", "and mlx-lm's, with KSA models known to them:"]
    return "\n".join([*lines, textwrap.indent(textwrap.fill(" ".join(theirs), 76), "  ")])


def main(argv: list[str] | None = None) -> int:
    """Run a command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    command, rest = (argv[0], argv[1:]) if argv else ("--help", [])
    if command in ("-h", "--help"):
        print(usage())
    elif command == "--version":
        print(__version__)
    elif command in OURS:
        return importlib.import_module(OURS[command][0]).main(rest) or 0
    elif command in commands.names():
        return commands.run(command, rest)
    else:
        print(f"error: found {command!r}, expected a command of: python -m ksa_mlx --help",
              file=sys.stderr)  # fmt: skip
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
