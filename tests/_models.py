"""Small random KSA models for the tests."""

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import speculative_generate_step

import ksa_mlx
from ksa_mlx.config import ModelArgs
from ksa_mlx.model import Model

BASE = {
    "model_type": "qwen3_ksa",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "vocab_size": 66,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "use_summary_attention": True,
    "summary_chunk_size": 4,
    "summary_token_num": 1,
    "summary_token_begin": 64,
    "summary_sliding_chunk_num": 2,
    "summary_chunk_position_ids_type": "origin",
    "summary_token_position_ids_type": "last_chunk_slice_right",
    "summary_independent_parameters": True,
    "mix_coeff": 0.5,
}

# One entry a rule of the specification; names are used in test ids.
VARIANTS = {
    "released layout": {"summary_sliding_chunk_num": "[2]*2+[2000]*1", "mix_coeff": 0},
    "full layer inside": {"summary_sliding_chunk_num": [1, 2000, 3]},
    "own projections": {"mix_coeff": 1.0, "tie_word_embeddings": False},
    "two summaries": {"summary_token_num": 2, "summary_independent_attention_layernorm": True},
    "left positions": {
        "summary_token_num": 2,
        "summary_token_position_ids_type": "last_chunk_slice_left",
    },
    "no window": {"summary_sliding_chunk_num": 0, "summary_token_position_ids_type": "zeros"},
    "inner chunk": {"summary_chunk_position_ids_type": "inner_chunk", "summary_chunk_size": 3},
    "different windows": {"summary_sliding_chunk_num": [0, 3, 1], "summary_chunk_size": 5},
    "shared, biases": {"summary_independent_parameters": False, "attention_bias": True},
    "no norms": {"use_qk_norm": False, "mix_coeff": 1.0, "summary_sliding_chunk_num": [2, 2000, 2]},
    "qwen2": {"use_qk_norm": False, "attention_bias": True, "attention_output_bias": False},
    "bypass": {"summary_layer_freq": [1, 0, 1], "num_key_value_heads": 4},
    "own qk norms": {"summary_independent_qk_norm": True, "num_key_value_heads": 1},
    "chunk of one": {"summary_chunk_size": 1, "summary_sliding_chunk_num": 3},
}


def build(seed: int = 0, **overrides) -> Model:
    """A model with random weights, spread enough that a wrong rule moves the logits."""
    model = Model(ModelArgs.from_dict({**BASE, **overrides}))
    key = mx.random.key(seed)
    weights = []
    for name, w in tree_flatten(model.parameters()):
        key, k = mx.random.split(key)
        if "norm" in name:
            w = mx.random.uniform(0.6, 1.6, w.shape, key=k)
        else:
            w = mx.random.normal(w.shape, key=k) * (1.0 if "embed" in name else 0.25)
        weights.append((name, w))
    model.load_weights(weights)
    model.eval()
    mx.eval(model.parameters())
    return model


def tokens(n: int, batch: int = 1, seed: int = 0) -> mx.array:
    """Random text ids (batch, n)."""
    return mx.random.randint(0, BASE["summary_token_begin"], (batch, n), key=mx.random.key(seed))


def worst(a: mx.array, b: mx.array) -> float:
    """Largest absolute difference; equal infinities do not differ."""
    if not a.size:
        return 0.0
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    return mx.where(a == b, 0, mx.abs(a - b)).max().item()


def after_drafts(model, draft, text: list[int], stop: int):
    """The caches that speculative decoding leaves after `stop` tokens, and these tokens."""
    cache = ksa_mlx.make_cache(model, 4) + ksa_mlx.make_cache(draft, 4)
    steps = speculative_generate_step(
        mx.array(text), model, draft, num_draft_tokens=3, max_tokens=20, prompt_cache=cache
    )
    said = [next(steps)[0] for _ in range(stop)]
    steps.close()
    return cache, said
