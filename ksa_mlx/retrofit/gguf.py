"""A GGUF file as a base: its config in the Hub's words, its weights under the Hub's names."""

from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import CheckpointError, ConfigError, one_line

ARCHITECTURES = ("llama", "qwen2", "qwen3")

_ENDS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
# Llama 3's RoPE as a table; the settings that make it are found again.
_ROPE = "rope_freqs.weight"


def read_gguf(file: Path) -> tuple[dict[str, Any], dict[str, mx.array], dict[str, Any]]:
    """Config, weights and metadata of a GGUF file.

    Q4_0, Q4_1 and Q8_0 stay packed, as MLX's triples, which the config's `quantization` describes;
    other types that MLX reads come as float16 or float32. Raises `CheckpointError` of one line.
    """
    try:
        found, metadata = mx.load(str(file), format="gguf", return_metadata=True)
    except (RuntimeError, ValueError, OSError) as e:
        raise CheckpointError(
            f"{file}: not a GGUF file of types that MLX reads: F32, F16, Q4_0, Q4_1, Q8_0 "
            f"({one_line(e)})"
        ) from None
    metadata = {name: _plain(value) for name, value in metadata.items()}
    frequencies = found.pop(_ROPE, None)
    try:
        config = _config(metadata, found, frequencies)
    except ConfigError as e:
        raise CheckpointError(f"{file}: {e}") from None
    weights = {}
    for name, w in found.items():
        if config["model_type"] == "llama" and (".attn_q." in name or ".attn_k." in name):
            heads = "num_attention_heads" if ".attn_q." in name else "num_key_value_heads"
            w = _halves(w, config[heads])
        weights[_hub_name(name)] = w
    if packed := _quantization(weights):
        config["quantization"] = packed
    return config, weights, metadata


def _plain(value: Any) -> Any:
    """A number, a text or a list of the metadata as Python has it."""
    if isinstance(value, mx.array):
        if value.dtype == mx.float32 and value.size == 1:  # 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(value.item())))
        return value.tolist()
    return value


def _config(
    metadata: dict[str, Any], weights: dict[str, mx.array], frequencies: mx.array | None
) -> dict[str, Any]:
    kind = metadata.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise ConfigError("general.architecture", kind, f"one of {', '.join(ARCHITECTURES)}")

    def get(name: str, default: Any = None) -> Any:
        value = metadata.get(f"{kind}.{name}", default)
        if type(value) not in (int, float):
            raise ConfigError(f"{kind}.{name}", value, "a number")
        return value

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // max(heads, 1))
    for name, expected in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("expert_count", 0),
        ("attention.sliding_window", 0),
    ):
        if (found := get(name, expected)) != expected:
            raise ConfigError(f"{kind}.{name}", found, f"{expected}")
    table = weights.get("token_embd.weight")
    vocabulary = get("vocab_size", 0) if table is None else table.shape[0]
    return {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": get("block_count"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocabulary,
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": _scaling(metadata, kind, frequencies),
        "attention_bias": "blk.0.attn_q.bias" in weights,
        "attention_output_bias": "blk.0.attn_output.bias" in weights,
        "tie_word_embeddings": "output.weight" not in weights,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
        "torch_dtype": "float16",
    }


def _scaling(
    metadata: dict[str, Any], kind: str, frequencies: mx.array | None
) -> dict[str, Any] | None:
    """The RoPE settings that a file has beside its base frequency."""
    if frequencies is not None:
        theta = metadata.get(f"{kind}.rope.freq_base", 10000.0)
        return _llama3(np.array(frequencies, dtype=np.float64), theta)
    field = f"{kind}.rope.scaling"
    name = metadata.get(f"{field}.type", "none")
    if name == "none":
        return None
    if name not in ("linear", "yarn"):
        raise ConfigError(f"{field}.type", name, "none, linear or yarn")
    scaling = {"rope_type": name, "factor": metadata.get(f"{field}.factor")}
    if name == "yarn":
        length = metadata.get(f"{field}.original_context_length")
        scaling["original_max_position_embeddings"] = length
    return scaling


def _llama3(table: np.ndarray, theta: float) -> dict[str, Any]:
    """The `llama3` settings whose divisors of the frequencies are in `table` (head_dim / 2,)."""
    settings = {
        "rope_type": "llama3",
        "factor": float(table.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * theta ** -(np.arange(len(table)) / len(table)) / (2 * np.pi)
    share = np.clip((turns - 1) / 3, 0, 1)
    if not np.allclose(1 / (share + (1 - share) / table.max()), table, rtol=1e-3):
        raise ConfigError(_ROPE, "a table", "that of Llama 3.1 and later, or none")
    return settings


def _halves(w: mx.array, heads: int) -> mx.array:
    """Rows of a projection in the Hub's order: a GGUF pairs a head's two halves row by row."""
    if w.shape[0] % (2 * heads):
        return w  # its shape will be refused
    rows = w.reshape(heads, w.shape[0] // heads // 2, 2, *w.shape[1:])
    return rows.swapaxes(1, 2).reshape(w.shape)


def _hub_name(name: str) -> str:
    """The Hub's name of a tensor; an unknown one stays, to be refused."""
    path, _, end = name.rpartition(".")
    if path in _TOP:
        return f"{_TOP[path]}.{end}"
    block, _, part = path.removeprefix("blk.").partition(".")
    return f"model.layers.{block}.{_ENDS[part]}.{end}" if part in _ENDS else name


def _quantization(weights: dict[str, mx.array]) -> dict[str, Any]:
    """mlx-lm's words for how packed layers are packed, the most frequent width for all."""
    bits = {
        path: weights[f"{path}.weight"].shape[-1] // w.shape[-1]
        for path, w in ((n.removesuffix(".scales"), w) for n, w in weights.items())
        if f"{path}.scales" in weights
    }
    if not bits:
        return {}
    usual = Counter(bits.values()).most_common(1)[0][0]
    others = {path: {"group_size": 32, "bits": b} for path, b in bits.items() if b != usual}
    return {"group_size": 32, "bits": usual, **others}
