"""Checkpoints that need PyTorch: pickles and folders of Kuaishou's Muse, honest and hostile."""

import json
import pickle
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file

import ksa_mlx

from ._convert_helpers import GOLDENS, WEIGHTS, convert, read_config, refused
from .test_convert import assert_prefill, same_weights

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
pytest.importorskip("torch.distributed.checkpoint")

HYBRID, MUSE = GOLDENS / "hybrid_mix1", GOLDENS / "muse_bypass"


class Touch:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def state_dict(file, dtype=torch.float32):
    return {n: torch.from_numpy(w).to(dtype) for n, w in load_file(file).items()}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "hub").mkdir()
    shutil.copy(HYBRID / "config.json", tmp_path / "hub")
    return tmp_path / "hub"


@pytest.mark.parametrize("legacy", [False, True])
def test_pytorch_model(legacy, folder, tmp_path):
    state = state_dict(HYBRID / WEIGHTS)
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    assert convert(folder, tmp_path / "mlx") == 0
    assert convert(HYBRID, tmp_path / "same") == 0
    assert same_weights(tmp_path / "mlx", tmp_path / "same")
    with pytest.raises(ValueError, match=r"convert it first: python convert\.py"):
        ksa_mlx.load_model(folder)


def test_bfloat16_shards(folder, tmp_path):
    state, weight_map = state_dict(HYBRID / WEIGHTS, torch.bfloat16), {}
    for i in (1, 2):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        part = dict(list(state.items())[i - 1 :: 2])
        torch.save(part, folder / name)
        weight_map.update(dict.fromkeys(part, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert convert(folder, tmp_path / "mlx", "--dtype", "bfloat16") == 0
    assert convert(HYBRID, tmp_path / "same", "--dtype", "bfloat16") == 0
    assert same_weights(tmp_path / "mlx", tmp_path / "same")


def test_hostile_pickle(folder, tmp_path, capsys):
    for legacy in (False, True):
        state = {"model.norm.weight": Touch(tmp_path / "ran")}
        file = folder / "pytorch_model.bin"
        torch.save(state, file, _use_new_zipfile_serialization=not legacy)
        message = refused(capsys, folder, tmp_path / "mlx")
        assert "pytorch_model.bin: this pickle asks for" in message and "open" in message
        assert not (tmp_path / "ran").exists()


def test_bad_pickles(folder, tmp_path, capsys):
    file = folder / "pytorch_model.bin"
    torch.save(state_dict(HYBRID / WEIGHTS), file)
    whole = file.read_bytes()
    for content in (whole[:-1000], b"", b"garbage" * 100):
        file.write_bytes(content)
        assert "pytorch_model.bin: " in refused(capsys, folder, tmp_path / "mlx")
    for state in ([1], {"model.norm.weight": 3}, {"a": torch.eye(3).to_sparse()}):
        torch.save(state, file)
        assert "pytorch_model.bin: " in refused(capsys, folder, tmp_path / "mlx")
    state = state_dict(HYBRID / WEIGHTS)
    state["model.norm.weight"][3] = float("nan")
    torch.save(state, file)
    assert "model.norm.weight: found NaN" in refused(capsys, folder, tmp_path / "mlx")


def test_without_torch(folder, tmp_path, capsys, monkeypatch):
    torch.save(state_dict(HYBRID / WEIGHTS), folder / "pytorch_model.bin")
    monkeypatch.setitem(__import__("sys").modules, "torch", None)
    for source in (folder, MUSE / "dcp"):
        message = refused(capsys, source, tmp_path / "mlx")
        assert "pip install -e '.[torch]'" in message


def dcp_folder(folder, state):
    torch.distributed.checkpoint.save(state, checkpoint_id=folder, no_dist=True)
    return folder


def test_golden_dcp_folder(tmp_path):
    assert convert(MUSE / "dcp", tmp_path / "mlx") == 0
    assert_prefill(ksa_mlx.load_model(tmp_path / "mlx")[0], "muse_bypass")
    assert convert(MUSE, tmp_path / "safetensors") == 0
    assert same_weights(tmp_path / "mlx", tmp_path / "safetensors")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_dcp_folder_beside_its_config_and_an_optimizer(tmp_path):
    """A training run's folder: bfloat16, other state beside the model's, config in the folder."""
    state = state_dict(MUSE / "model_muse.safetensors", torch.bfloat16)
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(MUSE / "config.json", run)
    other = {"step": 12, "moments": torch.ones(3), "groups": [{"lr": 0.1}]}
    dcp_folder(run / "global_step12", {"app": {"model": state, "optimizer": other}})
    assert convert(run, tmp_path / "mlx") == 0
    assert convert(MUSE, tmp_path / "same", "--dtype", "bfloat16") == 0
    assert same_weights(tmp_path / "mlx", tmp_path / "same")


@pytest.mark.parametrize("nested", [False, True])
def test_muse_state_dict(nested, tmp_path):
    source = tmp_path / "muse"
    source.mkdir()
    state = state_dict(GOLDENS / "muse_bypass_mid" / "model_muse.safetensors")
    torch.save({"app": {"model": state}} if nested else state, source / "state.pt")
    shutil.copy(GOLDENS / "muse_bypass_mid" / "config.json", source)
    for path in (source, source / "state.pt"):
        assert convert(path, tmp_path / f"mlx{path.suffix}") == 0
        model, _ = ksa_mlx.load_model(tmp_path / f"mlx{path.suffix}")
        assert_prefill(model, "muse_bypass_mid")


def test_muse_biases_shared_embedding_and_norms(tmp_path):
    """Muse's k_proj alone may have a bias, and its summary rows may be the embedding's."""
    source = tmp_path / "muse"
    source.mkdir()
    state = state_dict(MUSE / "model_muse.safetensors")
    fields = {"k_proj_bias": True, "summary_independent_parameters": False, "vocab_size": 98}
    fields.update(summary_independent_qkv=True, summary_independent_attention_layernorm=True)
    state["model.tok_embeddings.weight"] = torch.randn(98, 64)
    state["model.tok_embeddings.weight"][97] = 0  # padding behind the summary's row
    state["model.output.weight"] = torch.randn(98, 64)
    del state["summary_embedding.weight"]
    for layer in range(4):
        for end in ("", "_summary")[: 2 - layer // 3]:
            state[f"model.layers.{layer}.attn.k_proj{end}.bias"] = torch.randn(64)
        if layer < 3:
            state[f"model.layers.{layer}.sa_norm_summary.scale"] = torch.rand(64)
    torch.save(state, source / "state.pt")
    config = {**read_config(MUSE), **fields}
    (source / "config.json").write_text(json.dumps(config))
    assert convert(source, tmp_path / "mlx") == 0
    model, _ = ksa_mlx.load_model(tmp_path / "mlx")
    attention = model.layers[1].self_attn
    assert "bias" not in attention.o_proj and not attention.q_proj_summary.bias.any()
    theirs = state["model.layers.1.attn.k_proj_summary.bias"].numpy()
    assert np.array_equal(np.array(attention.k_proj_summary.bias), theirs)
    rows = state["model.tok_embeddings.weight"][96:97].numpy()
    assert np.array_equal(np.array(model.model.summary_embedding), rows)
    theirs = state["model.layers.2.sa_norm_summary.scale"].numpy()
    assert np.array_equal(np.array(model.layers[2].input_layernorm_summary.weight), theirs)


def test_hostile_metadata(tmp_path, capsys):
    source = tmp_path / "dcp"
    shutil.copytree(MUSE / "dcp", source)
    shutil.copy(MUSE / "config.json", source)
    honest = (source / ".metadata").read_bytes()

    class Getattr:
        def __reduce__(self):
            return getattr, (object, "__subclasses__")

    for thing in (Touch(tmp_path / "ran"), Getattr(), torch.load, torch.hub.load):
        metadata = pickle.loads(honest)
        metadata.planner_data = thing
        (source / ".metadata").write_bytes(pickle.dumps(metadata))
        message = refused(capsys, source, tmp_path / "mlx")
        assert ".metadata: not the metadata" in message and "this pickle asks for" in message
    assert not (tmp_path / "ran").exists()

    metadata = pickle.loads(honest)
    for info in metadata.storage_data.values():
        info.relative_path = "../../elsewhere"
    (source / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "expected a plain file name" in refused(capsys, source, tmp_path / "mlx")
    for content in (honest[:-200], b"", b"garbage", pickle.dumps([1])):
        (source / ".metadata").write_bytes(content)
        assert ".metadata: not the metadata" in refused(capsys, source, tmp_path / "mlx")


def test_bad_dcp_data(tmp_path, capsys):
    source = tmp_path / "dcp"
    shutil.copytree(MUSE / "dcp", source)
    shutil.copy(MUSE / "config.json", source)
    data, metadata = source / "__0_0.distcp", (source / ".metadata").read_bytes()
    whole = data.read_bytes()
    data.write_bytes(whole[: len(whole) // 2])
    assert "not readable" in refused(capsys, source, tmp_path / "mlx")
    data.unlink()
    assert "__0_0.distcp" in refused(capsys, source, tmp_path / "mlx")

    # A tensor with a hole: a chunk that the metadata leaves out is NaN, not old memory.
    data.write_bytes(whole)
    changed = pickle.loads(metadata)
    name = "app.model.model.norm.scale"
    chunk = changed.state_dict_metadata[name].chunks[0]
    chunk.sizes = torch.Size([32])
    (source / ".metadata").write_bytes(pickle.dumps(changed))
    assert "model.norm.scale: found NaN" in refused(capsys, source, tmp_path / "mlx")

    # Data that runs code: read as weights only.
    changed = pickle.loads(metadata)
    torch.save(Touch(tmp_path / "ran"), source / "evil.distcp")
    for info in changed.storage_data.values():
        info.relative_path, info.offset = "evil.distcp", 0
        info.length = (source / "evil.distcp").stat().st_size
    (source / ".metadata").write_bytes(pickle.dumps(changed))
    assert "not readable" in refused(capsys, source, tmp_path / "mlx")
    assert not (tmp_path / "ran").exists()
