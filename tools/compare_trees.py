"""Is a change slower? Load time, first token and decode of two checkouts, in turns.

    git worktree add ../before COMMIT
    python tools/compare_trees.py ../before .               # the embedded model
    python tools/compare_trees.py ../before . --model DIR   # another converted folder

Each checkout runs in a process of its own that does one round when asked; rounds alternate. Only
what both have is called: `ksa_mlx.load` and mlx-lm's `stream_generate`. Ratios are medians over
rounds with quartiles, second checkout to first: above 1 is slower. --cpu-time counts what the
process used instead of what the clock says, for a machine that does other work.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np

from ksa_mlx.benchmark.timing import Table, bar, ratio, spread

WARMUP = 1
WHAT = ("load, ms", "first token, ms", "a token, ms")

WORKER = """
import json, sys, time
from pathlib import Path
import mlx.core as mx
import ksa_mlx
from mlx_lm import stream_generate

folder, prompt_tokens, new_tokens, cpu = json.loads(sys.argv[1])
folder = folder or str(Path(ksa_mlx.__file__).parent / "notebook")
clock = time.process_time if cpu else time.perf_counter

def round_():
    start = clock()
    model, tokenizer = ksa_mlx.load(folder)
    mx.eval(model.parameters())
    loaded = clock()
    # Ids that every text has: the same for both, whatever the tokenizer does with text.
    prompt = [20 + i * 7919 % (model.args.num_predicted - 40) for i in range(prompt_tokens)]
    at = [clock()]
    for _ in stream_generate(model, tokenizer, prompt, max_tokens=new_tokens):
        at.append(clock())
    took = at[-1] - at[1]
    return [loaded - start, at[1] - at[0], took / max(1, len(at) - 2)]

print(json.dumps(str(Path(ksa_mlx.__file__).parent)), flush=True)
for line in sys.stdin:
    print(json.dumps(round_()), flush=True)
"""


class Checkout:
    """A process that measures with the package of one checkout."""

    def __init__(self, root: Path, *options):
        env = {**os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, "-c", WORKER, json.dumps(options)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env, cwd=root
        )
        package = self._answer()
        if Path(package) != root / "ksa_mlx":
            raise SystemExit(f"{root}: found the package in {package}, expected it in the checkout")

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("a checkout's process ended, see above")
        return json.loads(line)

    def round(self) -> list[float]:
        """Seconds: load, first token, a token of decode."""
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path, help="a checkout")
    parser.add_argument("after", type=Path, help="another one")
    parser.add_argument("--model", type=Path, help="a converted folder; else the embedded model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens a round")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds, not the clock's")
    args = parser.parse_args()
    folder = args.model and str(args.model.resolve())
    options = folder, args.prompt, args.tokens, args.cpu_time
    both = [Checkout(root.resolve(), *options) for root in (args.before, args.after)]
    rounds = []
    with bar("rounds", WARMUP + args.rounds) as tick:
        for _ in range(WARMUP + args.rounds):
            rounds.append([checkout.round() for checkout in both])
            tick()
    before, after = np.array(rounds[WARMUP:]).transpose(1, 2, 0)
    table = Table(
        f"{args.rounds} rounds, {args.prompt} tokens read, {args.tokens} new",
        [("", 18), ("before", 12), ("after", 12), ("after / before", 20)],
    )
    for name, a, b in zip(WHAT, before, after, strict=True):
        middle = (f"{np.median(x) * 1e3:.2f}" for x in (a, b))
        table.add(name, *middle, spread(ratio(b, a)))
    for checkout in both:
        checkout.process.stdin.close()
        checkout.process.wait()


if __name__ == "__main__":
    main()
