"""RoPE settings: what transformers 5 reads in a config, in the words that mlx-lm's RoPE takes.

What is accepted here computes what transformers computes; everything else is refused by name.
"""

import math
from typing import Any

from .errors import ConfigError

# Keys a type may have, beside `rope_type` (or `type`) and `rope_theta`: (needed, others).
_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "proportional": ((), ("factor", "partial_rotary_factor")),
    "llama3": (
        ("factor", "low_freq_factor", "high_freq_factor"),
        ("original_max_position_embeddings",),
    ),
    "yarn": (
        ("factor",),
        (
            *("original_max_position_embeddings", "beta_fast", "beta_slow"),
            *("attention_factor", "mscale", "mscale_all_dim", "truncate"),
        ),
    ),
}
_BY_LENGTH = "frequencies that do not depend on the text's length, which cached keys cannot follow"


def is_number(value: Any) -> bool:
    """Whether `value` is an int or a float, neither NaN nor infinite (and no bool)."""
    return type(value) in (int, float) and abs(value) < 1e30


def rope_settings(
    field: str,
    given: dict[str, Any],
    beside: dict[str, Any],
    head_dim: int,
    max_positions: int,
) -> dict[str, Any] | None:
    """The settings as `mlx_lm.models.rope_utils.initialize_rope` takes them; None for plain RoPE.

    Args:
        field: the name of the config's field, for errors.
        given: `rope_scaling`, or transformers 5's `rope_parameters`.
        beside: settings that some configs have at their top level instead.
        head_dim: width of a head; all of it is rotated.
        max_positions: the context, transformers' default for an original length left out.

    Idempotent. Raises `ConfigError` for what transformers or mlx-lm would not compute.
    """
    given = {k: v for k, v in given.items() if v is not None}
    kind = given.pop("rope_type", given.get("type", "default"))
    if given.pop("type", kind) != kind:
        raise ConfigError(f"{field}.type", given, f"rope_type = {kind!r}")
    if kind in ("dynamic", "longrope"):
        raise ConfigError(f"{field}.rope_type", kind, _BY_LENGTH)
    if not isinstance(kind, str) or kind not in _TYPES:
        raise ConfigError(f"{field}.rope_type", kind, f"one of {', '.join(_TYPES)}")
    needed, others = _TYPES[kind]
    # As transformers does: the length beside wins, the share beside fills in.
    if "original_max_position_embeddings" in others:
        given |= {k: v for k, v in beside.items() if v is not None and k.startswith("original")}
    given = {k: v for k, v in beside.items() if v is not None and k.startswith("partial")} | given
    # All of a head is rotated: 1 says so, and changes nothing.
    if kind != "proportional" and given.get("partial_rotary_factor") == 1:
        del given["partial_rotary_factor"]
    for name, value in given.items():
        if name not in needed and name not in others:
            raise ConfigError(f"{field}.{name}", value, f"no such key with rope_type {kind!r}")
        if name == "truncate":
            if value is not True:
                raise ConfigError(f"{field}.truncate", value, "true, all that mlx-lm computes")
        elif not is_number(value) or (value <= 0 and "mscale" not in name):
            raise ConfigError(f"{field}.{name}", value, "a positive number")
    for name in needed:
        if name not in given:
            raise ConfigError(f"{field}.{name}", None, f"a number, with rope_type {kind!r}")
    if kind == "default":
        return None
    if kind == "proportional":
        # Rounded down to pairs, as transformers does; the half keeps mlx-lm's own rounding there.
        pairs = int(given.get("partial_rotary_factor", 1.0) * head_dim // 2)
        given["partial_rotary_factor"] = min((2 * pairs + 0.5) / head_dim, 1.0)
        if not 0 < pairs <= head_dim // 2:
            raise ConfigError(f"{field}.partial_rotary_factor", pairs, "a share of head_dim")
    if kind in ("llama3", "yarn"):
        given.setdefault("original_max_position_embeddings", max_positions)
    if kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        raise ConfigError(
            f"{field}.high_freq_factor", given["high_freq_factor"], "more than low_freq_factor"
        )
    if kind == "yarn":
        given = _yarn(field, given)
    return {"rope_type": kind, **given}


def _yarn(field: str, given: dict[str, Any]) -> dict[str, Any]:
    """transformers' factor on cos and sin, said with mlx-lm's `mscale`, its only word for it."""
    given.pop("truncate", None)
    stretch = 0.1 * math.log(given["factor"]) if given["factor"] > 1 else 0.0
    mscale, all_dim = given.pop("mscale", None), given.pop("mscale_all_dim", None)
    factor = given.get("attention_factor")
    if factor is None:
        # transformers looks at these two only where both are given.
        both = mscale and all_dim
        factor = (mscale * stretch + 1) / (all_dim * stretch + 1) if both else stretch + 1
    if stretch == 0 and factor != 1:
        raise ConfigError(f"{field}.attention_factor", factor, "1, where factor is at most 1")
    given["attention_factor"] = factor
    given["mscale"] = (factor - 1) / stretch if stretch else 1.0
    given["mscale_all_dim"] = 0.0
    return given
