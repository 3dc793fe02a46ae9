"""KSA models on bases without q/k norms: Llama and its like, and Qwen2's biases.

Their goldens are in test_goldens.py, their config fields in test_config.py; batches, splits, saved
caches and gradients run on the variants of _models.py.
"""

import importlib

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.checkpoint.muse import to_hub_config
from ksa_mlx.config import ModelArgs
from ksa_mlx.errors import ConfigError

from ._convert_helpers import BASES, GOLDENS, convert, hub_folder, read_config, refused
from ._models import BASE, tokens, worst

LLAMA, QWEN2 = BASES


def plain(case, weights):
    """mlx-lm's own model of the base, with the text's weights of a KSA model."""
    config = read_config(GOLDENS / case)
    module = importlib.import_module(f"mlx_lm.models.{config['model_type']}")
    config["vocab_size"] = config["summary_token_begin"]
    model = module.Model(module.ModelArgs.from_dict(config))
    model.load_weights([(n, w) for n, w in weights.items() if "summary" not in n])
    model.eval()
    return model


@pytest.mark.parametrize("case", BASES)
def test_inside_the_window_it_is_the_base(case):
    """Logits of mlx-lm's own llama and qwen2, of a prompt and token by token."""
    fields = {"summary_sliding_chunk_num": [40, 512, 41, 40]}
    model, _ = ksa_mlx.load_model(GOLDENS / case, model_config=fields)
    assert model.args.smallest_window == 40
    base, text = plain(case, dict(tree_flatten(model.parameters()))), tokens(150)
    # 40 windows' chunks, of 4 tokens in one case, and the one that is open.
    assert worst(model(text), base(text)) < 1e-4
    for one in (model, base):
        assert one is model or not any("norm" in n for n in one.layers[0].self_attn)
    caches = [make_prompt_cache(one) for one in (model, base)]
    for part in (text[:, :90], text[:, 90:91], text[:, 91:95]):
        ours, theirs = (
            one(part, cache=cache) for one, cache in zip((model, base), caches, strict=True)
        )
        assert worst(ours, theirs) < 1e-4
    # Beyond it the two part.
    far = tokens(400, seed=1)
    assert worst(model(far)[:, :160], base(far)[:, :160]) < 1e-4
    assert worst(model(far), base(far)) > 0.1


@pytest.mark.parametrize("case", BASES)
def test_what_the_model_type_says_is_written_out(case, tmp_path):
    """A converted folder's config says it all: its model type is no longer the base's."""
    assert convert(GOLDENS / case, tmp_path / "mlx") == 0
    config = read_config(tmp_path / "mlx")
    biases = case == QWEN2
    assert config["model_type"] == "qwen3_ksa" and config["use_qk_norm"] is False
    assert config.get("attention_bias") is biases
    attention = ksa_mlx.load_model(tmp_path / "mlx")[0].layers[0].self_attn
    found = {name for name, _ in tree_flatten(attention.parameters())}
    own = {f"{name}_proj{end}" for name in "qkv" for end in ("", "_summary")}
    expected = {f"{name}.weight" for name in (*own, "o_proj")}
    assert found == (expected | {f"{name}.bias" for name in own} if biases else expected)
    # Saying it in the source changes nothing.
    said = {"use_qk_norm": False, "attention_bias": biases, "attention_output_bias": False}
    source = hub_folder(tmp_path / "hub", case, model_type="qwen3", **said)
    ids = tokens(60)
    loaded = [ksa_mlx.load_model(f)[0](ids) for f in (tmp_path / "mlx", source, GOLDENS / case)]
    assert mx.array_equal(loaded[0], loaded[1]) and mx.array_equal(loaded[0], loaded[2])


@pytest.mark.parametrize("case", BASES)
def test_quantised(case, tmp_path):
    """Weights in 8 bits, biases as they were; the cache in pieces, and the definition."""
    assert (
        convert(GOLDENS / case, tmp_path / "q", "-q", "--q-bits", "8", "--q-group-size", "32") == 0
    )
    model, exact = ksa_mlx.load_model(tmp_path / "q")[0], ksa_mlx.load_model(GOLDENS / case)[0]
    attention = model.layers[0].self_attn
    assert all(attention[f"{name}_proj_summary"].bits == 8 for name in "qkv")
    if case == QWEN2:
        own = exact.layers[0].self_attn.k_proj_summary.bias
        assert mx.array_equal(attention.k_proj_summary.bias, own)
    text = tokens(100)
    whole, cache = model(text), model.make_cache()
    pieces = [model(text[:, a : a + 9], cache=cache) for a in range(0, 100, 9)]
    assert worst(mx.concatenate(pieces, axis=1), whole) < 1e-3
    assert worst(naive.forward(model, text), whole) < 1e-3
    assert 0 < worst(whole, exact(text)) < 0.2 * mx.abs(whole).max().item()


NOT_HERE = "summary_sliding_chunk_num's"


@pytest.mark.parametrize(
    "fields, line",
    [
        ({"use_qk_norm": None}, "use_qk_norm: found None, expected true or false"),
        ({"attention_output_bias": 1}, "attention_output_bias: found 1, expected true or false"),
        (
            {"use_qk_norm": False, "summary_independent_qk_norm": True},
            "summary_independent_qk_norm: found True, expected false, as use_qk_norm is",
        ),
        ({"mlp_bias": True}, "mlp_bias: found True, expected false"),
        ({"rope_traditional": True}, "rope_traditional: found True, expected false"),
        ({"rope_interleaved": True}, "rope_interleaved: found True, expected false"),
        ({"sliding_window": 4096}, NOT_HERE),
        ({"sliding_window": 4096, "use_sliding_window": None}, NOT_HERE),
        ({"sliding_window": 4096, "use_sliding_window": True}, "use_sliding_window: found True"),
        ({"model_type": "mistral"}, "sliding_window: found 4096"),
    ],
)
def test_refused(fields, line):
    with pytest.raises(ConfigError) as e:
        ModelArgs.from_dict({**BASE, **fields})
    assert line in str(e.value) and "\n" not in str(e.value)


def test_taken():
    """Fields of other bases that change nothing as they stand, and what is derived."""
    fields = {"mlp_bias": False, "rope_interleaved": False, "use_sliding_window": False}
    args = ModelArgs.from_dict({**BASE, **fields, "sliding_window": 4096, "pretraining_tp": 1})
    assert args.use_qk_norm and not args.attention_bias and not args.attention_output_bias
    assert ModelArgs.from_dict({**BASE, "attention_bias": True}).attention_output_bias is True
    mistral = ModelArgs.from_dict({**BASE, "model_type": "mistral", "sliding_window": None})
    assert not mistral.use_qk_norm and not mistral.attention_bias
    qwen2 = ModelArgs.from_dict({**BASE, "model_type": "qwen2"})
    found = qwen2.use_qk_norm, qwen2.attention_bias, qwen2.attention_output_bias
    assert found == (False, True, False)


@pytest.mark.parametrize(
    "case, fields, line",
    [
        (LLAMA, {"model_type": "qwen3"}, "missing weights: model.layers.0.self_attn.q_norm.weight"),
        (
            LLAMA,
            {"model_type": "qwen2", "attention_bias": None},
            "missing weights: model.layers.0.self_attn.q_proj.bias",
        ),
        (
            QWEN2,
            {"model_type": "llama"},
            "model does not have: model.layers.0.self_attn.k_proj.bias",
        ),
        (
            QWEN2,
            {"attention_output_bias": True},
            "missing weights: model.layers.0.self_attn.o_proj",
        ),
        (LLAMA, {"mlp_bias": True}, "config.json: mlp_bias: found True, expected false"),
        (LLAMA, {"model_type": "mistral"}, "config.json: sliding_window: found 4096"),
    ],
)
def test_folders_refused(case, fields, line, tmp_path, capsys):
    source = hub_folder(tmp_path / "hub", case, **fields)
    assert line in refused(capsys, source, tmp_path / "mlx")


def test_muse_without_norms():
    """Muse leaves its q/k norms out together, and the summaries' with them."""
    muse = read_config(GOLDENS / "muse_bypass")
    off = {"q_norm": False, "k_norm": False, "summary_independent_qk_norm": True}
    config = to_hub_config({**muse, **off})
    assert config["use_qk_norm"] is config["summary_independent_qk_norm"] is False
    assert to_hub_config(muse)["use_qk_norm"] is True
