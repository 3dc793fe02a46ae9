"""One number a layer, from a pattern such as `([128]*3+[16768]*1)*9`: read, never evaluated."""

import ast
from typing import Any

from .errors import ConfigError

# Far above any real model; a hostile pattern stops here instead of in memory.
MAX_LAYERS = 4096
MAX_PATTERN = 1000  # characters


def parse_pattern(field: str, pattern: str) -> int | list[int]:
    """Read a per-layer pattern such as `([128]*3+[16768]*1)*9`, without evaluating it.

    A pattern is made of integers, lists, `+` and `*`. Raises `ConfigError` for anything else.
    """

    def refuse(why: str):
        return ConfigError(field, pattern, f"integers, lists, + and * ({why})")

    def read(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            value = read(node.operand)
            if isinstance(value, int):
                return -value
        if isinstance(node, ast.List):
            values = [read(e) for e in node.elts]
            if all(isinstance(v, int) for v in values):
                return values
            raise refuse("a list inside a list")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            left, right = read(node.left), read(node.right)
            if type(left) is type(right):
                return limit(left + right)
            raise refuse("a list added to an integer")
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
            left, right = read(node.left), read(node.right)
            if isinstance(left, list) and isinstance(right, list):
                raise refuse("a list times a list")
            size = 1
            for side, other in ((left, right), (right, left)):
                if isinstance(side, list):
                    size = len(side) * max(other, 0)
            if size > MAX_LAYERS:
                raise refuse(f"more than {MAX_LAYERS} layers")
            return limit(left * right)
        raise refuse(f"{type(node).__name__} is not one of them")

    def limit(value):
        if isinstance(value, list) and len(value) > MAX_LAYERS:
            raise refuse(f"more than {MAX_LAYERS} layers")
        if isinstance(value, int) and abs(value) > 2**31:
            raise refuse("a number above 2^31")
        return value

    if len(pattern) > MAX_PATTERN:
        raise refuse(f"more than {MAX_PATTERN} characters")
    try:
        return read(ast.parse(pattern.strip(), mode="eval").body)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as e:
        if isinstance(e, ConfigError):
            raise
        raise refuse("it does not parse") from None


def per_layer(field: str, value: Any, num_layers: int) -> list[int]:
    """An int, a list or a pattern string as one int a layer, checked."""
    if isinstance(value, str):
        value = parse_pattern(field, value)
    if type(value) is int:
        return [value] * num_layers
    if not isinstance(value, list):
        raise ConfigError(field, value, "an integer, a list or a pattern")
    for layer, v in enumerate(value):
        if type(v) is not int:
            raise ConfigError(field, v, "an integer", layer)
    if len(value) != num_layers:
        raise ConfigError(
            field, f"{len(value)} entries", f"num_hidden_layers = {num_layers} entries"
        )
    return value
