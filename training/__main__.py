"""Train the notebook assistant, the small KSA model that ships with the project.

    python -m training --out run            # tokenizer, weights and checkpoint, from nothing
    python -m training --out run --resume   # go on where it stopped

Needs the extra ``torch``.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path

from ksa_mlx.errors import KSAError, exit_status

from .tokenizer import load_tokenizer, train_tokenizer

STEPS, LONGER_STEPS, VOCAB_SIZE = 5000, 600, 1280
# What the first part leaves for the second, and where that keeps its state.
SHORT, LONGER, STATE = "short", "longer", "state.pt"
# Of a checkpoint, in the order in which they are written.
FILES = ("model.safetensors", "tokenizer.model", "config.json", "tokenizer_config.json")


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="training", description=__doc__.split("\n")[0])
    p.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the tokenizer, the states and the checkpoint",
    )
    p.add_argument("--steps", type=int, help=f"on documents that grow to 1,024 tokens ({STEPS})")
    p.add_argument(
        "--longer-steps",
        type=int,
        default=LONGER_STEPS,
        help="after them, on documents of up to 4,096 tokens; 0: none (%(default)s)",
    )
    p.add_argument(
        "--begin",
        type=Path,
        metavar="FOLDER",
        help="a checkpoint to begin with: only the steps on longer documents",
    )
    p.add_argument(
        "--lr", type=float, default=4e-3, help="a quarter of it in the longer steps (%(default)s)"
    )
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--vocab-size", type=int, help=f"of the tokenizer ({VOCAB_SIZE})")
    p.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16, for CPUs that have it"
    )
    p.add_argument(
        "--resume", action="store_true", help="go on from the state in --out, with the same flags"
    )
    return p


def whole(checkpoint: Path) -> bool:
    return all((checkpoint / name).is_file() for name in FILES)


def check(args: argparse.Namespace):
    """Raises KSAError for a run that cannot begin, and for flags that would do nothing."""
    least = {"steps": 1, "longer_steps": 0, "threads": 1, "vocab_size": 1}
    for name, low in least.items():
        if (value := getattr(args, name)) is not None and value < low:
            flag = name.replace("_", "-")
            raise KSAError(f"--{flag}: found {value}, expected at least {low}")
    first, second = args.out / STATE, args.out / LONGER / STATE
    states = [f for f in (first, second) if f.exists()]
    if args.resume and not states:
        raise KSAError(f"{first}: is missing, nothing to resume")
    if states and not args.resume:
        raise KSAError(f"{states[0]}: exists, add --resume or choose another folder")
    done = args.begin or (args.out / SHORT if whole(args.out / SHORT) else None)
    for name in ("steps", "vocab_size"):
        if done and getattr(args, name) is not None:
            raise KSAError(
                f"--{name.replace('_', '-')}: does nothing, as the longer steps begin with {done}"
            )
    if args.begin:
        if not whole(args.begin):
            raise KSAError(f"--begin: {args.begin}: expected a checkpoint: {', '.join(FILES)}")
        if first.exists():
            raise KSAError(f"--begin: {first} is of a run that began from nothing")
        if not args.longer_steps:
            raise KSAError("--begin: found --longer-steps 0, expected steps to do")
    elif not done and states == [second]:
        raise KSAError(f"{second}: of a run with --begin, which is missing now")
    if find_spec("torch") is None:
        raise KSAError("needs torch; install the extra: pip install -e '.[torch]'")


def run(args: argparse.Namespace):
    """Both parts. The second begins with the first one's checkpoint, in float16 as it is written,
    so that it can be run by itself. Raises KSAError."""
    check(args)
    import torch  # noqa: PLC0415

    from .export import export, read  # noqa: PLC0415
    from .model import NotebookConfig  # noqa: PLC0415
    from .train import LONGER_LEVELS, train  # noqa: PLC0415

    def say(line: str) -> None:
        print(line, flush=True)
        with (args.out / "train.log").open("a", encoding="utf-8") as log:
            print(line, file=log)

    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    common = {"seed": args.seed, "bfloat16": args.bfloat16, "say": say}
    short = args.begin or args.out / SHORT
    if args.begin is None and not whole(short):
        file, size = args.out / "tokenizer.model", args.vocab_size or VOCAB_SIZE
        tokenizer = load_tokenizer(file) if args.resume else train_tokenizer(file, size)
        model = train(
            tokenizer, args.out, steps=args.steps or STEPS, lr=args.lr, resume=args.resume,
            config=NotebookConfig(vocab_size=size), **common,
        )  # fmt: skip
        export(model, file, short)
    model, file = read(short), short / "tokenizer.model"
    if args.longer_steps:
        out = args.out / LONGER
        out.mkdir(exist_ok=True)
        model = train(
            load_tokenizer(file), out, steps=args.longer_steps, lr=args.lr / 4, begin=model,
            resume=(out / STATE).exists(), levels=LONGER_LEVELS, **common,
        )  # fmt: skip
    export(model, file, args.out / "checkpoint")
    say(f"wrote {args.out / 'checkpoint'}")


def main() -> int:
    args = parser().parse_args()
    stopped = f"stopped; --resume goes on from {args.out}"
    return exit_status(lambda: run(args), stopped, where=str(args.out))


if __name__ == "__main__":
    sys.exit(main())
