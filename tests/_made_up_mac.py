"""A Mac that does not exist, for the report's tests and the example in docs/report.md.

Its figures follow from a few round numbers below. None was measured. After a change of the report's
form, `python -m tests._made_up_mac` writes the example anew.
"""

import tempfile
from pathlib import Path
from unittest import mock

from ksa_mlx.attention import trial
from ksa_mlx.report import __main__ as report
from ksa_mlx.report import costs, kernels
from ksa_mlx.report.stage import Options

PAGE = Path(__file__).parent.parent / "docs" / "report.md"
MAC = Options(True, 30 << 30)

READ = 310.0  # GB/s
TFLOPS = {"float16": 14.1, "bfloat16": 14.0, "float32": 7.2}
COSTS = (1.0, 14.2, 6.1, 2.0, 2.1, 4.0, 3.9, 1.2, 18.3, 2.9)
# Time of each arm, as a share of what reading alone takes; kernels in the order of their names.
OPERATIONS = {"plain": 1.10, "8 bit": 2.6, "4 bit": 4.1, "4 bit, text 8": 4.4}
KERNEL = {"plain": 1.13, "8 bit": 1.3, "4 bit": 1.75, "4 bit, text 8": 1.8}

WHO = {
    "chip": "Made-up M0 Max", "gpu": "applegpu_g00s", "memory_gb": 36.0, "system": "macOS 26.9",
    "build": "25X000", "metal": True, "tensor_units": False, "python": "3.13.1", "mlx": "0.32.4",
    "wheel": "cp313-cp313-macosx_26_0_arm64", "mlx_lm": "0.32.2", "sources": "0123456789ab",
    "low_power": False, "speed_limit": 100, "environment": {},
}  # fmt: skip


def clock(step=3.0):
    """Seconds that go by at each look."""
    now = [0.0]

    def look():
        now[0] += step
        return now[0]

    return look


def times(arms, shape, form, rows=1):
    """Milliseconds a layer."""
    alone = trial.nbytes(shape) / READ / 1e6
    ms = {}
    for i, name in enumerate(arms):
        share = OPERATIONS[form] if name == "operations" else KERNEL[form] + 0.02 * (i - 1)
        ms[name] = alone * share * (1 + 0.12 * (rows - 1)) + 0.004
    return ms


def decode(case):
    dtype, rest = case.split(", ", 1)
    form, rest = rest.split(", rows ")
    rows, keys, *more = (int("".join(filter(str.isdigit, part))) for part in rest.split(", "))
    dim = more[0] if "head_dim" in case else kernels.DIM
    sequences = more[-1] if "sequences" in case else 1
    dtype = {"bf16": kernels.mx.bfloat16, "f16": kernels.mx.float16}[dtype]
    key = kernels.key_of(dtype, dim, rows, form, keys, sequences=sequences)
    ms = times(kernels.arms_of(key), key, form, rows)
    return {"ms": ms, "bytes": trial.nbytes(key)}


def prefill(case):
    rows, keys = (int(part.split()[0]) for part in case.removeprefix("bf16, ").split(" on "))
    flops = 4 * 128 * 32 * rows * (keys - rows / 2)
    best = flops / 12.5e9
    return {
        "ms": {"operations": best * 1.06, "kernel": best * 1.21},
        "flops": flops,
        "causal": best,
    }


def chosen(case):
    if case == "MLX's attention":
        return {"1024": 2.1e-3, "4096": 2.4e-3, "32768": 2.2e-3}
    if case == "prefill":
        return {"512 rows": ["operations", {"operations": 2.4, "kernel": 2.8}]}
    form, rows = case.removeprefix("decode, ").rsplit(", rows ", 1)
    found = {}
    for keys in trial.DECODE.timed:
        key = kernels.key_of(kernels.mx.bfloat16, kernels.DIM, int(rows), form, keys)
        ms = times(kernels.arms_of(key), key, form, int(rows))
        best, _ = kernels.best(ms)
        found[str(keys)] = [best if ms[best] * 1.03 <= ms["operations"] else "operations", ms]
    return found


def model(case):
    n = int(case.split()[0])
    ksa, qwen3 = 8.4 + n * 1.1e-4, 8.3 + n * 4.7e-4
    place = {name: {"over": 900_000, "copies": False, "ms": 9.0} for name in ("ksa", "qwen3")}
    return {
        "ksa": {"step": ksa, "mean": ksa * 1.04, "build": 1.3, "hand over": 1.9},
        "qwen3": {"step": qwen3, "mean": qwen3, "build": 1.1, "hand over": 1.7},
        "in_place": place,
    }


def batch(case):
    rows = int(case.split()[0])
    return {
        "ksa": {"tokens_s": rows * 118 / (1 + 0.08 * rows), "build": 1.2 + 0.1 * rows},
        "qwen3": {"tokens_s": rows * 120 / (1 + 0.07 * rows), "build": 1.1},
    }


def found(stage, case):
    if stage == "machine":
        if case in TFLOPS:
            return {"tflops": TFLOPS[case]}
        launches = {"us": 2.4, "independent_us": 0.7, "eval_us": 180.0}
        return {"read": {"gb_s": READ}, "copy": {"gb_s": 302.0}, "launches": launches}[case]
    if stage == "costs":
        return {"ns": (COSTS[list(costs.OPERATIONS).index(case)] + costs.OPERATIONS[case]) * 0.21}
    if stage == "raised":
        return {"ksa": {"over": 72e6, "copies": True, "ms": 31.0},
                "qwen3": {"over": 270e6, "copies": True, "ms": 58.0}}  # fmt: skip
    fixed = {"who": WHO, "compiles": {"off": 3e-3, "seconds": 0.31}}
    made = {"decode": decode, "prefill": prefill, "choice": chosen, "model": model, "batch": batch}
    return fixed[stage] if stage in fixed else made[stage](case)


def run(stage, options, seconds):
    """In the place of `apart.run`."""
    for case in stage.cases(options):
        yield case, found(stage.name, case)


def failing(stage, options, seconds):
    """The same where every case after the first stage crashes."""
    for case in stage.cases(options):
        fault = {"error": "its process ended with SIGABRT: no GPU"}
        yield case, found(stage.name, case) if stage.name == "who" else fault


def parts():
    """The page before its example, the example, and the page behind."""
    before, example, behind = PAGE.read_text(encoding="utf-8").split("```")
    return before, example.removeprefix("\n"), behind


def main():
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(report, "here", lambda model: MAC),
        mock.patch.object(report.apart, "run", run),
        mock.patch.object(report.time, "monotonic", clock()),
    ):
        report.main(["--out", f"{folder}/x"])
        text = Path(folder, "x.txt").read_text(encoding="utf-8")
    before, _, behind = parts()
    PAGE.write_text(f"{before}```\n{text}```{behind}", encoding="utf-8")


if __name__ == "__main__":
    main()
