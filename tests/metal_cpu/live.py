"""Estimate how many registers a kernel's loops hold: LLVM's float values that live across a loop's header.

Clang's optimizer makes of private arrays and variables values that are set once. What a loop carries from one
iteration to the next, and what it reads or passes by unchanged, must be somewhere while it runs: in registers,
or spilled. Temporaries inside of an iteration come on top, as do integers and addresses; how many of them there
are at once is up to the compiler's scheduling.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

NAME = r'%(?:"[^"]+"|[\w.$-]+)'
NUMBER = r"(?:<(?P<count>\d+) x )?(?P<type>half|bfloat|float|double)\b"
BITS = {"half": 16, "bfloat": 16, "float": 32, "double": 64}
NO_FLOAT = {"fcmp", "icmp", "getelementptr", "alloca", "ptrtoint", "inttoptr", "fptoui", "fptosi"}


@dataclass
class Block:
    """A basic block. `phis` are by predecessor; `uses` are of values that it does not define before."""

    lines: list[str] = field(default_factory=list)
    successors: list[str] = field(default_factory=list)
    defines: set[str] = field(default_factory=set)
    uses: set[str] = field(default_factory=set)
    phis: dict[str, set[str]] = field(default_factory=dict)


@dataclass
class Function:
    blocks: dict[str, Block]  # the entry first
    floats: dict[str, float]  # 32-bit registers a lane, of the values that have any


def functions(ir: str) -> Iterator[Function]:
    """The functions of LLVM's textual form, as clang writes it."""
    for text in re.findall(r"^define .*?\{\n(.*?)^\}", ir, re.MULTILINE | re.DOTALL):
        yield _function(text)


def _function(text: str) -> Function:
    blocks: dict[str, Block] = {}
    floats: dict[str, float] = {}
    block = blocks.setdefault("entry", Block())
    for line in re.sub(
        r"\[\n.*?\n\s*\]", lambda m: m.group().replace("\n", " "), text, flags=re.DOTALL
    ).split("\n"):
        if label := re.match(r'("[^"]+"|[\w.$-]+):', line):
            block = blocks.setdefault("%" + label.group(1), Block())
        elif line.startswith("  "):
            _add(block, floats, line.strip())
    names = set(blocks)
    for one in blocks.values():  # the entry has no label; phis call it by a number
        one.phis = {k if k in names else "entry": v for k, v in one.phis.items()}
    return Function(blocks, floats)


def _add(block: Block, floats: dict[str, float], line: str) -> None:
    block.lines.append(line)
    line = line.split(", !dbg")[0]
    block.successors += re.findall(rf"label ({NAME})", line)
    made = re.match(rf"({NAME}) = (?:(?:tail|musttail|notail) )?(\w+) (.*)", line)
    if made:
        name, operation, rest = made.groups()
        if size := _registers(operation, rest):
            floats[name] = size
    else:
        operation, rest = "", line
    if operation == "phi":
        for value, before in re.findall(rf"\[ (\S+), ({NAME}) \]", rest):
            block.phis.setdefault(before, set()).add(value)
    else:
        block.uses |= set(re.findall(NAME, rest)) - block.defines
    if made:
        block.defines.add(name)


def _registers(operation: str, rest: str) -> float:
    """32-bit registers that the result of an instruction takes, if it is of floating-point type."""
    if operation in NO_FLOAT:
        return 0
    if converted := re.search(r" to (\S+.*)$", rest):
        rest = converted.group(1) if operation != "call" else rest
    if operation == "call":  # the result's type stands before the function's name
        rest = rest.split("@")[0].split("(")[0]
    if not (found := re.search(NUMBER, rest)):
        return 0
    if operation in ("load", "call", "phi", "bitcast") and "ptr" in rest[: found.start()]:
        return 0
    count = 1 if operation == "extractelement" else int(found["count"] or 1)
    return count * BITS[found["type"]] / 32


def _live_in(function: Function) -> dict[str, set[str]]:
    """Of each block: values that it, or a later one, still reads. Its own phis are not among them."""
    live: dict[str, set[str]] = {name: set() for name in function.blocks}
    changed = True
    while changed:
        changed = False
        for name, block in reversed(function.blocks.items()):
            out = set().union(
                *(live[s] | function.blocks[s].phis.get(name, set()) for s in block.successors)
            )
            now = block.uses | (out - block.defines)
            changed |= now != live[name]
            live[name] = now
    return live


def headers(function: Function) -> set[str]:
    """Blocks that a later one jumps back to: in depth-first order, to a block that is not left yet."""
    found, state = set(), {"entry": 1}
    path = [("entry", iter(function.blocks["entry"].successors))]
    while path:
        name, rest = path[-1]
        if (following := next(rest, None)) is None:
            state[name] = 2
            path.pop()
        elif state.get(following) == 1:
            found.add(following)
        elif following not in state:
            state[following] = 1
            path.append((following, iter(function.blocks[following].successors)))
    return found


def live_floats(ir: str) -> float:
    """The most 32-bit float registers a lane that live across any loop's header; a half takes half of one."""
    most = 0.0
    for function in functions(ir):
        live = _live_in(function)
        for header in headers(function):
            block = function.blocks[header]
            phis = {
                made.group(1)
                for line in block.lines
                if (made := re.match(rf"({NAME}) = phi ", line))
            }
            across = live[header] | phis
            most = max(most, sum(function.floats.get(value, 0) for value in across))
    return most
