"""Goldens of KSA models on bases without q/k norms: `python -m tests.make_goldens [FOLDER]`.

The logits are PyTorch's in float64, by the rule of goldens/README.md: summaries stand between the
chunks, every layer is dense, and nothing of ksa_mlx or of MLX is used. Where all windows cover the
text, they must be those of transformers' own Llama and Qwen2 with the same weights.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, rotate_half

TEXT = 96  # text ids; the summary ids follow
PROMPTS = (1, 2, 7, 8, 9, 15, 16, 17, 40, 131)
DECODED = (1, 7, 8, 16, 17, 40, 131)

COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "use_summary_attention": True,
    "summary_token_begin": TEXT,
    "truncate_predict_nums": TEXT,
    "summary_chunk_position_ids_type": "origin",
    "summary_token_position_ids_type": "last_chunk_slice_right",
    "summary_independent_parameters": True,
}
CASES = {
    # As SmolLM2 has it, and Llama 3's RoPE.
    "llama_hybrid": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "head_dim": 16,
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "rope_interleaved": False,
        "tie_word_embeddings": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        "vocab_size": TEXT + 1,
        "summary_chunk_size": 8,
        "summary_token_num": 1,
        "summary_sliding_chunk_num": [2, 512, 2, 1],
        "mix_coeff": 1.0,
        "summary_independent_attention_layernorm": True,
    },
    # Queries, keys and values have biases, outputs have none; no head_dim in the config.
    "qwen2_two_summaries": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "rope_scaling": None,
        "sliding_window": 4096,
        "use_sliding_window": False,
        "max_window_layers": 28,
        "tie_word_embeddings": False,
        "vocab_size": TEXT + 2,
        "summary_chunk_size": 4,
        "summary_token_num": 2,
        "summary_sliding_chunk_num": 3,
        "mix_coeff": 0.5,
    },
}


def weights_of(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """Random weights, spread enough that a wrong rule moves the logits."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda std, *shape: torch.randn(*shape, generator=generator) * std
    norm = lambda: 0.5 + torch.rand(hidden, generator=generator)
    hidden, mlp = config["hidden_size"], config["intermediate_size"]
    dim = (
        hidden // config["num_attention_heads"] if "head_dim" not in config else config["head_dim"]
    )
    heads, kv = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    found = {"model.embed_tokens.weight": normal(1.0, config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        p = f"model.layers.{layer}"
        found[f"{p}.input_layernorm.weight"] = norm()
        found[f"{p}.post_attention_layernorm.weight"] = norm()
        if config.get("summary_independent_attention_layernorm"):
            found[f"{p}.input_layernorm_summary.weight"] = norm()
        for name, rows in (("q", heads), ("k", kv), ("v", kv)):
            for own in ("", "_summary"):
                found[f"{p}.self_attn.{name}_proj{own}.weight"] = normal(0.25, rows, hidden)
                if config["model_type"] == "qwen2":
                    found[f"{p}.self_attn.{name}_proj{own}.bias"] = normal(0.5, rows)
        found[f"{p}.self_attn.o_proj.weight"] = normal(0.2, hidden, heads)
        found[f"{p}.mlp.gate_proj.weight"] = normal(0.2, mlp, hidden)
        found[f"{p}.mlp.up_proj.weight"] = normal(0.2, mlp, hidden)
        found[f"{p}.mlp.down_proj.weight"] = normal(0.2, hidden, mlp)
    found["model.norm.weight"] = norm()
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = normal(0.5, config["vocab_size"], hidden)
        found["lm_head.weight"][TEXT:] = 0
    return found


def plain(config: dict, weights: dict) -> torch.nn.Module:
    """transformers' own model of the base, in float64."""
    kinds = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
    make, cls = kinds[config["model_type"]]
    model = cls(make(**{**config, "attn_implementation": "eager"}))
    base = {n: w for n, w in weights.items() if "_summary" not in n}
    model.load_state_dict(base, strict=not config["tie_word_embeddings"])
    return model.double().eval()


class Reference:
    """A KSA model: rows are text and summaries in the order of the sequence, masks are dense."""

    def __init__(self, config: dict, weights: dict[str, torch.Tensor]):
        self.config = config
        self.weights = {n: w.double() for n, w in weights.items()}
        self.base = plain(config, weights)
        self.frequencies = LlamaRotaryEmbedding(self.base.config).inv_freq.double()
        windows = config["summary_sliding_chunk_num"]
        layers = config["num_hidden_layers"]
        self.windows = windows if isinstance(windows, list) else [windows] * layers

    def rows(self, n: int) -> list[tuple[int, int, int]]:
        """(chunk, text position or -1, number of the summary or -1) of each row."""
        chunk, count = self.config["summary_chunk_size"], self.config["summary_token_num"]
        found = []
        for p in range(n):
            found.append((p // chunk, p, -1))
            if p % chunk == chunk - 1:
                found += [(p // chunk, -1, i) for i in range(count)]
        return found

    def position(self, row: tuple[int, int, int]) -> int:
        chunk, text, i = row
        size, count = self.config["summary_chunk_size"], self.config["summary_token_num"]
        if text >= 0:
            return text
        return max(chunk * size, chunk * size + (i + 1) * size // count - 1)

    @staticmethod
    def sees(query: tuple[int, int, int], key: tuple[int, int, int], window: int) -> bool:
        (qc, qt, qi), (kc, kt, ki) = query, key
        if qt < 0:
            return kc == qc and (kt >= 0 or ki <= qi)
        return qc - window <= kc and kt <= qt if kt >= 0 else kc < qc - window

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[name]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return torch.nn.functional.linear(
            x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        )

    def logits(self, ids: torch.Tensor, windows: list[int] | None = None) -> torch.Tensor:
        """Of a text (n,): (n, text ids)."""
        rows, w = self.rows(len(ids)), self.weights
        summary = torch.tensor([text < 0 for _, text, _ in rows])[:, None]
        own_ids = torch.tensor([TEXT + i if t < 0 else int(ids[t]) for _, t, i in rows])
        positions = torch.tensor([self.position(row) for row in rows]).double()
        h = w["model.embed_tokens.weight"][own_ids]
        angles = (positions[:, None] * self.frequencies).repeat(1, 2)[:, None]
        for layer, window in enumerate(windows or self.windows):
            p = f"model.layers.{layer}"
            x = self.norm(h, f"{p}.input_layernorm.weight")
            if f"{p}.input_layernorm_summary.weight" in w:
                own = self.norm(h, f"{p}.input_layernorm_summary.weight")
                x = torch.where(summary, own, x)
            heads = {}
            for name in "qkv":
                y, own = (self.linear(x, f"{p}.self_attn.{name}_proj{o}") for o in ("", "_summary"))
                mix = self.config["mix_coeff"]
                y = torch.where(summary, mix * own + (1 - mix) * y, y)
                y = y.reshape(len(rows), -1, self.base.model.layers[0].self_attn.head_dim)
                turned = y * angles.cos() + rotate_half(y) * angles.sin()
                heads[name] = y if name == "v" else turned
            repeat = heads["q"].shape[1] // heads["k"].shape[1]
            q, k, v = heads["q"], *(heads[n].repeat_interleave(repeat, 1) for n in "kv")
            mask = torch.tensor([[self.sees(a, b, window) for b in rows] for a in rows])
            scores = torch.einsum("qhd,khd->hqk", q, k) * q.shape[-1] ** -0.5
            shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
            out = torch.einsum("hqk,khd->qhd", shares, v).flatten(1)
            h = h + self.linear(out, f"{p}.self_attn.o_proj")
            x = self.norm(h, f"{p}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(self.linear(x, f"{p}.mlp.gate_proj"))
            h = h + self.linear(gate * self.linear(x, f"{p}.mlp.up_proj"), f"{p}.mlp.down_proj")
        h = self.norm(h[~summary[:, 0]], "model.norm.weight")
        return (h @ w.get("lm_head.weight", w["model.embed_tokens.weight"])[:TEXT].T).detach()

    def check(self):
        """The base is transformers': a text without anything out of the window."""
        ids = torch.randint(TEXT, (120,), generator=torch.Generator().manual_seed(9))
        theirs = self.base(ids[None]).logits[0, :, :TEXT].detach()
        worst = (self.logits(ids, [1000] * len(self.windows)) - theirs).abs().max().item()
        # transformers' RoPE and norms compute in float32.
        if worst > 1e-3:
            raise SystemExit(f"{self.config['model_type']}: {worst} from transformers' logits")


def golden(model: Reference) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: torch.randint(TEXT, (n,), generator=generator)
    arrays = {f"prompt_{n}": draw(n) for n in PROMPTS}
    for n in PROMPTS:
        arrays[f"prefill_logits_{n}"] = model.logits(arrays[f"prompt_{n}"])
    margins = []
    for n in DECODED:
        prompt, more = arrays[f"prompt_{n}"], draw(40)
        arrays[f"decode_ids_{n}"] = more
        arrays[f"forced_logits_{n}"] = model.logits(torch.cat([prompt, more]))[n:]
        for _ in range(40):
            prompt = torch.cat([prompt, model.logits(prompt)[-1:].argmax(-1)])
        arrays[f"greedy_prefill_{n}"] = prompt[n:]
        best = model.logits(prompt)[n - 1 : -1].topk(2).values
        margins.append((best[:, 0] - best[:, 1]).min().item())
    print(f"smallest greedy top-2 margin {min(margins):.3f}")
    cast = lambda x: x.float() if x.is_floating_point() else x.int()
    return {name: cast(x).contiguous() for name, x in arrays.items()}


def main(folder: Path):
    for seed, (case, fields) in enumerate(CASES.items(), 2):
        config = {**COMMON, **fields}
        weights = weights_of(config, seed)
        model = Reference(config, weights)
        model.check()
        arrays = golden(model)
        # An id that no greedy text holds.
        said = {i for n in DECODED for i in arrays[f"greedy_prefill_{n}"].tolist()}
        config["eos_token_id"] = max(set(range(TEXT)) - said)
        (folder / case).mkdir(parents=True, exist_ok=True)
        (folder / case / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        save_file(weights, folder / case / "model.safetensors", metadata={"format": "pt"})
        save_file(arrays, folder / case / "golden.safetensors")
        print(f"{case}: logits of a standard deviation of {arrays['prefill_logits_131'].std():.1f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "goldens")
