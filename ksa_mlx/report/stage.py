"""What the report is made of: stages, each a list of cases that are measured one by one."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mlx.core as mx

from ..errors import one_line

Found = dict[str, Any]  # what a case found out; JSON's types only
Cases = dict[str, Callable[[], Found]]


class Options(NamedTuple):
    """What stages are told.

    metal: whether kernels run here. memory: bytes that may be used. model: a folder or Hub id whose
    reference cases are wanted.
    """

    metal: bool
    memory: int
    model: str | None = None


def here(model: str | None = None) -> Options:
    """The options on this machine."""
    info = mx.device_info()
    metal = mx.metal.is_available() and mx.default_device() == mx.gpu
    memory = info.get("max_recommended_working_set_size") or info.get("memory_size") or 4 << 30
    return Options(metal, int(memory), model)


def measured(measure: Callable[[], Found]) -> Found:
    """What a case found, with our warnings; {"error": line} if it failed."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = measure()
        except (OSError, RuntimeError, ValueError, MemoryError, AssertionError) as error:
            found = {"error": one_line(error)}
    if said := [str(w.message) for w in caught if "ksa-mlx" in str(w.message)]:
        found["warnings"] = said
    return found


def nothing(found: dict[str, Found]) -> list[str]:
    return []


@dataclass(frozen=True)
class Stage:
    """One part of the report, run in a process of its own.

    cases: what it measures, by name; empty where it has nothing to do. line: of one case, as soon
    as it is measured; None: no line. end: lines about all of them. seconds: its limit;
    case_seconds: that of a case, after which its process is ended and the next one is tried. env:
    variables of that process. most: lines about its cases.
    """

    name: str
    title: str
    cases: Callable[[Options], Cases]
    line: Callable[[str, Found], str | None] = lambda name, found: None
    end: Callable[[dict[str, Found]], list[str]] = nothing
    seconds: float = 60
    case_seconds: float = 20
    env: dict[str, str] = field(default_factory=dict)
    most: int = 12
