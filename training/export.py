"""The trained model as a PyTorch KSA checkpoint in Hub layout, with its tokenizer and chat
template."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ksa_mlx.errors import CheckpointError

from .documents import END, SPECIAL
from .model import NotebookConfig, NotebookModel
from .tokenizer import load_tokenizer

# A user's turn has no end of its own: the assistant's mark follows. Lines of the notes begin with
# a space, as the words do.
CHAT_TEMPLATE = (
    "{%- for m in messages -%}"
    "{%- if m['role'] == 'assistant' -%}{{- '<|assistant|> ' + m['content'] | trim + '<|end|>' -}}"
    "{%- else -%}{{- ('<|system|> ' if m['role'] == 'system' else '<|user|> ') + "
    "(m['content'] | trim | replace('\\n ', '\\n') | replace('\\n', '\\n ')) -}}"
    "{%- if m['role'] == 'system' -%}{{- '<|end|>' -}}{%- endif -%}{%- endif -%}"
    # A message that is to be continued has this mark, where transformers cuts the text; before, it
    # looks for the message as it was given.
    "{%- if 'CONTINUE_FINAL_MESSAGE_TAG' in m['content'] -%}"
    "{{- m['content'] | replace('CONTINUE_FINAL_MESSAGE_TAG', '') -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)
CONTEXT = 32768


def hub_config(config: NotebookConfig, end_id: int) -> dict:
    """``config.json`` as the released KSA checkpoints have it."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": end_id,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": CONTEXT,
        "max_window_layers": config.num_layers,
        "mix_coeff": 1.0,
        "model_type": "qwen3",
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "rms_norm_eps": config.norm_eps,
        "rope_scaling": None,
        "rope_theta": int(config.rope_theta),
        "sliding_window": None,
        "summary_attention_mode": "kernel",
        "summary_chunk_position_ids_type": "origin",
        "summary_chunk_size": config.chunk,
        "summary_independent_attention_layernorm": False,
        "summary_independent_parameters": True,
        "summary_sliding_chunk_num": f"[{config.window}]*{config.num_layers}",
        "summary_token_begin": config.vocab_size,
        "summary_token_num": 1,
        "summary_token_position_ids_type": "last_chunk_slice_right",
        "tie_word_embeddings": True,
        "torch_dtype": "float16",
        "use_cache": True,
        "use_sliding_window": False,
        "use_summary_attention": True,
        "vocab_size": config.vocab_size + 1,
    }


def tokenizer_config(tokenizer) -> dict:
    def token(text, special=True):
        return {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": special,
        }

    added = {i: token(s) for i, s in enumerate(("<unk>", "<s>", "</s>"))}
    added |= {tokenizer.piece_to_id(s): token(s, special=s != "\n") for s in SPECIAL}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        "bos_token": "<s>",
        "eos_token": END,
        "pad_token": END,
        "unk_token": "<unk>",
        "model_max_length": CONTEXT,
        "added_tokens_decoder": {str(i): t for i, t in sorted(added.items())},
        "chat_template": CHAT_TEMPLATE,
    }


def export(model: NotebookModel, tokenizer_file: Path, folder: Path) -> None:
    """Write the checkpoint to ``folder``: float16 weights, configuration, tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_tokenizer(tokenizer_file)
    end_id = tokenizer.piece_to_id(END)
    weights = {n: p.detach().to(torch.float16).contiguous() for n, p in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "tokenizer.model").write_bytes(tokenizer_file.read_bytes())
    generation = {
        "bos_token_id": 1,
        "eos_token_id": end_id,
        "pad_token_id": end_id,
        "do_sample": False,
        "max_new_tokens": 48,
    }
    # tokenizer_config.json is last: where it is, all are.
    for name, content in (
        ("config.json", hub_config(model.config, end_id)),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config(tokenizer)),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> NotebookModel:
    """The PyTorch model of an exported checkpoint, in float32."""
    j = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    windows = j["summary_sliding_chunk_num"]
    layers = j["num_hidden_layers"]
    found = re.fullmatch(rf"\[(\d+)\]\*{layers}", str(windows))
    if found is None:
        raise CheckpointError(
            f"{folder}/config.json: summary_sliding_chunk_num: found {windows!r}, "
            f"expected '[W]*{layers}'"
        )
    config = NotebookConfig(
        vocab_size=j["summary_token_begin"],
        hidden_size=j["hidden_size"],
        num_layers=layers,
        num_heads=j["num_attention_heads"],
        num_kv_heads=j["num_key_value_heads"],
        head_dim=j["head_dim"],
        intermediate_size=j["intermediate_size"],
        chunk=j["summary_chunk_size"],
        window=int(found[1]),
        rope_theta=float(j["rope_theta"]),
        norm_eps=j["rms_norm_eps"],
    )
    model = NotebookModel(config)
    model.load_state_dict(
        {n: w.float() for n, w in load_file(folder / "model.safetensors").items()}
    )
    return model.eval()
