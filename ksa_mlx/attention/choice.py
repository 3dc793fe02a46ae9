"""Which of several ways to compute an attention is taken: those that are right, then the fastest.

A way is called an arm: MLX's operations are one, each variant of a kernel is another. On a Mac all
are compared with plain operations in float32, then timed in turns on the shapes that the model
runs; what was found is kept in a file (`record.py`).
"""

import functools
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from ..cache.storage import Form
from ..errors import one_line
from . import record

OPERATIONS = "operations"

# The largest difference that is allowed, as a share of the largest value. Outputs of bfloat16 are
# off by 0.004 of it, float32 on an M5 by 0.0005; a key lost of 300 is 0.05.
ALLOWED = 0.02
# A kernel is taken if operations take so many times as long.
FASTER = 1.03
# Turns, each of which times all arms forwards and backwards, and the seconds after which 2 must do.
TURNS = 5
BUDGET = 0.1
# Keys and values that a chain reads: more than any chip's caches hold.
CHAIN_BYTES = 192 << 20
# Memory that must be free for timing.
FREE_BYTES = 1 << 30

clock = time.perf_counter
evaluate = mx.eval

# Takes queries (B, heads, L, head_dim) and what else a trial hands out; returns their outputs.
Arm = Callable[[mx.array, Any], mx.array]


class Key(NamedTuple):
    """What an arm is chosen for.

    rows: query rows a sequence. forms: of each segment.
    keys: the length, one of the trial's `timed`. sequences: of a batch that share no cache.
    """

    kernel: str
    dtype: mx.Dtype
    head_dim: int
    kv_heads: int
    group: int
    rows: int
    forms: tuple[Form, ...]
    keys: int
    sequences: int = 1

    def __str__(self) -> str:
        """A line for people and for the file."""
        forms = " + ".join(map(str, self.forms))
        return (
            f"{self.kernel}, {name_of(self.dtype)}, head_dim "
            f"{self.head_dim}, {self.kv_heads} KV heads of {self.group}, rows {self.rows}, "
            f"{forms}, keys {self.keys}" + f", {self.sequences} sequences" * (self.sequences > 1)
        )


def name_of(dtype: mx.Dtype) -> str:
    """Such as bfloat16."""
    return str(dtype).removeprefix("mlx.core.")


class Inputs(NamedTuple):
    """queries: of the first layer. layers: what an arm takes beside queries, a layer each, none
    sharing memory with another. exact: what plain operations in float32 make of the first."""

    queries: mx.array
    layers: list[Any]
    exact: mx.array | None


@dataclass(frozen=True)
class Trial:
    """How arms are tried.

    make: (key, keys, bytes) -> Inputs with so many keys, and layers that fill `bytes`; one, and
    what is exact, for 0. checked: numbers of keys at which arms are compared. timed: those at which
    they are timed, all at once, so that no token of a growing text waits for a timing.
    """

    make: Callable[[Key, int, int], Inputs]
    checked: tuple[int, ...]
    timed: tuple[int, ...]

    def bucket(self, keys: int) -> int:
        """The timed length that stands for so many keys: the nearest one, by ratio."""
        return next((n for n in self.timed if keys <= 2 * n), self.timed[-1])


def bucket_of_rows(rows: int) -> int:
    """Rows that are timed for so many: 1, 4 for 2 to 4, 8 for 5 to 8; more stand for themselves."""
    return next((n for n in (1, 4, 8) if rows <= n), rows)


_taken: dict[tuple[Key, bool], str] = {}
_retuned: set[tuple[str, ...]] = set()  # what this process has measured anew
_warned = False


def chosen(
    key: Key, arms: Mapping[str, Arm], trial: Trial, untimed: str, retune: bool = False
) -> str:
    """The name of the arm to take.

    Args:
        key: the case.
        arms: all that there are, MLX's OPERATIONS among them.
        trial: how they are tried.
        untimed: what is taken, if it is right, where nothing can be timed.
        retune: whether what the file says is measured anew, once in this process.
    """
    name = _taken.get((key, retune))
    if name is None:
        name = _taken[key, retune] = _choose(key, arms, trial, untimed, retune)
    return name


def _choose(key: Key, arms: Mapping[str, Arm], trial: Trial, untimed: str, retune: bool) -> str:
    bucket = key._replace(rows=bucket_of_rows(key.rows))
    found = times(bucket, arms, trial, retune)
    ranking = [untimed] if found is None else ranked(found)
    for name in ranking:
        # The rows of a kernel are compiled in, so each number of them is compared by itself.
        if name == OPERATIONS or _is_right(key, name, arms[name], trial, retune):
            return name
    return OPERATIONS


def ranked(milliseconds: Mapping[str, float]) -> list[str]:
    """Arms, best first: kernels that are enough faster than operations, then operations."""
    ours = milliseconds.get(OPERATIONS, np.inf)
    kernels = {n: ms for n, ms in milliseconds.items() if n != OPERATIONS}
    ahead = [n for n, ms in sorted(kernels.items(), key=lambda x: x[1]) if ms * FASTER <= ours]
    return [*ahead, OPERATIONS]


# Right


def difference(key: Key, arm: Arm, trial: Trial) -> float | str:
    """Largest difference from plain operations in float32, a share of the largest value; or, in
    one line, why there is none."""
    shares = []
    try:
        for n in trial.checked:
            queries, (layer, *_), exact = trial.make(key, n, 0)
            assert exact is not None
            off = mx.abs(arm(queries, layer).astype(mx.float32) - exact).max()
            shares.append((off / mx.abs(exact).max()).item())
    except (RuntimeError, ValueError) as error:
        return f"does not run: {one_line(error)}"
    return max(shares) if np.isfinite(shares).all() else "gives values that are no numbers"


def _is_right(key: Key, name: str, arm: Arm, trial: Trial, retune: bool) -> bool:
    """Whether an arm agrees with plain operations; warns if not."""
    case, kept = str(key._replace(keys=0)), record.here()
    entry = kept.find("difference", case) or {}
    if name not in entry or (retune and (case, name) not in _retuned):
        _retuned.add((case, name))
        entry = {**entry, name: difference(key, arm, trial)}
        kept.keep("difference", case, entry)
    off = entry[name]
    if isinstance(off, float | int) and off <= ALLOWED:
        return True
    # Operations on quantised caches may just round more, as scores are of the queries' dtype.
    if name != OPERATIONS or not any(form.bits for form in key.forms):
        _warn(key, name, off)
    return False


def this_machine() -> str:
    """What a report of a fault must say of the machine."""
    device = mx.device_info().get("device_name", "unknown")
    return f"device {device}, macOS {platform.mac_ver()[0] or 'none'}, MLX {mx.__version__}"


def _warn(key: Key, name: str, off: float | str):
    """Say once in a process that an arm is not used."""
    global _warned
    if _warned:
        return
    _warned = True
    if not isinstance(off, str):
        off = f"differs by {off:.2g} of the largest value from plain operations in float32"
    case = str(key._replace(keys=0)).replace(", keys 0", "")
    what, instead = f"the Metal kernel {key.kernel}", "MLX's operations are used instead"
    if name == OPERATIONS:
        what, instead = "MLX's own attention", "a kernel is used instead where one is right"
    elif name != "kernel":
        what += f" ({name})"
    warnings.warn(
        f"ksa-mlx: {what} {off} ({case}). {instead[0].upper()}{instead[1:]}. Please report this "
        f"with: {this_machine()}",
        RuntimeWarning,
        stacklevel=2,
    )


# Fast


def times(
    key: Key, arms: Mapping[str, Arm], trial: Trial, retune: bool = False
) -> dict[str, float] | None:
    """Milliseconds a layer of each arm that is right, from the file or measured now at all of the
    trial's lengths; None where nothing can be timed."""
    kept = record.here()
    if not retune or (str(key),) in _retuned:
        entry = kept.find("milliseconds", str(key))
        if entry is not None and set(entry) == set(arms):
            return {n: ms for n, ms in entry.items() if not isinstance(ms, str)}
    if not can_time():
        return None
    sound = {n: arm for n, arm in arms.items() if _is_right(key, n, arm, trial, retune)}
    for keys in trial.timed:
        case = key._replace(keys=keys)
        measured = measure(case, sound, trial.make(case, keys, CHAIN_BYTES))
        _retuned.add((str(case),))
        mx.clear_cache()  # the chain's keys are not needed again
        # Of an arm that is wrong the difference is kept; here only that it was considered.
        kept.keep("milliseconds", str(case), {n: measured.get(n, "not timed") for n in arms})
    return times(key, arms, trial)


def can_time() -> bool:
    """Whether there is a Metal GPU with enough free memory."""
    if not mx.metal.is_available() or mx.default_device() != mx.gpu:
        return False
    limit = mx.device_info().get("max_recommended_working_set_size", 0)
    return limit - mx.get_active_memory() >= FREE_BYTES


def measure(key: Key, arms: Mapping[str, Arm], inputs: Inputs) -> dict[str, float]:
    """Medians in milliseconds a layer, in turns, of chains through all layers: the cost of an
    evaluation, far more than that of a layer, is shared by them. Python's building of the graph is
    not timed. Arms that fail are left out, with a warning."""

    def chain(arm: Arm) -> mx.array:
        return functools.reduce(arm, inputs.layers, inputs.queries)

    running = {}
    for name, arm in arms.items():  # this also compiles what the comparison did not
        try:
            evaluate(chain(arm))
            running[name] = arm
        except (RuntimeError, ValueError) as error:
            _warn(key, name, f"does not run: {one_line(error)}")
    seconds: dict[str, list[float]] = {name: [] for name in running}
    began = clock()
    for turn in range(TURNS):
        for name in [*running, *reversed(running)]:
            out = chain(running[name])
            start = clock()
            evaluate(out)
            seconds[name].append(clock() - start)
        if turn and clock() - began > BUDGET:
            break
    layers = len(inputs.layers)
    return {name: float(np.median(s)) * 1e3 / layers for name, s in seconds.items()}


def choices() -> list[tuple[Key, str]]:
    """What this process has chosen so far: cases and names of arms."""
    return [(key, name) for (key, _), name in _taken.items()]
