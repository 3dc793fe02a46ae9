"""What a kernel does for each key: two lengths, and the difference."""

from collections.abc import Iterable

from .launch import MEETINGS, OPERATIONS, Launch


def per_key(short: Iterable[Launch], long: Iterable[Launch], keys: int) -> dict[str, float]:
    """What each of `keys` further keys costs: counts of the `long` launches less those of the `short` ones.

    What is done once a launch cancels out if both cut the work into as many threadgroups. Counted are a
    simdgroup's operations (barriers: a threadgroup's), so with several KV heads or sequences `keys` is the
    sum over all of them. Needs checked runs. The names are those of Launch, and `loads`:
    load instructions from buffers, of 32 lanes each.
    """

    def total(launches: Iterable[Launch]) -> dict[str, int]:
        launches = list(launches)
        loads = sum(x.loads for one in launches for x in one.buffers.values())
        sums = {x: sum(getattr(one, x) for one in launches) for x in (*MEETINGS, *OPERATIONS)}
        return {**sums, "loads": loads / 32}

    first, second = total(short), total(long)
    return {name: (second[name] - first[name]) / keys for name in first}
