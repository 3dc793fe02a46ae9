"""What compression costs: recall and losses of models side by side, with their summaries hidden,
and on quantised caches.

    python -m ksa_mlx recall --model KSA-4B                      # an hour or more on a Mac
    python -m ksa_mlx recall --model KSA-4B Qwen/Qwen3-4B --kinds needle --lengths 8192 32768
    python -m ksa_mlx recall --model KSA-4B --kv-bits 8 4 --data book.txt --plot recall.png

A run that is stopped goes on with the same command, from the file of --results.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from tqdm import tqdm

from ..benchmark import plot as figures
from ..benchmark.results import check_files
from ..errors import KSAError, exit_status
from ..files import replaced
from ..stock.flags import add_memory, check
from . import plot, table
from .models import labels
from .prompts import CHATS
from .run import Plan, Run, read_text
from .store import Row, Store
from .summary import summary
from .tasks import KINDS

# What a flag's value must be.
LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "questions": (lambda n: n >= 1, "at least 1"),
    "depths": (lambda n: 2 <= n <= 12, "2 to 12"),
    "seed": (lambda n: n >= 0, "at least 0"),
    "memory_limit": (lambda n: n > 0, "more than 0"),
}
NEEDS = {
    "kv_group_size": "kv_bits", "depths": "needle", "filler": "filled", "questions": "kinds",
    "chat": "kinds", "seed": "kinds",
}  # fmt: skip
# What is said of a need that no flag has by name.
SAID = {"needle": "--kinds needle", "filled": "--kinds other than common, which has no filler"}


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="ksa_mlx recall", description=__doc__.split("\n\n")[0])

    def add(flag: str, **kwargs):
        p.add_argument(flag, **kwargs)

    add("--model", nargs="+", required=True, help="folders or Hub ids: KSA models, and plain ones")
    add("--kinds", nargs="*", choices=KINDS, default=list(KINDS), help="of questions (all)")
    add(
        "--lengths",
        type=int,
        nargs="+",
        default=[1024, 2048, 4096],
        metavar="N",
        help="tokens of text; the longest is also that of --data (1024 2048 4096)",
    )
    add("--questions", type=int, default=40, metavar="N", help="of each kind and length (40)")
    add("--depths", type=int, default=5, metavar="N", help="at which needles lie (5)")
    add("--data", type=Path, nargs="+", default=[], metavar="FILE", help="texts: loss by position")
    add("--filler", type=Path, metavar="FILE", help="text between the facts (sentences made here)")
    add(
        "--chat",
        nargs="?",
        const="sentence",
        choices=CHATS,
        help="ask in the chat template; the answer begins like a sentence, or is bare",
    )
    add("--no-control", action="store_true", help="leave out the control, summaries hidden")
    add(
        "--kv-bits",
        type=int,
        nargs="*",
        default=[],
        choices=[4, 8],
        help="quantised caches too, after each step of reading",
    )
    add("--kv-group-size", type=int, default=64, choices=[32, 64, 128], help="(64)")
    add("--seed", type=int, default=0, help="of the questions (0)")
    add_memory(p)
    add(
        "--results",
        type=Path,
        default=Path("recall.jsonl"),
        metavar="FILE",
        help="what is measured, a line each; a stopped run goes on from there (recall.jsonl)",
    )
    add("--json", metavar="FILE", help="the figures, with their intervals")
    add("--plot", metavar="FILE.png", help="needs matplotlib (extra `plot`)")
    return p


def checked(p: argparse.ArgumentParser, options: argparse.Namespace) -> argparse.Namespace:
    """What `p` parsed. Raises KSAError for what makes no sense."""
    found = {k: v for k, v in vars(options).items() if v is not None}
    given = {k for k, v in found.items() if v != p.get_default(k)}
    check(found, LIMITS, {})
    if not options.kinds and not options.data:
        raise KSAError("--kinds: found none, expected at least one, or --data")
    absent = {k for k in ("kinds", "kv_bits") if not found[k]}
    absent |= {"needle"} if "needle" not in options.kinds else set()
    absent |= set() if {*options.kinds} - {"common"} else {"filled"}
    for name, other in NEEDS.items():
        if name in given and other in absent:
            what = SAID.get(other, f"--{other.replace('_', '-')}")
            raise KSAError(f"--{name.replace('_', '-')}: needs {what}")
    for n in options.lengths:
        if n < 1:
            raise KSAError(f"--lengths: found {n}, expected at least 1 token")
    for name in ("model", "kinds", "lengths", "kv_bits", "data"):
        values = getattr(options, name)
        if twice := [v for v in values if values.count(v) > 1]:
            raise KSAError(f"--{name.replace('_', '-')}: found {twice[0]} twice")
    for file in options.data:  # by their names they are told apart in what is printed
        if file.name == "all" or [f.name for f in options.data].count(file.name) > 1:
            raise KSAError(
                f"--data: {file}: found a second {file.name!r}, expected names that differ, "
                "none of them 'all'"
            )
    check_files(json=options.json, plot=options.plot, results=options.results)
    if options.plot is not None:
        figures.check(options.plot)
    return options


def plan_of(options: argparse.Namespace) -> Plan:
    steps = options.depths - 1
    return Plan(
        kinds=tuple(options.kinds),
        lengths=tuple(sorted(options.lengths)),
        questions=options.questions,
        seed=options.seed,
        depths=tuple(i / steps for i in range(options.depths)),
        kv_bits=tuple(options.kv_bits),
        kv_group_size=options.kv_group_size,
        chat=options.chat,
        control=not options.no_control,
        data=tuple(options.data),
        filler=options.filler and read_text("--filler", options.filler),
        memory_limit=options.memory_limit,
    )


def measure(options: argparse.Namespace, plan: Plan, store: Store) -> list[Row]:
    """Measure all models, one after the other. Returns the rows that the plan asks for."""
    short, rows = labels(options.model), []
    runs = [Run(plan, store, name, short[name]) for name in options.model]
    total = sum(run.total for run in runs)
    with tqdm(total=total, unit="tok", unit_scale=True, leave=False, disable=None) as bar:

        def tick(tokens: int, what: str):
            if what:
                bar.set_description(what)
            bar.update(tokens)

        while runs:  # each model leaves before the next one's weights are read
            runs[0].go(tick)
            rows += runs.pop(0).rows
    return rows


def run(options: argparse.Namespace):
    plan = plan_of(options)
    store = Store(options.results, plan.settings)
    try:
        found = summary(measure(options, plan, store))
    finally:
        store.close()
    table.show(found)
    if options.json is not None:
        with replaced(Path(options.json).absolute()) as part:
            text = json.dumps({**plan.settings, **found}, indent=1)
            part.write_text(text + "\n", encoding="utf-8")
    if options.plot is not None:
        plot.plot(found, options.plot)


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    transformers.logging.set_verbosity_error()  # it warns of texts that are long for a tokenizer
    p = parser()
    options = p.parse_args(argv)
    stopped = f"stopped; the same command goes on from {options.results}"
    return exit_status(lambda: run(checked(p, options)), stopped)


if __name__ == "__main__":
    sys.exit(main())
