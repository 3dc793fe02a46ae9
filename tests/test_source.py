"""Which files a folder's model is: the same for the converter, for us and for mlx-lm after import."""

import json
import shutil

import mlx.core as mx
import mlx_lm.utils
import pytest
from safetensors.numpy import load_file, save_file

import ksa_mlx
from ksa_mlx.checkpoint.source import weight_files
from ksa_mlx.errors import CheckpointError

from ._convert_helpers import GOLDENS, WEIGHTS, convert, hub_folder, read_config, refused, sharded

HYBRID = GOLDENS / "hybrid_mix1"
IDS = mx.arange(40)[None]
INDEX = WEIGHTS + ".index.json"


@pytest.fixture(scope="module")
def expected():
    return ksa_mlx.load_model(HYBRID)[0](IDS)


def stray(folder, name="model-zz.safetensors", scale=3.0):
    """Other weights of the same names beside the model's: a copy in another precision, say."""
    save_file({n: w * scale for n, w in load_file(HYBRID / WEIGHTS).items()}, folder / name)


def assert_same_everywhere(folder, expected, tmp_path):
    for load in (ksa_mlx.load_model, mlx_lm.utils.load_model):
        assert mx.array_equal(load(folder)[0](IDS), expected)
    assert convert(folder, tmp_path / "mlx [4bit]") == 0
    for load in (ksa_mlx.load_model, mlx_lm.utils.load_model):
        assert mx.array_equal(load(tmp_path / "mlx [4bit]")[0](IDS), expected)


@pytest.mark.parametrize("name", ["model-{:05d}-of-{:05d}.safetensors", "part[{}].safetensors"])
def test_the_files_of_the_index_and_no_other(name, expected, tmp_path):
    folder = sharded(tmp_path / "hub", name=name)
    for other in ("model-00000.safetensors", "model.safetensors", "model-zz.safetensors"):
        stray(folder, other)
    (folder / "model-broken.safetensors").write_text("no safetensors")
    assert_same_everywhere(folder, expected, tmp_path)


def test_a_converted_folder_with_a_copy_in_it(expected, tmp_path):
    assert convert(HYBRID, tmp_path / "mlx") == 0
    copy = {n: w * 2 for n, w in mx.load(str(tmp_path / "mlx" / WEIGHTS)).items()}
    mx.save_safetensors(str(tmp_path / "mlx" / "model-fp32.safetensors"), copy)
    for load in (ksa_mlx.load_model, mlx_lm.utils.load_model):
        assert mx.array_equal(load(tmp_path / "mlx")[0](IDS), expected)


@pytest.mark.parametrize("name", ["v2 [4bit]", "a*b", "what?", "sp ace", "模型", "{x}", "%d"])
def test_names_are_no_patterns(name, expected, tmp_path):
    (tmp_path / name).mkdir()
    source = hub_folder(tmp_path / name / name)
    assert_same_everywhere(source, expected, tmp_path / name)


def test_an_index_of_another_name(expected, tmp_path):
    folder = sharded(tmp_path / "hub")
    (folder / INDEX).rename(folder / "model.fp32.safetensors.index.json")
    stray(folder)
    assert_same_everywhere(folder, expected, tmp_path)
    shutil.copy(folder / "model.fp32.safetensors.index.json", folder / "x.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"found model.fp32\S+, x\S+, expected model.safe"):
        ksa_mlx.load_model(folder)


def refusal(folder, capsys, tmp_path):
    """The line that both refuse with."""
    with pytest.raises(CheckpointError) as e:
        ksa_mlx.load_model(folder)
    assert refused(capsys, folder, tmp_path / "out") == f"error: {e.value}"
    assert "\n" not in str(e.value) and str(folder) in str(e.value)
    return str(e.value)


def test_what_is_ambiguous_or_missing_is_refused(tmp_path, capsys):
    folder = hub_folder(tmp_path / "two")
    stray(folder)
    assert "is in model-zz.safetensors too" in refusal(folder, capsys, tmp_path)

    folder = sharded(tmp_path / "shards")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "missing files: model-00002-of-00003" in refusal(folder, capsys, tmp_path)
    (folder / INDEX).unlink()
    assert "missing files: model-00002-of-00003" in refusal(folder, capsys, tmp_path)

    folder = hub_folder(tmp_path / "index")
    for content, words in (
        ({"weight_map": {}}, "weight_map: found none"),
        ({}, "weight_map: found none"),
        ({"weight_map": {"a": "../x.safetensors"}}, "expected a plain file name"),
        ({"weight_map": {"a": 5}}, "found '5', expected a plain file name"),
        ({"weight_map": {"a": "pytorch_model.bin"}}, "expected a plain file name"),
        ({"weight_map": {"a": "gone.safetensors"}}, "missing files: gone.safetensors"),
        ([], "found a list, expected a JSON object"),
    ):
        (folder / INDEX).write_text(json.dumps(content))
        assert words in refusal(folder, capsys, tmp_path)


def test_a_part_of_the_shards_loads_for_pipelines(tmp_path):
    """mlx-lm reads each machine's own shards, and asks without strict."""
    folder = sharded(tmp_path / "hub")
    (folder / "model-00002-of-00003.safetensors").unlink()
    model, _ = ksa_mlx.load_model(folder, lazy=True, strict=False)
    assert len(model.layers) == read_config(HYBRID)["num_hidden_layers"]


def test_weight_files_without_any(tmp_path):
    assert weight_files(tmp_path) == []


def test_paths_that_are_none(tmp_path, capsys):
    config = HYBRID / "config.json"
    assert "config.json: found a JSON file, expected" in refused(capsys, config, tmp_path / "x")
    with pytest.raises(CheckpointError, match="'': no such file or folder"):
        ksa_mlx.load_model("")
    assert convert(HYBRID, "") == 1
    assert "--mlx-path: found ''" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert convert(HYBRID, tmp_path / "file" / "x") == 1
    assert capsys.readouterr().err.endswith("file/x: cannot be created (Not a directory)\n")
    message = refused(capsys, HYBRID, tmp_path / "x", "--revision", "v1")
    assert f"revision: found 'v1' with {HYBRID}, expected a Hub id" in message
