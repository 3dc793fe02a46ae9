"""Train the notebook assistant, the small KSA model that ships with the project.

    python -m training --out run            # tokenizer, weights and checkpoint, from nothing
    python -m training --out run --resume   # go on where it stopped

Needs the extra ``torch``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from .tokenizer import load_tokenizer, train_tokenizer


def main() -> int:
    parser = argparse.ArgumentParser(prog="training", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="folder for the tokenizer, the state and the checkpoint",
    )
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1280)
    parser.add_argument(
        "--bfloat16", action="store_true", help="products in bfloat16, for CPUs that have it"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    args = parser.parse_args()
    try:
        import torch  # noqa: PLC0415

        from .export import export  # noqa: PLC0415
        from .model import NotebookConfig  # noqa: PLC0415
        from .train import train  # noqa: PLC0415
    except ImportError as e:
        print(
            f"training: {e}; install the extra: pip install -e '.[torch]'",
            file=sys.stderr,
        )
        return 1
    args.out.mkdir(parents=True, exist_ok=True)
    state = args.out / "state.pt"
    if args.resume != state.exists():
        problem = (
            "is missing, nothing to resume"
            if args.resume
            else "exists, add --resume or choose another folder"
        )
        print(f"training: {state} {problem}", file=sys.stderr)
        return 1
    torch.set_num_threads(args.threads)
    model_file = args.out / "tokenizer.model"
    tokenizer = (
        load_tokenizer(model_file) if args.resume else train_tokenizer(model_file, args.vocab_size)
    )
    (args.out / "train.pid").write_text(str(os.getpid()))

    def say(line: str) -> None:
        print(line, flush=True)
        with (args.out / "train.log").open("a", encoding="utf-8") as log:
            print(line, file=log)

    model = train(
        tokenizer,
        args.out,
        steps=args.steps,
        lr=args.lr,
        seed=args.seed,
        resume=args.resume,
        config=NotebookConfig(vocab_size=args.vocab_size),
        bfloat16=args.bfloat16,
        say=say,
    )
    export(model, model_file, args.out / "checkpoint")
    say(f"wrote {args.out / 'checkpoint'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
