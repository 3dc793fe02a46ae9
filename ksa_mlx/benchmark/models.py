"""The models that are measured, random but of given shapes, and caches as after long texts."""

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache

from ..cache.rolling import RollingSummaryCache
from ..config import MODEL_TYPE
from ..model import Model, ModelArgs


def dims(hidden: int, mlp: int, layers: int, heads: int, kv_heads: int, head_dim: int, vocab: int):
    """The sizes of a shape, by their names in config.json. `vocab` counts text ids."""
    return {
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab + 1,
    }


SHAPES = {
    "small": dims(512, 1536, 8, 8, 2, 64, 4096),
    "4b": dims(2560, 9728, 36, 32, 8, 128, 151936),
}


def make_args(shape: dict[str, Any], windows: Sequence[int]) -> ModelArgs:
    """A configuration like the released one's, with windows of so many chunks."""
    return ModelArgs.from_dict(
        {
            **shape,
            "model_type": MODEL_TYPE,
            "rms_norm_eps": 1e-6,
            "max_position_embeddings": 131072 + 4096,
            "rope_theta": 1e6,
            "tie_word_embeddings": True,
            "use_summary_attention": True,
            "summary_chunk_size": 8,
            "summary_token_num": 1,
            "summary_token_begin": shape["vocab_size"] - 1,
            "summary_sliding_chunk_num": list(windows),
            "summary_chunk_position_ids_type": "origin",
            "summary_token_position_ids_type": "last_chunk_slice_right",
            "summary_independent_parameters": True,
            "mix_coeff": 0,
        }
    )


def ksa_args(shape: str, pure: bool = False) -> ModelArgs:
    """The configuration of a shape by its name. As in the released 4B, one full layer follows
    three with windows of 128 chunks; `pure` has no full layers."""
    sizes = SHAPES[shape]
    blocks = sizes["num_hidden_layers"] // 4
    return make_args(sizes, [128, 128, 128, 128 if pure else 17408] * blocks)


def build(args: ModelArgs, dtype: mx.Dtype, bits: int | None = None) -> tuple[Model, qwen3.Model]:
    """A random KSA model and mlx-lm's Qwen3 with the same weights, quantised to `bits` if given."""
    ksa = Model(args)
    ksa.update(tree_map(lambda w: w.astype(dtype), ksa.parameters()))
    shared = {k: getattr(args, k) for k in qwen3.ModelArgs.__dataclass_fields__ if hasattr(args, k)}
    shared.update(model_type="qwen3", vocab_size=args.summary_token_begin)
    full = qwen3.Model(qwen3.ModelArgs(**shared))
    if bits:
        for model in (ksa, full):
            nn.quantize(model, 64, bits)
    weights = dict(tree_flatten(ksa.parameters()))
    full.load_weights([(name, w) for name, w in weights.items() if "summary" not in name])
    ksa.eval()
    full.eval()
    for weight in weights.values():  # one by one: all at once they are held before rounding
        mx.eval(weight)
    return ksa, full


def filled(cache, args: ModelArgs, n: int, dtype: mx.Dtype, random: bool = True):
    """Fill one layer's cache as after n tokens, with random keys and values, or with zeros."""
    like = mx.zeros((1, args.num_key_value_heads, 1, args.head_dim), dtype)
    if isinstance(cache, RollingSummaryCache):
        place, storage = cache.place, cache.storage
        chunks = max(0, (n - 1) // place.chunk - place.window)
        cache.place = place._replace(offset=n, summarised=chunks, oldest=chunks, rolled=chunks)
        text = min(n, (place.window + 1) * place.chunk)
        storage.reserve(chunks * place.summary_tokens, text, like, like)
        if random:
            storage.text.planes = [mx.random.normal(x.shape, dtype) for x in storage.text.planes]
    else:
        shape = (*like.shape[:2], -(-n // 256) * 256, args.head_dim)
        make = mx.random.normal if random else mx.zeros
        cache.keys, cache.values, cache.offset = make(shape, dtype), make(shape, dtype), n
    mx.eval(cache.state)
    return cache


def keys_read(args: ModelArgs, n: int) -> list[int]:
    """Keys that a decode step after n tokens reads, in each layer."""
    k, s = args.summary_chunk_size, args.summary_token_num
    chunk = (n - 1) // k
    first = [0 if window is None else max(0, chunk - window) for window in args.windows]
    return [n - f * (k - s) for f in first]


def held_bytes(shape: str, n: int, dtype: mx.Dtype) -> dict[str, int]:
    """KV bytes after n tokens for a shape, by `nbytes` of zero-filled caches, one a layer kind."""
    args, totals = ksa_args(shape), {}
    k, s = args.summary_chunk_size, args.summary_token_num
    for name, windows in (("ksa", args.windows), ("qwen3", [None] * len(args.windows))):
        one = {}
        for window in set(windows):
            cache = KVCache() if window is None else RollingSummaryCache(k, s, window)
            one[window] = filled(cache, args, n, dtype, random=False).nbytes
        totals[name] = sum(one[w] for w in windows)
    return totals
