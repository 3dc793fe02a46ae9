"""Measure this machine, in one text of at most 120 lines to paste into an issue.

    python -m ksa_mlx report                    # on a Mac: at most 8 minutes
    python -m ksa_mlx report --model KSA-4B     # with the released 4B: its reference cases too

Stages run in processes of their own with a time limit, and print what they find at once. The files
ksa-mlx-report.txt, with the numbers that decide on top, and .json are written after each of them.
Without Metal the rest is run.
"""

import argparse
import sys
import time
from pathlib import Path

from ..attention import metal
from ..attention.choice import OPERATIONS
from ..benchmark.results import check_file
from ..checkpoint.source import open_source
from ..errors import KSAError, exit_status
from . import apart, kernels, models, reference
from .paper import Paper, wrapped
from .stage import Options, here
from .stages import STAGES

MINUTES = 8.0
TOP = 12  # lines of the numbers that decide


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="ksa_mlx report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--model", help="a folder or Hub id of the released KSA-4B, or of its quantised "
                                   "copy")  # fmt: skip
    p.add_argument("--out", default="ksa-mlx-report", metavar="PATH",
                   help="write PATH.txt and PATH.json (default: %(default)s)")  # fmt: skip
    p.add_argument("--minutes", type=float, default=MINUTES, help="at most (default: %(default)g)")
    return p


def decides(paper: Paper, on_metal: bool) -> list[str]:
    """The few numbers that decide, as far as they were measured."""

    def ratio(stage: str, case: str) -> str:
        found = kernels.ratio(paper.found.get(stage, {}).get(case))
        return "not measured" if found is None else f"{found:.2f}"

    def number(form: str, *where: str) -> str:
        found = paper.of(*where)
        return "not measured" if found is None else form.format(found)

    def over_plain() -> str:
        ms = [paper.of("decode", f"bf16, {form}, rows 1, 17408 keys", "ms") or {}
              for form in ("4 bit", "plain")]  # fmt: skip
        four, plain = (min((t for k, t in x.items() if k != OPERATIONS), default=None) for x in ms)
        return f"{four / plain:.2f}" if four and plain else "not measured"

    def place(stage: str) -> str:
        cases = paper.found.get(stage, {})
        found = [x.get("in_place", x) for x in cases.values() if "error" not in x]
        said = [models.verdict(x["ksa"]) for x in found if "ksa" in x]
        return said[-1] if said else "not measured"

    lines = [
        f"read bandwidth: {number('{:.3g} GB/s', 'machine', 'read', 'gb_s')}",
        f"an operation in a row: {number('{:.2f} us', 'machine', 'launches', 'us')}",
        f"caches appended: {place('model')}",
    ]
    if not on_metal:
        return ["no Metal here: kernels were not run, times are of a CPU", *lines]
    chosen = [
        f"{case.removeprefix('decode, ').removesuffix(', rows 1')} {x[keys][0]}"
        for case, x in paper.found.get("choice", {}).items()
        for keys in ("16384", "512 rows")
        if isinstance(x.get(keys), list)
    ]
    return [
        *lines[:1],
        f"plain decode, 17408 keys, kernel / operations: "
        f"{ratio('decode', 'bf16, plain, rows 1, 17408 keys')}",
        f"4-bit decode, kernel / operations: {ratio('decode', 'bf16, 4 bit, rows 1, 17408 keys')}; "
        f"kernel / plain kernel: {over_plain()}",
        f"prefill, kernel / operations: {ratio('prefill', 'bf16, 2048 rows on 17408 keys')}",
        *lines[1:],
        f"with MLX_MAX_OPS_PER_BUFFER=1000: {place('raised')}",
        f"chosen at 16384 keys: {'; '.join(chosen) or 'not measured'}",
    ]


def report(options: Options, paper: Paper, minutes: float):
    """Run all stages, as far as time allows."""
    began = time.monotonic()
    until = began + 60 * minutes
    for stage in STAGES:
        if not stage.cases(options):
            continue
        left = until - time.monotonic()
        paper.say("", f"{stage.title}:")
        if left < 5:
            paper.say("  no time was left")
            continue
        until_line = len(paper.lines) + stage.most
        for case, found in apart.run(stage, options, min(stage.seconds, left)):
            paper.note(stage.name, case, found)
            line = f"{case}: {found['error']}" if "error" in found else stage.line(case, found)
            said = [f"  {line}"] if line else []
            said += [f"  ! {x}" for x in found.get("warnings", ())]
            paper.say(*said, until=until_line)
        paper.say(*(f"  {line}" for line in stage.end(paper.found.get(stage.name, {}))))
        paper.keep(top(paper, options))
    paper.say("", f"{time.monotonic() - began:.0f} s in all")


def top(paper: Paper, options: Options) -> list[str]:
    said = decides(paper, options.metal)
    return ["What decides:", *(part for line in said for part in wrapped(f"  {line}"))]


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    args = parser().parse_args(argv)

    def command():
        metal.wanted()  # refuses a KSA_MLX_KERNELS that says nothing
        if not 0 < args.minutes <= 60:
            raise KSAError(f"--minutes: found {args.minutes:g}, expected more than 0, at most 60")
        path = Path(args.out)
        for ending in (".txt", ".json"):
            check_file("--out", str(path.with_name(path.name + ending)) if path.name else "")
        if args.model is not None:
            source = open_source(args.model)
            reference.check(source.config, args.model)
            args.model = str(source.folder)
        options, paper = here(args.model), Paper(path, TOP)
        try:
            report(options, paper, args.minutes)
        finally:
            said = top(paper, options)
            paper.keep(said)
            print("\n" + "\n".join(said), flush=True)
            print(f"\nAll of this, this part first: {paper.text}; figures: {paper.figures}")

    return exit_status(command, "stopped; what was measured stands above")


if __name__ == "__main__":
    sys.exit(main())
