"""Loading: by us, by mlx-lm after `import ksa_mlx`, and by mlx-lm's own commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import load_file

import ksa_mlx
from ksa_mlx.stock.register import register

from ._convert_helpers import (
    GOLDENS,
    WEIGHTS,
    add_tokenizer,
    convert,
    hub_folder,
    read_config,
    sharded,
)

HYBRID = GOLDENS / "hybrid_mix1"


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A converted folder with a tokenizer. Tests copy it before they change it."""
    folder = tmp_path_factory.mktemp("load")
    source = hub_folder(folder / "hub")
    add_tokenizer(source)
    assert convert(source, folder / "mlx") == 0
    return folder / "mlx"


@pytest.fixture
def copy(converted, tmp_path):
    return Path(shutil.copytree(converted, tmp_path / "copy"))


def change_config(folder, **fields):
    config = {**read_config(folder), **fields}
    (folder / "config.json").write_text(json.dumps(config))


def golden_words(n=10):
    golden = load_file(HYBRID / "golden.safetensors")
    words = [" ".join(f"w{i}" for i in golden[name]) for name in ("prompt_8", "greedy_8")]
    return words[0], " ".join(words[1].split()[:n])


def same_model(a, b):
    a, b = (dict(tree_flatten(m.parameters())) for m in (a, b))
    return a.keys() == b.keys() and all(mx.array_equal(a[n], b[n]) for n in a)


def test_every_layout_is_the_same_model(converted, tmp_path):
    model, config = ksa_mlx.load_model(converted)
    assert config["model_type"] == "qwen3_ksa" and not model.training
    for source in (HYBRID, str(HYBRID), sharded(tmp_path / "shards")):
        other, config = ksa_mlx.load_model(source)
        assert same_model(model, other) and config["model_type"] == "qwen3_ksa"
    lazy, _ = ksa_mlx.load_model(converted, lazy=True)
    assert same_model(model, lazy)


def test_load_and_generate(converted):
    prompt, answer = golden_words()
    model, tokenizer, config = ksa_mlx.load(converted, return_config=True)
    assert mlx_lm.generate(model, tokenizer, prompt, max_tokens=10) == answer
    assert config["model_file"] == "ksa_model.py" and 90 in tokenizer.eos_token_ids


def test_mlx_lm_after_import_needs_no_flag(copy):
    """And it runs nothing of the folder."""
    prompt, answer = golden_words()
    (copy / "ksa_model.py").write_text("raise SystemExit('ran')")
    model, tokenizer, config = mlx_lm.load(str(copy), return_config=True)
    assert isinstance(model, ksa_mlx.Model) and config["model_file"] == "ksa_model.py"
    parts = mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=10)
    assert "".join(p.text for p in parts) == answer


def test_our_loader_runs_no_code_of_a_folder(copy):
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    change_config(copy, model_file="evil.py")
    assert isinstance(ksa_mlx.load(copy, trust_remote_code=True)[0], ksa_mlx.Model)


def test_foreign_code_is_still_refused(copy):
    """Only our model type with our file name does without mlx-lm's flag."""
    (copy / "evil.py").write_text("raise SystemExit('ran')")
    for fields in ({"model_file": "evil.py"}, {"model_type": "other"}):
        change_config(copy, **{"model_file": "ksa_model.py", **fields})
        with pytest.raises(ValueError, match="trust_remote_code"):
            mlx_lm.load(str(copy))


def test_what_mlx_lm_saves_loads_again(converted, tmp_path):
    mlx_lm.convert(str(converted), str(tmp_path / "q"), quantize=True, q_bits=8)
    assert read_config(tmp_path / "q")["model_file"] == "ksa_model.py"
    assert (tmp_path / "q" / "ksa_model.py").read_text() == (converted / "ksa_model.py").read_text()
    for load in (mlx_lm.load, ksa_mlx.load):
        model, _ = load(str(tmp_path / "q"))
        assert model.model.embed_tokens.bits == 8


def test_register_is_idempotent_and_gives_way(monkeypatch):
    wrapped = mlx_lm.utils.load_model
    register()
    assert mlx_lm.utils.load_model is wrapped

    # As if mlx-lm brought the model itself: nothing of ours is put in its place.
    monkeypatch.delitem(sys.modules, "mlx_lm.models.qwen3_ksa")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    register()
    assert "mlx_lm.models.qwen3_ksa" not in sys.modules
    assert mlx_lm.utils.load_model is wrapped


@pytest.mark.slow
def test_stock_command(converted, tmp_path):
    """mlx_lm.generate, which never imports us, through the folder's model_file."""
    prompt, answer = golden_words()
    root = str(Path(ksa_mlx.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}
    command = [
        *(sys.executable, "-m", "mlx_lm", "generate", "--model", str(converted)),
        *("--trust-remote-code", "--prompt", prompt, "--max-tokens", "10", "--temp", "0"),
    ]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert answer in done.stdout, done.stderr


def test_model_config_and_adapter(converted, tmp_path):
    model, _ = ksa_mlx.load_model(converted, model_config={"rollback": 16})
    assert model.args.rollback == 16
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    linear_to_lora_layers(model, 2, parameters)
    adapter = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    weights = {n: w + 0.1 for n, w in tree_flatten(model.trainable_parameters()) if "lora" in n}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    plain, _ = ksa_mlx.load_model(converted)
    adapted, _ = ksa_mlx.load(converted, adapter_path=str(tmp_path))
    ids = mx.arange(8)[None]
    assert mx.abs(plain(ids) - adapted(ids)).max() > 1e-3


def refused(path, load=ksa_mlx.load_model, **kwargs):
    with pytest.raises(ValueError) as e:
        load(path, **kwargs)
    message = str(e.value)
    assert str(path) in message and "\n" not in message
    return message


def test_refusals(copy, tmp_path):
    assert "no such file or folder" in refused(tmp_path / "nope")
    assert "convert it first: python convert.py --hf-path" in refused(GOLDENS / "muse_bypass")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(tmp_path / "empty")
    shutil.copy(HYBRID / "config.json", tmp_path / "empty")
    assert "no model*.safetensors" in refused(tmp_path / "empty")
    plain = hub_folder(tmp_path / "plain", use_summary_attention=None)
    assert "a plain qwen3 model" in refused(plain)
    bad = hub_folder(tmp_path / "bad", summary_sliding_chunk_num="exit()")
    assert "config.json: summary_sliding_chunk_num: found 'exit()'" in refused(bad)

    assert "rollback: found -1" in refused(copy, model_config={"rollback": -1})
    (copy / "tokenizer.json").unlink()
    assert "no tokenizer files" in refused(copy, ksa_mlx.load)
    whole = (copy / WEIGHTS).read_bytes()
    for content in (whole[:-10], b"garbage" * 100):
        (copy / WEIGHTS).write_bytes(content)
        assert f"{WEIGHTS}: not a whole safetensors file" in refused(copy)


@pytest.mark.parametrize("converted_first", [False, True])
def test_wrong_weights(converted_first, tmp_path):
    folder = hub_folder(tmp_path / "hub")
    if converted_first:
        assert convert(folder, tmp_path / "mlx") == 0
        folder = tmp_path / "mlx"
    weights = mx.load(str(folder / WEIGHTS))
    mx.eval(weights)
    norm = weights.pop("model.norm.weight")
    for changed, words in (
        ({}, "missing weights: model.norm.weight"),
        ({"model.norm.weight": norm, "x": norm}, "does not have: x"),
        ({"model.norm.weight": norm[:5]}, "found shape [5], expected [64]"),
    ):
        mx.save_safetensors(str(folder / WEIGHTS), {**weights, **changed})
        assert words in refused(folder)


def test_quantised_with_a_missing_scale(converted, tmp_path):
    assert convert(converted, tmp_path / "q", "-q") == 0
    weights = mx.load(str(tmp_path / "q" / WEIGHTS))
    mx.eval(weights)
    del weights["model.layers.0.mlp.up_proj.scales"]
    mx.save_safetensors(str(tmp_path / "q" / WEIGHTS), weights)
    assert "layers.0.mlp.up_proj" in refused(tmp_path / "q")
