"""Checkpoints of Kuaishou's Muse, upstream's training framework: their config and their names.

Source: github Kuaishou-OneRec/KSA at 623c531, `muse/config/model_config.py`,
`muse/models/qwen3_sa/` and `examples/pretrain/convert/checkpoint.py`.
"""

from typing import Any

from ..config import ModelArgs
from ..errors import ConfigError
from ..weights import EMBED, HEAD, SUMMARY, Plan, hub_plan

# Ends of names, ours and Muse's.
_NAMES = {
    "input_layernorm.weight": "sa_norm.scale",
    "input_layernorm_summary.weight": "sa_norm_summary.scale",
    "post_attention_layernorm.weight": "mlp_norm.scale",
    "self_attn.o_proj": "attn.output_proj",
    "self_attn.q_norm.weight": "attn.q_norm.scale",
    "self_attn.k_norm.weight": "attn.k_norm.scale",
    "self_attn.q_norm_summary.weight": "attn.q_norm_summary.scale",
    "self_attn.k_norm_summary.weight": "attn.k_norm_summary.scale",
    "self_attn.": "attn.",
    "mlp.gate_proj": "mlp.w1",
    "mlp.up_proj": "mlp.w3",
    "mlp.down_proj": "mlp.w2",
}

# Muse's own defaults, for fields that a config leaves out: (our field, its field, its default).
_FIELDS = (
    ("vocab_size", "vocab_size", 151936),
    ("hidden_size", "embed_dim", 4096),
    ("num_hidden_layers", "num_layers", 32),
    ("num_attention_heads", "num_heads", 32),
    ("num_key_value_heads", "num_kv_heads", 32),
    ("head_dim", "head_dim", 128),
    ("intermediate_size", "intermediate_dim", 11008),
    ("max_position_embeddings", "max_seq_len", 32768),
    ("rope_theta", "rope_base", 10000.0),
    ("rms_norm_eps", "norm_eps", 1e-6),
    ("hidden_act", "hidden_act", "silu"),
    ("tie_word_embeddings", "tie_word_embeddings", True),
    ("use_summary_attention", "use_summary_attention", False),
    ("summary_chunk_size", "summary_chunk_size", 0),
    ("summary_token_num", "summary_token_num", 0),
    ("summary_token_begin", "summary_token_begin", None),
    ("summary_sliding_chunk_num", "summary_sliding_chunk_num", 0),
    ("summary_layer_freq", "summary_layer_freq", 0),
    ("summary_chunk_position_ids_type", "summary_chunk_position_ids_type", "inner_chunk"),
    ("summary_token_position_ids_type", "summary_token_position_ids_type", "zeros"),
    ("summary_independent_attention_layernorm", "summary_independent_attention_layernorm", False),
    ("summary_independent_qk_norm", "summary_independent_qk_norm", False),
)


def is_muse(config: dict[str, Any]) -> bool:
    return "embed_dim" in config or "model_class" in config


def own_embedding(muse: dict[str, Any]) -> bool:
    return muse.get("summary_independent_parameters", False) is True


def to_hub_config(muse: dict[str, Any]) -> dict[str, Any]:
    """A Muse config as a KSA config. Raises `ConfigError` for what only Muse can run.

    Own projections weigh 1.0, Muse's rule, and 0 where `summary_independent_qkv` turns them
    off. Where `summary_mix_qkv` anneals them, the weight depends on the training step, which a
    checkpoint does not tell: the config must say `mix_coeff`.
    """
    norms = {name: muse.get(name, True) for name in ("q_norm", "k_norm")}
    for name, on in norms.items():
        if type(on) is not bool or on is not norms["q_norm"]:
            raise ConfigError(name, on, "true or false, the same for q_norm and k_norm")
    for name in ("sliding_window", "layer_sliding_window"):
        on = name != "sliding_window" or muse.get("use_sliding_window")
        if on and muse.get(name) not in (None, 0):
            raise ConfigError(name, muse[name], "none, next to summary attention")

    config = {ours: muse.get(theirs, default) for ours, theirs, default in _FIELDS}
    begin, count = config["summary_token_begin"], config["summary_token_num"]
    if own_embedding(muse) and type(begin) is int and type(count) is int:
        if type(config["vocab_size"]) is not int or config["vocab_size"] < begin:
            raise ConfigError(
                "vocab_size", config["vocab_size"], f"at least summary_token_begin = {begin}"
            )
        config["vocab_size"] = begin + count

    own = muse.get("summary_independent_qkv")
    own = own_embedding(muse) if own is None else own
    config["summary_independent_parameters"] = own or own_embedding(muse)
    if "mix_coeff" in muse:
        config["mix_coeff"] = muse["mix_coeff"]
    elif muse.get("summary_mix_qkv") and own:
        raise ConfigError(
            "mix_coeff",
            None,
            "the blend at the checkpoint's training step, as summary_mix_qkv is true (1 up to "
            f"step {muse.get('summary_mix_start_iter', 0)}, falling to 0 at step "
            f"{muse.get('summary_mix_end_iter', 0)}); add it to config.json",
        )
    else:
        config["mix_coeff"] = 1.0
    if not own:
        config["mix_coeff"] = 0
    config["use_qk_norm"] = norms["q_norm"]
    if not norms["q_norm"]:  # as Muse has it
        config["summary_independent_qk_norm"] = False
    config["attention_output_bias"] = False
    config["attention_bias"] = any(muse.get(f"{n}_proj_bias", False) for n in "qkv")
    config["truncate_predict_nums"] = 0
    config["architectures"] = ["Qwen3ForCausalLM"]
    for name in ("eos_token_id", "bos_token_id", "torch_dtype"):
        if muse.get(name) is not None:
            config[name] = muse[name]
    return config


def muse_plan(args: ModelArgs, muse: dict[str, Any]) -> Plan:
    """From Muse's layout to ours. `args` are of `to_hub_config(muse)`."""
    hub, plan = hub_plan(args), Plan()
    begin, count = args.summary_token_begin, args.summary_token_num
    table = (muse.get("vocab_size", 151936), args.hidden_size)
    plan.take(EMBED, "model.tok_embeddings.weight", table, (0, begin))
    if own_embedding(muse):
        plan.take(SUMMARY, "summary_embedding.weight", (count, args.hidden_size))
    else:
        plan.take(SUMMARY, "model.tok_embeddings.weight", table, (begin, begin + count))
    if HEAD in hub.parts:
        plan.take(HEAD, "model.output.weight", table, (0, begin))
    else:
        plan.dead["model.output.weight"] = None, hub.dead[HEAD][1]
    plan.take("model.norm.weight", "model.norm.scale", (args.hidden_size,))

    for name, part in hub.parts.items():
        if not name.startswith("model.layers."):
            continue
        shape = hub.source[part.source]
        if name.endswith(".bias") and not _has_bias(name, muse):
            plan.zeros[name] = shape
        else:
            plan.take(name, muse_name(name), shape)
    for name, dead in hub.dead.items():
        if name.startswith("model.layers."):
            plan.dead[muse_name(name)] = dead
    return plan


def _has_bias(name: str, muse: dict[str, Any]) -> bool:
    """Muse's q, k and v have a bias each as the config says."""
    return bool(muse.get(f"{name.split('.')[-2][0]}_proj_bias", False))


def muse_name(name: str) -> str:
    """Muse's name of a tensor in a layer."""
    prefix, rest = name[: name.index(".", len("model.layers.")) + 1], name.split(".", 3)[3]
    for ours, theirs in _NAMES.items():
        if rest.startswith(ours):
            return prefix + theirs + rest[len(ours) :]
    return name
