"""The process of a stage: `python -m ksa_mlx.report.child '["decode", [...], 0]'`."""

import json
import sys
from typing import Any

from .stage import Options, measured
from .stages import STAGES


def say(**event: Any):
    print(json.dumps(event), flush=True)


def main(what: str) -> int:
    """Run the cases of a stage from one of them on. what: JSON of its name, options and start."""
    name, options, start = json.loads(what)
    stage = next(stage for stage in STAGES if stage.name == name)
    cases = list(stage.cases(Options(*options)).items())
    for case, measure in cases[start:]:
        say(case=case)  # it is alive, and begins
        say(case=case, found=measured(measure))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
