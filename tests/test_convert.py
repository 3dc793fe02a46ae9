"""The converter: every golden, every source layout, and everything that it must refuse."""

import json
import shutil

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file, save_file

import ksa_mlx
from ksa_mlx.convert import convert as convert_function
from ksa_mlx.weights import expected_shapes, hub_plan, sanitize

from ._convert_helpers import (
    GOLDENS,
    HUB,
    MUSE,
    WEIGHTS,
    add_tokenizer,
    convert,
    hub_folder,
    nan_in,
    read_config,
    refused,
    sharded,
)

HYBRID = GOLDENS / "hybrid_mix1"


def assert_prefill(model, case: str):
    """The model's logits are the golden ones, at every length."""
    golden = load_file(GOLDENS / case / "golden.safetensors")
    for name in (n for n in golden if n.startswith("prompt_")):
        logits = np.array(model(mx.array(golden[name])[None])[0])
        expected = golden[name.replace("prompt", "prefill_logits")]
        assert np.abs(logits - expected).max() <= 1e-3, name


def same_weights(a, b):
    a, b = mx.load(str(a / WEIGHTS)), mx.load(str(b / WEIGHTS))
    return a.keys() == b.keys() and all(mx.array_equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("case", HUB + MUSE)
def test_golden(case, tmp_path):
    assert convert(GOLDENS / case, tmp_path / "mlx") == 0
    model, config = ksa_mlx.load_model(tmp_path / "mlx")
    assert config["model_type"] == "qwen3_ksa" and "auto_map" not in config
    assert_prefill(model, case)
    # The folder holds the model's parameters, no more and no fewer.
    parameters = {n: w.shape for n, w in tree_flatten(model.parameters())}
    assert parameters == expected_shapes(model.args)
    assert mx.load(str(tmp_path / "mlx" / WEIGHTS)).keys() == parameters.keys()


def test_report_says_what_was_dropped(tmp_path, capsys):
    assert convert(GOLDENS / "hybrid_mix0", tmp_path / "mlx") == 0
    out, err = capsys.readouterr()
    # 4 layers of (128 + 64 + 64) x 64 in float32.
    assert "Dropped 65,536 parameters (0.3 MB): summary projections, unused at mix_coeff 0" in out
    assert "Kept 203,648 parameters" in out
    assert "no tokenizer" in out and "Converting" in err


def test_a_library_call_is_quiet(tmp_path, capfd):
    convert_function(str(HYBRID), str(tmp_path / "mlx"))
    assert capfd.readouterr() == ("", "")
    lines = []
    convert_function(str(HYBRID), str(tmp_path / "q"), quantize=True, report=lines.append)
    assert lines[-1] == f"Wrote {tmp_path / 'q'}" and capfd.readouterr().out == ""


def test_released_model_drops_566_million(tmp_path):
    released = {**read_config(GOLDENS / "hybrid_mix0"), "hidden_size": 2560, "head_dim": 128}
    released.update(num_attention_heads=32, num_key_value_heads=8, intermediate_size=9728)
    released.update(num_hidden_layers=36, vocab_size=151937, summary_token_begin=151936)
    released.update(summary_sliding_chunk_num="([128]*3+[16768]*1)*9", truncate_predict_nums=151936)
    plan = hub_plan(ksa_mlx.ModelArgs.from_dict(released))
    dead = [shape for n, (shape, why) in plan.dead.items() if "proj_summary" in n]
    assert sum(np.prod(s) for s in dead) == 36 * (2560 * 4096 + 2 * 2560 * 1024) == 566_231_040


def test_shards_in_and_out(tmp_path):
    source = sharded(tmp_path / "hub")
    convert_function(str(source), str(tmp_path / "many"), max_shard_bytes=200_000)
    convert_function(str(HYBRID), str(tmp_path / "one"))
    files = sorted(p.name for p in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    one = mx.load(str(tmp_path / "one" / WEIGHTS))
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in one.values())
    for name, file in index["weight_map"].items():
        assert mx.array_equal(mx.load(str(tmp_path / "many" / file))[name], one[name])
    assert index["weight_map"].keys() == one.keys()
    assert_prefill(ksa_mlx.load_model(tmp_path / "many")[0], "hybrid_mix1")


def test_memory_is_one_shard(tmp_path):
    big = np.random.default_rng(0).standard_normal((16384, 64)).astype(np.float32)  # 4 MB

    def grow(tensors):
        for name in list(tensors):
            if ".mlp." in name:
                tensors[name] = big.T.copy() if "down" in name else big

    source = hub_folder(tmp_path / "hub", weights=grow, intermediate_size=16384)
    mx.clear_cache()
    mx.reset_peak_memory()
    held = mx.get_active_memory()
    convert_function(str(source), str(tmp_path / "mlx"), max_shard_bytes=8 << 20)
    # 50 MB of weights: a shard of 8 MB, one more tensor and its check.
    assert mx.get_peak_memory() - held < 26 << 20
    assert len(list((tmp_path / "mlx").glob("*.safetensors"))) >= 6


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtype(dtype, tmp_path):
    source = hub_folder(tmp_path / "source", dtype="float32")
    assert convert(source, tmp_path / "mlx", "--dtype", dtype) == 0
    weights = mx.load(str(tmp_path / "mlx" / WEIGHTS))
    assert {w.dtype for w in weights.values()} == {getattr(mx, dtype)}
    config = read_config(tmp_path / "mlx")
    assert config["torch_dtype"] == dtype and "dtype" not in config
    expected = load_file(HYBRID / WEIGHTS)["model.norm.weight"]
    assert mx.array_equal(
        weights["model.norm.weight"], mx.array(expected).astype(getattr(mx, dtype))
    )


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--q-bits", "8", "--q-group-size", "32"),
        ("--q-mode", "mxfp4"),
        ("--q-mode", "nvfp4"),
        ("--quant-predicate", "mixed_3_6"),
    ],
    ids=" ".join,
)
def test_quantised_as_mlx_lm_does(flags, tmp_path):
    """Streaming or not: the same arrays and the same config as mlx_lm.convert."""
    assert convert(HYBRID, tmp_path / "mlx") == 0
    add_tokenizer(tmp_path / "mlx")
    assert convert(HYBRID, tmp_path / "ours", "-q", *flags) == 0
    options = {
        name[2:].replace("-", "_"): value
        for name, value in zip(flags[::2], flags[1::2], strict=True)
    }
    for name in {"q_bits", "q_group_size"} & options.keys():
        options[name] = int(options[name])
    if "quant_predicate" in options:
        options["q_group_size"] = 64  # mlx-lm would write null into the config
    mlx_lm.convert(str(tmp_path / "mlx"), str(tmp_path / "theirs"), quantize=True, **options)
    assert same_weights(tmp_path / "ours", tmp_path / "theirs")
    ours, theirs = read_config(tmp_path / "ours"), read_config(tmp_path / "theirs")
    assert ours["quantization"] == theirs["quantization"] == ours["quantization_config"]
    assert "summary_embedding" not in str(ours["quantization"])
    model, _ = ksa_mlx.load_model(tmp_path / "ours")
    assert hasattr(model.layers[0].self_attn.q_proj_summary, "bits")
    assert mx.isfinite(model(mx.array([[1, 2, 3]]))).all().item()


def test_converted_again(tmp_path, capsys):
    mlx = tmp_path / "mlx"
    assert convert(HYBRID, mlx) == 0
    assert "converted already" in refused(capsys, mlx, tmp_path / "x")
    assert "nothing to dequantise" in refused(capsys, mlx, tmp_path / "x", "-d")
    assert convert(mlx, tmp_path / "q", "-q") == 0
    assert convert(HYBRID, tmp_path / "direct", "-q") == 0
    assert same_weights(tmp_path / "q", tmp_path / "direct")
    message = refused(capsys, tmp_path / "q", tmp_path / "x", "-q")
    assert "an unquantised checkpoint; -d makes one" in message
    assert convert(tmp_path / "q", tmp_path / "d", "-d") == 0
    config = read_config(tmp_path / "d")
    assert "quantization" not in config and config["model_file"] == "ksa_model.py"
    q, d = (ksa_mlx.load_model(tmp_path / n)[0] for n in "qd")
    ids = mx.arange(40)[None]
    assert mx.abs(q(ids) - d(ids)).max() < 1e-2


def test_files_that_come_along(tmp_path):
    source = hub_folder(tmp_path / "hub")
    add_tokenizer(source)
    for name in ("modeling_qwen3sa.py", "tokenization_x.py", "chat_template.jinja", "LICENSE"):
        (source / name).write_text("raise SystemExit('ran')")
    (source / "generation_config.json").write_text('{"eos_token_id": 7}')
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\nHello")
    config = json.loads((source / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": ["tokenization_x.T", None]}
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "mlx") == 0
    names = {p.name for p in (tmp_path / "mlx").iterdir()}
    assert names == {
        *("config.json", "generation_config.json", "README.md", "LICENSE", "ksa_model.py"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        *("model.safetensors", "model.safetensors.index.json"),
    }
    assert "license: apache-2.0" in (tmp_path / "mlx" / "README.md").read_text()
    assert convert(source, tmp_path / "trusted", "--trust-remote-code") == 0
    python = {p.name for p in (tmp_path / "trusted").glob("*.py")}
    assert python == {"ksa_model.py", "tokenization_x.py"}


# What it must refuse, naming the file and the weight, and leaving nothing behind.


@pytest.mark.parametrize(
    "weights, fields, words",
    [
        (lambda t: t.pop("model.norm.weight"), {}, "missing weights: model.norm.weight"),
        (lambda t: t.update(new=t["model.norm.weight"]), {}, "does not have: new"),
        (nan_in("model.norm.weight"), {}, "model.norm.weight: found NaN or Inf"),
        (nan_in("model.embed_tokens.weight", np.inf), {}, "embed_tokens.weight: found NaN"),
        (None, {"intermediate_size": 120}, "found shape [64, 128], expected [64, 120]"),
        (None, {"num_hidden_layers": 3, "summary_sliding_chunk_num": 2}, "layers.3"),
        (None, {"summary_independent_parameters": False}, "q_proj_summary"),
        (None, {"attention_bias": True}, "missing weights: model.layers.0.self_attn.q_proj.bias"),
        (None, {"summary_sliding_chunk_num": "[1]*10**9"}, "summary_sliding_chunk_num"),
        (None, {"use_summary_attention": None}, "a plain qwen3 model, not a KSA model"),
        (None, {"summary_chunk_size": 0}, "config.json: summary_chunk_size: found 0"),
        (None, {"quantization_config": {"quant_method": "fp8"}}, "an unquantised checkpoint"),
        (None, {"rope_scaling": {"rope_type": "bent"}}, "rope_scaling"),
        (
            lambda t: t.update({"model.norm.weight": np.arange(64)}),
            {},
            "model.norm.weight: found dtype I64",
        ),
    ],
)
def test_bad_checkpoints(weights, fields, words, tmp_path, capsys):
    source = hub_folder(tmp_path / "hub", weights=weights, **fields)
    message = refused(capsys, source, tmp_path / "mlx")
    assert words in message and str(source) in message


def test_float16_overflow(tmp_path, capsys):
    source = hub_folder(tmp_path / "hub", weights=nan_in("model.norm.weight", 1e30))
    message = refused(capsys, source, tmp_path / "mlx", "--dtype", "float16")
    assert "model.norm.weight: too large for" in message


def test_bad_safetensors(tmp_path, capsys):
    source = hub_folder(tmp_path / "hub")
    whole = (source / WEIGHTS).read_bytes()
    for content in (whole[:-100], whole[:50], b"", b"garbage" * 1000, b"\xff" * 64):
        (source / WEIGHTS).write_bytes(content)
        assert f"{WEIGHTS}: not a whole" in refused(capsys, source, tmp_path / "mlx")
    (source / WEIGHTS).unlink()
    assert "no weights" in refused(capsys, source, tmp_path / "mlx")


def test_bad_shards(tmp_path, capsys):
    source = sharded(tmp_path / "hub")
    second, index = source / "model-00002-of-00003.safetensors", source / (WEIGHTS + ".index.json")
    second.rename(source / "away")
    assert f"missing files: {second.name}" in refused(capsys, source, tmp_path / "mlx")
    text = index.read_text()
    index.unlink()
    assert f"missing files: {second.name}" in refused(capsys, source, tmp_path / "mlx")
    shutil.copy(source / "model-00001-of-00003.safetensors", second)
    assert "is in model-00001" in refused(capsys, source, tmp_path / "mlx")
    index.write_text(text.replace(second.name, "../../" + second.name))
    assert "plain file name" in refused(capsys, source, tmp_path / "mlx")
    index.write_text("{")
    assert "not readable as JSON" in refused(capsys, source, tmp_path / "mlx")


def test_bad_paths(tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, tmp_path / "nope", tmp_path / "mlx")
    (tmp_path / "empty").mkdir()
    assert "no config.json" in refused(capsys, tmp_path / "empty", tmp_path / "mlx")
    (tmp_path / "empty" / "config.json").write_text("[1")
    assert "not readable as JSON" in refused(capsys, tmp_path / "empty", tmp_path / "mlx")
    assert "exists already" in refused(capsys, HYBRID, tmp_path / "empty")
    assert "either quantize or" in refused(capsys, HYBRID, tmp_path / "mlx", "-q", "-d")
    for flags in (("--q-bits", "7"), ("--q-bits", "-4"), ("--q-group-size", "48")):
        assert "-q" in refused(capsys, HYBRID, tmp_path / "mlx", "-q", *flags)
    recipe = ("--quant-predicate", "mixed_3_6")
    assert "without -q" in refused(capsys, HYBRID, tmp_path / "mlx", *recipe)
    assert "--q-mode" in refused(
        capsys, HYBRID, tmp_path / "mlx", "-q", *recipe, "--q-mode", "mxfp4"
    )


def test_dead_weights_may_be_absent(tmp_path):
    """At mix_coeff 0 a checkpoint without its own projections is the same model."""

    def strip(tensors):
        for name in [n for n in tensors if "_proj_summary" in n]:
            del tensors[name]

    source = hub_folder(tmp_path / "hub", "hybrid_mix0", weights=strip)
    assert convert(source, tmp_path / "mlx") == 0
    assert_prefill(ksa_mlx.load_model(tmp_path / "mlx")[0], "hybrid_mix0")


def test_qk_norms_that_only_the_weights_tell(tmp_path):
    def add(tensors):
        for layer in range(4):
            for name in "qk":
                base = tensors[f"model.layers.{layer}.self_attn.{name}_norm.weight"]
                tensors[f"model.layers.{layer}.self_attn.{name}_norm_summary.weight"] = base * 2

    source = hub_folder(tmp_path / "hub", weights=add)
    assert convert(source, tmp_path / "mlx") == 0
    assert read_config(tmp_path / "mlx")["summary_independent_qk_norm"] is True
    a, b = (ksa_mlx.load_model(p)[0] for p in (tmp_path / "mlx", source))
    ids = mx.arange(60)[None]
    plain, _ = ksa_mlx.load_model(HYBRID)
    assert mx.array_equal(a(ids), b(ids))
    assert mx.abs(a(ids) - plain(ids)).max() > 1e-2


def test_sanitize_is_idempotent():
    for case in HUB:
        args = ksa_mlx.ModelArgs.from_dict(read_config(GOLDENS / case))
        once = sanitize(args, mx.load(str(GOLDENS / case / WEIGHTS)))
        twice = sanitize(args, dict(once))
        assert {n: w.shape for n, w in once.items()} == expected_shapes(args)
        assert twice.keys() == once.keys()
        assert all(twice[n] is once[n] for n in once)
        table = mx.load(str(GOLDENS / case / WEIGHTS))["model.embed_tokens.weight"]
        assert mx.array_equal(once["model.summary_embedding"], table[96:])


def test_single_file_and_state_dict_names(tmp_path):
    shutil.copy(GOLDENS / "muse_bypass" / "config.json", tmp_path)
    tensors = load_file(GOLDENS / "muse_bypass" / "model_muse.safetensors")
    save_file(tensors, tmp_path / "state.safetensors")
    assert convert(tmp_path / "state.safetensors", tmp_path / "mlx") == 0
    assert_prefill(ksa_mlx.load_model(tmp_path / "mlx")[0], "muse_bypass")
