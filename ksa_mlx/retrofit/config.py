"""The config of a plain base, in one form, and that of the KSA model made of it."""

from typing import Any

from ..checkpoint.described import quantization, tidy
from ..config import MODEL_TYPE, ModelArgs, is_ksa, with_base
from ..errors import ConfigError

KINDS = ("qwen3", "qwen2", "llama", "mistral")
# What a base's config says of its model, beside RoPE; of the rest only _COPIED is kept.
_FIELDS = (
    *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "rms_norm_eps", "vocab_size"),
    *("max_position_embeddings", "hidden_act"),
)
_ROPE = (
    *("rope_theta", "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    "original_max_position_embeddings",
)
_COPIED = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "quantization")


def base_config(config: dict[str, Any], tied: bool) -> dict[str, Any]:
    """A base's config with the fields that KSA models have, each said once, and checked.

    Args:
        config: a `config.json` of one of KINDS.
        tied: what counts where the config does not say whether the head is the embedding.

    Raises `ConfigError` for what a KSA model cannot be made of.
    """
    check_kind(config)
    config = tidy(with_base(config))
    quantization(config)
    kind = config["model_type"]
    found = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    if kind == "llama":  # its first configs leave it out
        found.setdefault("num_key_value_heads", config.get("num_attention_heads"))
    if kind == "qwen3":  # as transformers has it
        found.setdefault("head_dim", 128)
    if config.get("mlp_bias") not in (None, False):
        raise ConfigError("mlp_bias", config["mlp_bias"], "false: KSA models have none")
    # A window is on where the config has one, but in Qwen, where another field says so.
    on = "use_sliding_window" if "qwen" in kind else "sliding_window"
    if config.get(on) not in (None, False) and config.get("use_sliding_window") is not False:
        raise ConfigError(on, config[on], "none: a base with full attention in all layers")
    for layer, name in enumerate(config.get("layer_types") or []):
        if name != "full_attention":
            raise ConfigError("layer_types", name, "full_attention", layer)
    bias = config.get("attention_bias", False)
    tie = config.get("tie_word_embeddings")
    found |= {
        "model_type": kind,
        "attention_bias": bias,
        "attention_output_bias": config.get("attention_output_bias", bias),
        "use_qk_norm": config.get("use_qk_norm", True),
        "tie_word_embeddings": tied if tie is None else tie,
        "use_sliding_window": False,
        "sliding_window": None,  # left out, it is on for a Mistral
        **{name: config[name] for name in (*_ROPE, *_COPIED) if config.get(name) is not None},
    }
    if not any("rope_theta" in (found.get(n) or {}) for n in ("rope_scaling", "rope_parameters")):
        found.setdefault("rope_theta", 10000.0)  # transformers' default for all of KINDS
    layers = found.get("num_hidden_layers")
    args = ModelArgs.from_dict(ksa_config(found, [None] * layers if type(layers) is int else []))
    scaling = dict(found.pop("rope_parameters", None) or found.get("rope_scaling") or {})
    scaling.pop("rope_theta", None)
    found |= {
        "head_dim": args.head_dim,
        "rope_theta": args.rope_theta,
        "rope_scaling": scaling if args.rope_scaling else None,
    }
    return found


def check_kind(config: dict[str, Any]):
    """Raise `ConfigError` unless a config's model is one that a KSA model can be made of."""
    if is_ksa(config):
        raise ConfigError(
            "use_summary_attention", True, "a plain model: this is a KSA model already"
        )
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ConfigError("model_type", kind, f"one of {', '.join(KINDS)}")


def ksa_config(
    base: dict[str, Any], windows: list[int | None], chunk: int = 8, own: bool = True
) -> dict[str, Any]:
    """The `config.json` of the KSA model made of a base.

    Args:
        base: `Base.config`.
        windows: of each layer in chunks; None where it keeps full attention.
        chunk: tokens a chunk, which has one summary token.
        own: whether summary rows have projections and an input norm of their own.
    """
    text: Any = base.get("vocab_size")
    context: Any = base.get("max_position_embeddings")
    for name, value in (
        *(("vocab_size", text), ("max_position_embeddings", context)),
        ("summary_chunk_size", chunk),
    ):
        if type(value) is not int or value < 1:
            raise ConfigError(name, value, "an integer of at least 1")
    covers = -(-context // chunk)
    return {
        **{name: value for name, value in base.items() if name != "quantization"},
        "model_type": MODEL_TYPE,
        "vocab_size": text + 1,
        "use_summary_attention": True,
        "summary_chunk_size": chunk,
        "summary_token_num": 1,
        "summary_token_begin": text,
        "truncate_predict_nums": text,
        "summary_sliding_chunk_num": [covers if w is None else w for w in windows],
        "summary_chunk_position_ids_type": "origin",
        "summary_token_position_ids_type": "last_chunk_slice_right",
        "summary_independent_parameters": own,
        "summary_independent_attention_layernorm": own,
        "mix_coeff": 1.0 if own else 0,
    }
