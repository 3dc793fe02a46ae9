"""What a KSA checkpoint says of itself: its `config.json`, checked field by field."""

import ast
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.rope_utils import initialize_rope

from .errors import ConfigError

# Converted folders carry this model type: `qwen3` would load as a plain Qwen3.
MODEL_TYPE = "qwen3_ksa"

TEXT_POSITIONS = ("origin", "inner_chunk")
SUMMARY_POSITIONS = ("last_chunk_slice_right", "last_chunk_slice_left", "zeros")

# Far above any real model; a hostile pattern stops here instead of in memory.
MAX_LAYERS = 4096
MAX_PATTERN = 1000  # characters

# The text vocabulary of the released models, and the official code's default.
DEFAULT_PREDICT_NUMS = 151936


def is_ksa(config: dict[str, Any]) -> bool:
    """Whether a `config.json` describes a KSA model (its `model_type` may be `qwen3`)."""
    return config.get("use_summary_attention") is True


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


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of a KSA `config.json` that the model reads (a Qwen3 and its summaries).

    Raises `ConfigError` for nonsense. After construction, `windows[i]` is layer i's window in
    chunks or None where the layer reads text only (a window that covers the context, or a
    layer without summary attention), and `bypass[i]` says whether summary rows skip layer i.
    """

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    use_summary_attention: bool
    summary_chunk_size: int
    summary_token_num: int
    summary_token_begin: int
    summary_sliding_chunk_num: int | str | list[int]
    summary_chunk_position_ids_type: str
    summary_token_position_ids_type: str
    summary_independent_parameters: bool
    head_dim: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    hidden_act: str = "silu"
    rope_theta: float | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    mix_coeff: float | None = None
    summary_independent_attention_layernorm: bool = False
    summary_independent_qk_norm: bool = False
    summary_layer_freq: int | str | list[int] | None = None
    truncate_predict_nums: int = DEFAULT_PREDICT_NUMS
    # Ours: how many of the last tokens a cache must be able to take back.
    rollback: int = 0

    @classmethod
    def from_dict(cls, params: dict[str, Any]) -> "ModelArgs":
        if not is_ksa(params):
            raise ConfigError(
                "use_summary_attention",
                params.get("use_summary_attention"),
                f"true; without it this is a plain {params.get('model_type')} model, "
                "which mlx-lm itself runs",
            )
        names = {f.name for f in fields(cls)}
        given = {k: v for k, v in params.items() if k in names}
        for f in fields(cls):
            if f.default is MISSING and f.name not in given:
                raise ConfigError(f.name, None, "a value; the field is missing")
        return cls(**given)

    def __post_init__(self):
        for name in (
            "hidden_size",
            "num_hidden_layers",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "vocab_size",
            "max_position_embeddings",
            "summary_chunk_size",
            "summary_token_num",
            "head_dim",  # last: its default needs two of the others
        ):
            if name == "head_dim" and self.head_dim is None:
                self.head_dim = self.hidden_size // self.num_attention_heads
            self._check(name, lambda v: type(v) is int and v >= 1, "an integer of at least 1")
        for name in ("summary_token_begin", "rollback"):
            self._check(name, lambda v: type(v) is int and v >= 0, "an integer of at least 0")
        self._check("truncate_predict_nums", lambda v: type(v) is int, "an integer")
        for name in (
            "tie_word_embeddings",
            "attention_bias",
            "summary_independent_parameters",
            "summary_independent_attention_layernorm",
            "summary_independent_qk_norm",
        ):
            self._check(name, lambda v: type(v) is bool, "true or false")
        self._check("num_hidden_layers", lambda v: v <= MAX_LAYERS, f"at most {MAX_LAYERS}")
        self._check(
            "num_attention_heads",
            lambda v: v % self.num_key_value_heads == 0,
            f"a multiple of num_key_value_heads = {self.num_key_value_heads}",
        )
        self._check("head_dim", lambda v: v % 2 == 0, "an even number")
        self._check("rms_norm_eps", lambda v: _number(v) and v > 0, "a positive number")
        self._check("hidden_act", lambda v: v == "silu", "'silu'")
        for name, choices in (
            ("summary_chunk_position_ids_type", TEXT_POSITIONS),
            ("summary_token_position_ids_type", SUMMARY_POSITIONS),
        ):
            self._check(name, lambda v: v in choices, f"one of {', '.join(choices)}")

        last = self.summary_token_begin + self.summary_token_num
        self._check(
            "summary_token_begin",
            lambda v: 0 < v and last <= self.vocab_size,
            f"{self.summary_token_num} summary ids above the text and below "
            f"vocab_size = {self.vocab_size}",
        )
        if self.summary_independent_parameters:
            self._check("mix_coeff", lambda v: _number(v) and 0 <= v <= 1, "a number in [0, 1]")

        for name in ("rope_parameters", "rope_scaling"):
            self._check(name, lambda v: v is None or isinstance(v, dict), "a JSON object or null")
        if self.rope_parameters:
            # transformers >= 5 nests both under rope_parameters.
            theta = self.rope_parameters.get("rope_theta")
            if self.rope_theta is None:
                self.rope_theta = theta
            elif theta is not None and theta != self.rope_theta:
                raise ConfigError(
                    "rope_parameters.rope_theta", theta, f"rope_theta = {self.rope_theta}"
                )
            if self.rope_scaling is None:
                self.rope_scaling = self.rope_parameters
        self._check("rope_theta", lambda v: _number(v) and v > 0, "a positive number")
        try:
            initialize_rope(
                self.head_dim,
                self.rope_theta,
                False,
                self.rope_scaling,
                self.max_position_embeddings,
            )
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as e:
            why = f"settings that mlx-lm can use ({type(e).__name__}: {e})"
            raise ConfigError("rope_scaling", self.rope_scaling, why) from None

        self.bypass = [not on for on in self._summary_layers()]
        windows = per_layer(
            "summary_sliding_chunk_num", self.summary_sliding_chunk_num, self.num_hidden_layers
        )
        for layer, w in enumerate(windows):
            if w < 0:
                raise ConfigError("summary_sliding_chunk_num", w, "at least 0 chunks", layer)
        last_chunk = (self.max_position_embeddings - 1) // self.summary_chunk_size
        self.windows: list[int | None] = [
            None if skip or w >= last_chunk else w for w, skip in zip(windows, self.bypass)
        ]

    def _check(self, name: str, holds, expected: str):
        value = getattr(self, name)
        if not holds(value):
            raise ConfigError(name, value, expected)

    def _summary_layers(self) -> list[bool]:
        """Which layers have summary attention (Muse, `get_layer_is_summary`)."""
        freq, n = self.summary_layer_freq, self.num_hidden_layers
        if isinstance(freq, str):
            freq = parse_pattern("summary_layer_freq", freq)
        if freq is None or (type(freq) is int and freq == 0):
            return [True] * n
        if type(freq) is int:
            if freq < 0:
                raise ConfigError("summary_layer_freq", freq, "at least 0")
            return [i % freq == 0 for i in range(n)]
        freq = per_layer("summary_layer_freq", freq, n)
        for layer, f in enumerate(freq):
            if f not in (0, 1):
                raise ConfigError("summary_layer_freq", f, "0 or 1", layer)
        return [f == 1 for f in freq]

    @property
    def own_projections(self) -> bool:
        """Whether summary rows use projections of their own (dead weight at mix_coeff 0)."""
        return self.summary_independent_parameters and self.mix_coeff != 0

    @property
    def last_windowed(self) -> int:
        """The last layer with a window, where summary rows end; -1 if there is none."""
        return max((i for i, w in enumerate(self.windows) if w is not None), default=-1)

    def own_kv(self, layer: int) -> bool:
        """Whether summary rows in this layer use k and v projections of their own."""
        return self.own_projections and not self.bypass[layer] and layer <= self.last_windowed

    def own_q(self, layer: int) -> bool:
        """Likewise for q, which the last windowed layer no longer needs."""
        return self.own_kv(layer) and layer < self.last_windowed

    def own_norm(self, layer: int) -> bool:
        """Whether summary rows in this layer have an input norm of their own."""
        return (
            self.summary_independent_attention_layernorm
            and not self.bypass[layer]
            and layer <= self.last_windowed
        )

    @property
    def num_predicted(self) -> int:
        """How many ids the logits cover: text ids, cut to `truncate_predict_nums` if positive."""
        cut = self.truncate_predict_nums
        return min(self.summary_token_begin, cut) if cut > 0 else self.summary_token_begin


def _number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e30  # neither NaN nor infinite
