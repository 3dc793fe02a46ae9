"""Run the project's kernels on an NVIDIA GPU, against their definition: python -m tests.metal_cuda.run

`compute-sanitizer --tool racecheck python -m tests.metal_cuda.run` (or memcheck, initcheck, synccheck)
has each launch checked.
"""

import time

from ksa_mlx.attention import metal

from .. import test_kernels as cases
from .._kernels import name
from . import gpu, stand_in

LONG = {
    "dtype": "bfloat16",
    "dim": 128,
    "group": 4,
    "B": 1,
    "rows": 1,
    "keys": 17416,
    "values": "random",
}
QUANTISED = {
    "dtype": "float16",
    "dim": 128,
    "group_size": 64,
    "bits": 8,
    "summary_bits": 4,
    "rows": 1,
    "B": 2,
}


def main():
    def run(**_):
        return stand_in.running(gpu.launch, reload=[metal])

    todo = [(cases.decode_case, case) for case in (*cases.CHECKED, LONG)]
    todo += [(cases.quantised_case, dict(QUANTISED, keys=n)) for n in (30, 300)]
    todo += [(cases.prefill_case, case) for case in cases.PREFILL_CHECKED]
    for check, case in todo:
        began = time.perf_counter()
        check(run, **case)
        print(f"ok {check.__name__} {name(case)} ({time.perf_counter() - began:.1f} s)", flush=True)


if __name__ == "__main__":
    main()
