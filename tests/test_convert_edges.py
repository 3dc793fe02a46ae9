"""The converter's edges: flags without effect, configs that contradict the weights, uploads."""

import json
from unittest.mock import create_autospec

import mlx.core as mx
import numpy as np
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

import ksa_mlx
from ksa_mlx.weights import expected_shapes

from ._convert_helpers import GOLDENS, WEIGHTS, convert, hub_folder, read_config, refused

HYBRID = GOLDENS / "hybrid_mix1"


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--q-bits", "4"), "--q-bits: found without -q"),
        (("--q-group-size", "64"), "--q-group-size: found without -q"),
        (("--q-mode", "affine"), "--q-mode: found without -q"),
        (("--q-mode", "mxfp4"), "--q-mode: found without -q"),
        (("-d", "--q-bits", "4"), "--q-bits: found without -q"),
        (("-q", "--q-bits", "0"), "--q-bits: found 0, expected at least 1"),
        (("-q", "--q-group-size", "0"), "--q-group-size: found 0, expected at least 1"),
        (("-q", "--q-mode", "mxfp4", "--q-bits", "3"), "-q: "),
        (("-q", "--q-mode", "nvfp4", "--q-group-size", "64"), "-q: "),
        (("-q", "--quant-predicate", "mixed_3_6", "--q-bits", "8"), "--q-bits: found with"),
        (("-q", "--q-group-size", "7"), "--q-group-size: found 7"),
        (("--revision", "main"), "revision: found 'main'"),
    ],
    ids=" ".join,
)
def test_flags_without_effect(flags, words, tmp_path, capsys):
    assert words in refused(capsys, HYBRID, tmp_path / "mlx", *flags)
    assert "bits" not in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8"])
def test_dequantised_in_the_dtype_asked_for(mode, dtype, tmp_path):
    assert convert(HYBRID, tmp_path / "q", "-q", "--q-mode", mode, "--dtype", "float32") == 0
    assert convert(tmp_path / "q", tmp_path / "d", "-d", "--dtype", dtype) == 0
    weights = mx.load(str(tmp_path / "d" / WEIGHTS))
    assert {w.dtype for w in weights.values()} == {getattr(mx, dtype)}
    config = read_config(tmp_path / "d")
    assert config["torch_dtype"] == dtype and not {"quantization", "dtype"} & config.keys()
    q, d = (ksa_mlx.load_model(tmp_path / n)[0] for n in "qd")
    layer = q.layers[1].mlp.up_proj
    exact = mx.dequantize(
        layer.weight, layer.scales, layer.get("biases"), layer.group_size, layer.bits, mode
    )
    assert mx.array_equal(d.layers[1].mlp.up_proj.weight, exact.astype(getattr(mx, dtype)))


def test_the_bits_printed_are_those_of_the_file(tmp_path, capsys):
    for dtype in ("float16", "float32"):
        out = tmp_path / dtype
        assert convert(HYBRID, out, "-q", "--dtype", dtype) == 0
        printed = float(capsys.readouterr().out.partition(" bits a weight")[0].split()[-1])
        weights = mx.load(str(out / WEIGHTS))
        size = sum(np.prod(s) for s in expected_shapes(ksa_mlx.load_model(out)[0].args).values())
        assert printed == pytest.approx(
            sum(w.nbytes for w in weights.values()) * 8 / size, abs=1e-3
        )


def test_layers_that_no_group_fits_are_counted(tmp_path, capsys):
    assert convert(HYBRID, tmp_path / "q", "-q", "--q-group-size", "128") == 0
    # Hidden 64 and, with 4 heads of 32, 128: only o_proj and down_proj are of 128 columns.
    assert "layers unquantised: no multiples of a group of 128" in capsys.readouterr().out
    model, _ = ksa_mlx.load_model(tmp_path / "q")
    assert hasattr(model.layers[0].self_attn.o_proj, "bits")
    assert not hasattr(model.layers[0].self_attn.q_proj, "bits")


# Configs and weights that contradict each other.


def logits(folder):
    return ksa_mlx.load_model(folder)[0](mx.arange(60)[None])


def test_a_tied_head_that_differs_is_kept(tmp_path, capsys):
    """As transformers 5 does; one that is the same is dropped."""
    source = hub_folder(tmp_path / "hub", tie_word_embeddings=True)
    assert convert(source, tmp_path / "mlx") == 0
    assert "Kept lm_head.weight: the config ties it" in capsys.readouterr().out
    assert read_config(tmp_path / "mlx")["tie_word_embeddings"] is False
    for folder in (source, tmp_path / "mlx"):
        assert mx.array_equal(logits(folder), logits(HYBRID))

    def same(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["lm_head.weight"][96:] = 0

    source = hub_folder(tmp_path / "same", weights=same, tie_word_embeddings=True)
    assert convert(source, tmp_path / "tied") == 0
    assert "lm_head.weight" not in mx.load(str(tmp_path / "tied" / WEIGHTS))
    assert mx.array_equal(logits(source), logits(tmp_path / "tied"))


@pytest.mark.parametrize(
    "fields, dtype",
    [
        ({"torch_dtype": "float16", "dtype": "float32"}, mx.float32),
        ({"torch_dtype": "torch.bfloat16"}, mx.bfloat16),
        ({"torch_dtype": "float16", "dtype": None}, mx.float16),
        ({"torch_dtype": "auto"}, mx.float32),
    ],
)
def test_dtypes_of_the_config(fields, dtype, tmp_path):
    assert convert(hub_folder(tmp_path / "hub", **fields), tmp_path / "mlx") == 0
    assert {w.dtype for w in mx.load(str(tmp_path / "mlx" / WEIGHTS)).values()} == {dtype}
    assert "dtype" not in read_config(tmp_path / "mlx")


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"torch_dtype": "int8"}, "torch_dtype: found 'int8', expected one of float16"),
        ({"dtype": ["float32"]}, "torch_dtype: found ['float32']"),
        ({"quantization": "4bit"}, "quantization: found '4bit', expected a JSON object"),
        ({"quantization": {}}, "quantization.group_size: found None"),
        ({"use_summary_attention": "true"}, "found 'true', expected true"),
        ({"use_sliding_window": True}, "use_sliding_window: found True, expected false"),
        ({"layer_types": ["sliding_attention"] * 4}, "layer_types: found ["),
        ({"model_type": 5}, "model_type: found 5"),
    ],
)
def test_contradictions_are_named(fields, words, tmp_path, capsys):
    source = hub_folder(tmp_path / "hub", **fields)
    message = refused(capsys, source, tmp_path / "mlx")
    assert words in message and "config.json: " in message
    with pytest.raises(ValueError) as e:
        ksa_mlx.load_model(source)
    assert words in str(e.value)


def test_a_quantization_of_null_is_none(tmp_path):
    config = {**read_config(HYBRID), "quantization": None, "quantization_config": None}
    source = hub_folder(tmp_path / "hub")
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "mlx") == 0
    for folder in (source, tmp_path / "mlx"):
        assert mx.array_equal(logits(folder), logits(HYBRID))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "model.", None])
def test_names_with_another_prefix_are_named(prefix, tmp_path, capsys):
    def rename(tensors):
        for name in list(tensors):
            new = f"{prefix}{name}" if prefix else name.removeprefix("model.")
            tensors[new] = tensors.pop(name)

    source = hub_folder(tmp_path / "hub", weights=rename)
    message = refused(capsys, source, tmp_path / "mlx")
    assert "missing weights: model.embed_tokens.weight" in message
    assert f"; found {prefix}" in message if prefix else "; found embed_tokens.weight" in message


def test_tokens_behind_the_summary_ids(tmp_path, capsys):
    """Rows of zeros are padding; others are trained, and no text of this model can hold them."""

    def grow(rows):
        def change(tensors):
            for name in ("model.embed_tokens.weight", "lm_head.weight"):
                new = np.zeros((3, 64), np.float32)
                new[rows] = 0.5
                tensors[name] = np.concatenate([tensors[name], new])

        return change

    source = hub_folder(tmp_path / "padded", weights=grow([]), vocab_size=100)
    assert convert(source, tmp_path / "mlx") == 0
    for folder in (source, tmp_path / "mlx"):
        assert mx.array_equal(logits(folder), logits(HYBRID))
    source = hub_folder(tmp_path / "trained", weights=grow([1]), vocab_size=100)
    message = refused(capsys, source, tmp_path / "no")
    assert "model.embed_tokens.weight: rows 97 to 99 are not zero" in message
    with pytest.raises(ValueError, match="rows 97 to 99 are not zero"):
        ksa_mlx.load_model(source)


class Uploads:
    """A Hub to which `me` is logged in; `fails` names a method of HfApi's and what it raises."""

    def __init__(self, monkeypatch, **fails):
        self.calls = []
        api = create_autospec(HfApi, instance=True)
        api.whoami.return_value = {"name": "me", "orgs": [{"name": "us"}]}
        for name in ("create_repo", "upload_folder"):
            call = lambda name=name, **kw: self.calls.append((name, kw))
            getattr(api, name).side_effect = call
        for name, error in fails.items():
            getattr(api, name).side_effect = error
        monkeypatch.setattr("ksa_mlx.convert.HfApi", lambda: api)


def test_upload(tmp_path, monkeypatch):
    hub = Uploads(monkeypatch)
    for repo in ("me/ksa", "us/ksa", "ksa"):
        out = tmp_path / repo.replace("/", "-")
        assert convert(HYBRID, out, "--upload-repo", repo) == 0
        assert [name for name, _ in hub.calls[-2:]] == ["create_repo", "upload_folder"]
        assert hub.calls[-1][1] == {"repo_id": repo, "folder_path": out}
        assert f'load("{repo}")' in (out / "README.md").read_text()


def test_upload_that_fails_leaves_the_folder(tmp_path, monkeypatch, capsys):
    Uploads(monkeypatch, upload_folder=ConnectionError("no network"))
    assert convert(HYBRID, tmp_path / "mlx", "--upload-repo", "me/ksa") == 1
    assert "error: me/ksa: not uploaded (no network)" in capsys.readouterr().err
    assert (tmp_path / "mlx" / WEIGHTS).exists()


def test_uploads_are_checked_first(tmp_path, monkeypatch, capsys):
    """Before anything is read: the source does not even exist."""
    Uploads(monkeypatch)
    flag = ("--upload-repo", "bad repo name!!")
    assert "--upload-repo: bad repo name!!: " in refused(
        capsys, tmp_path / "nope", tmp_path / "mlx", *flag
    )
    message = refused(capsys, tmp_path / "nope", tmp_path / "mlx", "--upload-repo", "them/ksa")
    assert "found the namespace them, expected one of yours (me, us)" in message
    Uploads(monkeypatch, whoami=LocalTokenNotFoundError("no token"))
    message = refused(capsys, tmp_path / "nope", tmp_path / "mlx", "--upload-repo", "me/ksa")
    assert "not logged in" in message
