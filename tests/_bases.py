"""Tiny random bases: folders in the Hub's layout, and GGUF files, with a tokenizer."""

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

README = Path(__file__).parents[1] / "README.md"
VOCABULARY = 640
TEXTS = (
    "12345 67, 3.14159",
    "a\n\n\n  b\t\tc",
    "def f(x):\n    return {'a': x**2}\n",
    "Привет, мир! 你好。世界 ñandú 😀",
    "I'll don't  we've   x",
    "<|im_start|>user\nhi<|im_end|>\n",
)
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "torch_dtype": "float32",
}
# What each kind's config says beside.
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {"attention_bias": False, "use_sliding_window": False},
    "qwen2": {"use_sliding_window": False, "sliding_window": 256},
    "llama": {"attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
}


def tokenizer() -> Tokenizer:
    """Byte-level BPE as SmolLM2 has it: digits one by one, three special tokens."""
    made = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(False)])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([README.read_text(), *["a\n\n"] * 99], trainer)
    return made


def weights(kind: str, seed: int = 0, **fields: Any) -> dict[str, np.ndarray]:
    """Random weights under the Hub's names, float32."""
    c = {**CONFIG, **KINDS[kind], **fields}
    rng = np.random.default_rng(seed)
    hidden, mlp, dim = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    q, kv = c["num_attention_heads"] * dim, c["num_key_value_heads"] * dim
    found: dict[str, np.ndarray] = {}

    def add(name: str, *shape: int):
        w = rng.normal(size=shape) * 0.2 if len(shape) == 2 else rng.uniform(0.6, 1.6, shape)
        found[name] = w.astype(np.float32)

    add("model.embed_tokens.weight", c["vocab_size"], hidden)
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}."
        add(at + "input_layernorm.weight", hidden)
        add(at + "post_attention_layernorm.weight", hidden)
        sizes = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
        for name, shape in {**sizes, "o_proj": (hidden, q)}.items():
            add(f"{at}self_attn.{name}.weight", *shape)
            if name != "o_proj" and kind == "qwen2":
                add(f"{at}self_attn.{name}.bias", shape[0])
        if kind == "qwen3":
            add(at + "self_attn.q_norm.weight", dim)
            add(at + "self_attn.k_norm.weight", dim)
        add(at + "mlp.gate_proj.weight", mlp, hidden)
        add(at + "mlp.up_proj.weight", mlp, hidden)
        add(at + "mlp.down_proj.weight", hidden, mlp)
    add("model.norm.weight", hidden)
    if not c["tie_word_embeddings"]:
        add("lm_head.weight", c["vocab_size"], hidden)
    return found


def base_folder(folder: Path, kind: str = "qwen3", tensors=None, **fields: Any) -> Path:
    """A base in the Hub's layout. `fields` change the config (None removes one)."""
    folder.mkdir()
    config = {"model_type": kind, **CONFIG, **KINDS[kind], **fields}
    config = {k: v for k, v in config.items() if v is not None or k == "sliding_window"}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights(kind) if tensors is None else tensors, folder / "model.safetensors")
    tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|im_start|>",
                "eos_token": "<|endoftext|>",
                "chat_template": TEMPLATE,
            }
        )
    )
    return folder


# GGUF, written by hand: MLX writes none of the packed types.

F32, F16, Q4_0, Q4_1, Q8_0, Q5_0 = 0, 1, 2, 3, 8, 6
_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(name: str) -> str:
    path, _, end = name.rpartition(".")
    if path in _NAMES:
        return f"{_NAMES[path]}.{end}"
    parts = path.split(".")
    return f"blk.{parts[2]}.{_NAMES[parts[-1]]}.{end}"


def paired(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection as llama.cpp has them: the two halves of a head in turns."""
    halves = w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:])
    return halves.swapaxes(1, 2).reshape(w.shape)


def blocks(w: np.ndarray, kind: int) -> tuple[bytes, np.ndarray]:
    """A tensor's bytes in a GGUF type, and the values that they stand for, float32."""
    if kind in (F32, F16):
        w = w.astype(np.float32 if kind == F32 else np.float16)
        return w.tobytes(), w.astype(np.float32)
    rows = w.reshape(-1, 32)
    low, top = rows.min(1, keepdims=True), rows.max(1, keepdims=True)
    if kind == Q4_1:
        scale, bias = ((top - low) / 15).astype(np.float16), low.astype(np.float16)
        steps, least, shift = 15, 0, 0
    else:
        most = np.abs(rows).max(1, keepdims=True)
        scale = (most / (127 if kind == Q8_0 else 7)).astype(np.float16)
        bias, steps = np.zeros_like(scale), 127 if kind == Q8_0 else 7
        least, shift = -steps, 0 if kind == Q8_0 else 8
    f = scale.astype(np.float32), bias.astype(np.float32)
    q = np.clip(np.round((rows - f[1]) / f[0]), least, steps)
    values = (q * f[0] + f[1]).reshape(w.shape).astype(np.float32)
    if kind == Q8_0:
        packed = q.astype(np.int8).view(np.uint8)
    else:
        n = (q + shift).astype(np.uint8)
        packed = n[:, :16] | (n[:, 16:] << 4)
    heads = [scale.view(np.uint8)] + ([bias.view(np.uint8)] if kind == Q4_1 else [])
    return np.concatenate([*heads, packed], axis=1).tobytes(), values


def _text(s: str) -> bytes:
    return struct.pack("<Q", len(s.encode())) + s.encode()


def _value(v: Any) -> bytes:
    if isinstance(v, bool):
        return struct.pack("<I?", 7, v)
    if isinstance(v, int):
        return struct.pack("<Ii", 5, v) if v < 0 else struct.pack("<II", 4, v)
    if isinstance(v, float):
        return struct.pack("<If", 6, v)
    if isinstance(v, str):
        return struct.pack("<I", 8) + _text(v)
    if isinstance(v[0], str):
        return struct.pack("<IIQ", 9, 8, len(v)) + b"".join(map(_text, v))
    return struct.pack("<IIQ", 9, 5, len(v)) + struct.pack(f"<{len(v)}i", *v)


def gguf(
    file: Path,
    kind: str = "llama",
    types: dict[str, int] | None = None,
    tensors: dict[str, np.ndarray] | None = None,
    **metadata: Any,
) -> dict[str, np.ndarray]:
    """Write a base as a GGUF. `types`: of tensors whose Hub name ends so, F32 else; `metadata`
    replaces entries (None removes one). Returns the values that the file stands for."""
    c = {**CONFIG, **KINDS[kind]}
    tensors = weights(kind) if tensors is None else tensors
    made = tokenizer()
    words = json.loads(made.to_str())["model"]
    tokens = sorted(words["vocab"], key=words["vocab"].get)
    entries = {
        "general.architecture": kind,
        f"{kind}.embedding_length": c["hidden_size"],
        f"{kind}.block_count": c["num_hidden_layers"],
        f"{kind}.feed_forward_length": c["intermediate_size"],
        f"{kind}.attention.head_count": c["num_attention_heads"],
        f"{kind}.attention.head_count_kv": c["num_key_value_heads"],
        f"{kind}.attention.key_length": c["head_dim"],
        f"{kind}.attention.layer_norm_rms_epsilon": c["rms_norm_eps"],
        f"{kind}.context_length": c["max_position_embeddings"],
        f"{kind}.rope.freq_base": c["rope_theta"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in words["merges"]],
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **{name.replace("__", "."): value for name, value in metadata.items()},
    }
    entries = {name: value for name, value in entries.items() if value is not None}
    infos, data, values = b"", b"", {}
    for name, w in tensors.items():
        kind_of = next((t for end, t in (types or {}).items() if name.endswith(end)), F32)
        heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
        layer = name.split(".")[-2]
        if kind == "llama" and layer in heads:
            body, held = blocks(paired(w, c[heads[layer]]), kind_of)
            back = held.reshape(c[heads[layer]], -1, 2, *w.shape[1:]).swapaxes(1, 2)
            values[name] = back.reshape(w.shape)
        else:
            body, values[name] = blocks(w, kind_of)
        shape = w.shape[::-1]
        known = name.endswith(("weight", "bias")) and name != "rope_freqs.weight"
        infos += _text(gguf_name(name) if known else name) + struct.pack("<I", len(shape))
        infos += struct.pack(f"<{len(shape)}QIQ", *shape, kind_of, len(data))
        data += body + b"\0" * (-len(body) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(entries))
    head += b"".join(_text(name) + _value(v) for name, v in entries.items()) + infos
    file.write_bytes(head + b"\0" * (-len(head) % 32) + data)
    return values
