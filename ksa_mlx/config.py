"""What a KSA checkpoint says of itself: its `config.json`, checked field by field."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import Any

from mlx_lm.models.base import BaseModelArgs
from mlx_lm.models.rope_utils import initialize_rope

from .errors import ConfigError
from .pattern import MAX_LAYERS, parse_pattern, per_layer
from .rope import is_number, rope_settings

# Converted folders carry this model type: `qwen3` would load as a plain Qwen3.
MODEL_TYPE = "qwen3_ksa"

TEXT_POSITIONS = ("origin", "inner_chunk")
SUMMARY_POSITIONS = ("last_chunk_slice_right", "last_chunk_slice_left", "zeros")

# What the model type of a base says in transformers where its config says nothing.
BASES: dict[str, dict[str, Any]] = {
    "llama": {"use_qk_norm": False},
    "mistral": {"use_qk_norm": False, "sliding_window": 4096},
    "qwen2": {"use_qk_norm": False, "attention_bias": True, "attention_output_bias": False},
}

# The text vocabulary of the released models, and the official code's default.
DEFAULT_PREDICT_NUMS = 151936


def is_ksa(config: dict[str, Any]) -> bool:
    """Whether a `config.json` describes a KSA model (its `model_type` may be `qwen3`)."""
    return config.get("use_summary_attention") is True


def with_base(config: dict[str, Any]) -> dict[str, Any]:
    """A config with what the model type of its base says (see `BASES`)."""
    return {**BASES.get(str(config.get("model_type")), {}), **config}


@dataclass
class ModelArgs(BaseModelArgs):
    """The fields of a KSA `config.json` that the model reads: a Qwen3 and its summaries, or
    another base that differs from it in norms and biases only (see `BASES`).

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
    # Those that are None without being allowed to never are once the checks have run.
    head_dim: int = None  # type: ignore[assignment]
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = None  # type: ignore[assignment]
    use_qk_norm: bool = True
    mlp_bias: bool | None = False
    hidden_act: str = "silu"
    rope_theta: float = None  # type: ignore[assignment]
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    partial_rotary_factor: float | None = None
    original_max_position_embeddings: int | None = None
    rope_traditional: bool | None = False
    rope_interleaved: bool | None = False
    use_sliding_window: bool | None = None
    sliding_window: int | None = None
    layer_types: list[str] | None = None
    mix_coeff: float = None  # type: ignore[assignment]
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
        given = {k: v for k, v in with_base(params).items() if k in names}
        for f in fields(cls):
            if f.default is MISSING and f.name not in given:
                raise ConfigError(f.name, None, "a value; the field is missing")
        return cls(**given)

    def __post_init__(self):
        self._check_fields()
        self._check_summaries()
        self._set_rope()
        self.bypass = [not on for on in self._summary_layers()]
        self.windows = self._windows()
        windowed = {i: w for i, w in enumerate(self.windows) if w is not None}
        # The last layer with a window, where summary rows end; -1 if there is none.
        self.last_windowed = max(windowed, default=-1)
        # Of all layers, in chunks; None where no layer has one.
        self.smallest_window = min(windowed.values(), default=None)

    def _check(self, expected: str, holds: Callable[[Any], bool], *names: str):
        for name in names:
            value = getattr(self, name)
            if not holds(value):
                raise ConfigError(name, value, expected)

    def _check_fields(self):
        """The fields of a base."""
        self._check("a name", lambda v: isinstance(v, str), "model_type")
        self._check(
            "an integer of at least 1",
            _counts,
            *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
            *("num_key_value_heads", "vocab_size", "max_position_embeddings"),
        )
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._check("an integer of at least 1", _counts, "head_dim")
        self._check("an even number", lambda v: v % 2 == 0, "head_dim")
        self._check(f"at most {MAX_LAYERS}", lambda v: v <= MAX_LAYERS, "num_hidden_layers")
        self._check(
            f"a multiple of num_key_value_heads = {self.num_key_value_heads}",
            lambda v: v % self.num_key_value_heads == 0,
            "num_attention_heads",
        )
        if self.attention_output_bias is None:
            self.attention_output_bias = self.attention_bias
        self._check(
            "true or false",
            _is_bool,
            *("tie_word_embeddings", "attention_bias", "attention_output_bias", "use_qk_norm"),
        )
        self._check(
            "false: a KSA model's MLP has no biases, and its RoPE turns halves, not pairs",
            lambda v: v in (None, False),
            *("mlp_bias", "rope_traditional", "rope_interleaved"),
        )
        self._check("a positive number", lambda v: is_number(v) and v > 0, "rms_norm_eps")
        self._check("'silu'", lambda v: v == "silu", "hidden_act")
        self._check(
            "false: windows are summary_sliding_chunk_num's",
            lambda v: v in (None, False),
            "use_sliding_window",
        )
        # Left out, it is on for a Mistral.
        self._check(
            "null, or use_sliding_window = false beside it: windows are "
            "summary_sliding_chunk_num's",
            lambda v: v is None or self.use_sliding_window is False,
            "sliding_window",
        )
        self._check(
            "full_attention in all layers: windows are summary_sliding_chunk_num's",
            lambda v: v is None or v == ["full_attention"] * self.num_hidden_layers,
            "layer_types",
        )

    def _check_summaries(self):
        """The fields of KSA, but for those with an entry a layer; and ours."""
        self._check("an integer of at least 1", _counts, "summary_chunk_size", "summary_token_num")
        self._check(
            "an integer of at least 0",
            lambda v: type(v) is int and v >= 0,
            *("summary_token_begin", "rollback"),
        )
        self._check("an integer", lambda v: type(v) is int, "truncate_predict_nums")
        own = ("parameters", "attention_layernorm", "qk_norm")
        self._check("true or false", _is_bool, *(f"summary_independent_{name}" for name in own))
        self._check(
            "false, as use_qk_norm is",
            lambda v: self.use_qk_norm or not v,
            "summary_independent_qk_norm",
        )
        for name, choices in (
            ("summary_chunk_position_ids_type", TEXT_POSITIONS),
            ("summary_token_position_ids_type", SUMMARY_POSITIONS),
        ):
            self._check(f"one of {', '.join(choices)}", choices.__contains__, name)
        last = self.summary_token_begin + self.summary_token_num
        self._check(
            f"{self.summary_token_num} summary ids above the text and below "
            f"vocab_size = {self.vocab_size}",
            lambda v: v > 0 and last <= self.vocab_size,
            "summary_token_begin",
        )
        if self.summary_independent_parameters:
            self._check("a number in [0, 1]", lambda v: is_number(v) and 0 <= v <= 1, "mix_coeff")
        else:
            self.mix_coeff = 0.0

    def _set_rope(self):
        """`rope_theta`, and `rope_scaling` as mlx-lm takes it, wherever the config says them.

        transformers 5 nests all of it in `rope_parameters`; a `rope_scaling` beside it must agree.
        """
        beside = {
            name: getattr(self, name)
            for name in ("partial_rotary_factor", "original_max_position_embeddings")
        }
        found: list[dict[str, Any] | None] = []
        for name in ("rope_scaling", "rope_parameters"):
            self._check("a JSON object or null", lambda v: v is None or type(v) is dict, name)
            given = dict(getattr(self, name) or {})
            theta = given.pop("rope_theta", None)
            if self.rope_theta is None:
                self.rope_theta = theta
            elif theta not in (None, self.rope_theta):
                raise ConfigError(f"{name}.rope_theta", theta, f"rope_theta = {self.rope_theta}")
            if given or (name == "rope_parameters" and not found):
                found.append(
                    rope_settings(name, given, beside, self.head_dim, self.max_position_embeddings)
                )
        self._check("a positive number", lambda v: is_number(v) and v > 0, "rope_theta")
        scaling = found[0]
        if found[-1] != scaling:
            raise ConfigError("rope_parameters", self.rope_parameters, "what rope_scaling says")
        try:
            initialize_rope(
                self.head_dim, self.rope_theta, False, scaling, self.max_position_embeddings
            )
        except (ArithmeticError, KeyError, TypeError, ValueError) as e:
            why = f"settings that mlx-lm can use ({type(e).__name__}: {e})"
            raise ConfigError("rope_scaling", scaling, why) from None
        self.rope_scaling, self.rope_parameters = scaling, None

    def _windows(self) -> list[int | None]:
        name = "summary_sliding_chunk_num"
        windows = per_layer(name, self.summary_sliding_chunk_num, self.num_hidden_layers)
        for layer, w in enumerate(windows):
            if w < 0:
                raise ConfigError(name, w, "at least 0 chunks", layer)
        last_chunk = (self.max_position_embeddings - 1) // self.summary_chunk_size
        return [
            None if skip or w >= last_chunk else w
            for w, skip in zip(windows, self.bypass, strict=True)
        ]

    def _summary_layers(self) -> list[bool]:
        """Which layers have summary attention (Kuaishou's Muse, `get_layer_is_summary`)."""
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


def _counts(value: Any) -> bool:
    return type(value) is int and value >= 1


def _is_bool(value: Any) -> bool:
    return type(value) is bool
