"""The instructions of a kernel's busiest loop, as clang's optimizer leaves them, by kind.

Counted are the blocks that every iteration passes, once each: rare branches, such as a rescaling, are left out.
What stands for the hardware in the instrument (simd operations and the bookkeeping around them) is left out
too; the instrument counts those where it executes them.
"""

import re
from collections import Counter

from . import live

# Kinds of instructions, by LLVM's opcode or intrinsic. Others cost nothing: comparisons belong to the select
# or branch that reads them, addresses to their load.
KINDS = {
    "arithmetic": "fadd fsub fmul fneg fma fmuladd maxnum minnum fabs select smin smax umin umax add sub and or xor",
    "convert": "uitofp sitofp fptoui fptosi",
    "shift": "shl lshr ashr mul",
    "divide": "fdiv sqrt",
    "branch": "br",
}
KIND = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes.split()}
# Files whose instructions are the instrument's own.
OWN = ("simd.h", "interface.h", "matrix.h")


def busiest_loop(ir: str) -> Counter[str]:
    """Instructions an iteration of the loop with most arithmetic; `meetings` are the instrument's simd operations."""
    own = _own_places(ir)
    best: Counter[str] = Counter()
    for function in live.functions(ir):
        for header in live.headers(function):
            mix = Counter(
                kind for name in _always(function, header) for line in function.blocks[name].lines
                if (kind := _kind(line, own))
            )  # fmt: skip
            best = max(best, mix, key=lambda one: one["arithmetic"])
    return best


def _kind(line: str, own: set[str]) -> str | None:
    if "@metal_cpu_meet(" in line:
        return "meetings"
    place = re.search(r", !dbg !(\d+)$", line)
    if place and place.group(1) in own:
        return None
    if called := re.search(r"call .*?@(?:llvm\.)?(\w+)", line):
        return KIND.get(called.group(1))
    found = re.match(rf"(?:{live.NAME} = )?(\w+)", line)
    opcode = found.group(1) if found else ""
    if opcode == "br" and " i1 " not in line:
        return None
    return KIND.get(opcode)


def _always(function: live.Function, header: str) -> list[str]:
    """Blocks that each iteration passes: without them no jump back is reached."""
    blocks = function.blocks
    before: dict[str, set[str]] = {name: set() for name in blocks}
    for name, block in blocks.items():
        for following in block.successors:
            before[following].add(name)
    body = {header}
    waiting = [x for x in before[header] if not _reaches(function, "entry", x, {header})]
    latches = set(waiting)
    while waiting:
        if (name := waiting.pop()) not in body:
            body.add(name)
            waiting += before[name]
    rest = set(blocks) - body
    return [
        name
        for name in body
        if name == header or not any(_reaches(function, header, x, rest | {name}) for x in latches)
    ]


def _reaches(function: live.Function, start: str, end: str, without: set[str]) -> bool:
    """Whether a path leads from start to end."""
    seen, waiting = set(without), [start]
    while waiting:
        if (name := waiting.pop()) in seen:
            continue
        if name == end:
            return True
        seen.add(name)
        waiting += function.blocks[name].successors
    return False


def _own_places(ir: str) -> set[str]:
    """Numbers of the debug locations whose innermost function is the instrument's own."""
    nodes = dict(re.findall(r"^!(\d+) = (?:distinct )?(!DI\w+\(.*\))$", ir, re.MULTILINE))
    files = {
        number for number, text in nodes.items()
        if text.startswith("!DIFile") and re.search(rf'filename: "[^"]*({"|".join(OWN)})"', text)
    }  # fmt: skip

    def file_of(number: str) -> str | None:
        text = nodes.get(number, "")
        if found := re.search(r"\bfile: !(\d+)", text):
            return found.group(1)
        parent = re.search(r"\bscope: !(\d+)", text)
        return file_of(parent.group(1)) if parent else None

    return {
        number for number, text in nodes.items()
        if text.startswith("!DILocation") and file_of(number) in files
    }  # fmt: skip
