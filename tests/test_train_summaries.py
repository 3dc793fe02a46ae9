"""`lora --train-summaries`: what trains, what is saved, and who loads it."""

import json
import random
import sys

import mlx.core as mx
import mlx_lm.utils
import pytest
from mlx.utils import tree_flatten
from mlx_lm import lora

import ksa_mlx
from ksa_mlx import __main__ as commands
from ksa_mlx.stock import adapters

from ._convert_helpers import add_tokenizer, convert, hub_folder
from ._models import VARIANTS, build, tokens, worst


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Small models, and sentences that are longer than their windows."""
    place = tmp_path_factory.mktemp("summaries")
    for case in ("hybrid_mix1", "two_summaries", "qwen2_two_summaries"):
        source = hub_folder(place / f"hub {case}", case)
        add_tokenizer(source)
        assert convert(source, place / case, "--dtype", "float32") == 0
    assert (
        convert(place / "hub hybrid_mix1", place / "quantised", "-q", "--q-group-size", "32") == 0
    )
    r = random.Random(0)
    for split in ("train", "valid", "test"):
        with open(place / f"{split}.jsonl", "w") as f:
            for _ in range(4):
                words = [f"w{r.randrange(90)}" for _ in range(50)]
                f.write(json.dumps({"text": " ".join(words)}) + "\n")
    return place


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    for name in ("build_parser", "train_model"):
        monkeypatch.setattr(lora, name, getattr(lora, name))


def train(folder, model, out, *flags, iters=2, compiled=False):
    """Two steps of `python -m ksa_mlx lora`; the exit status. A compiled step takes a CPU half a
    minute to build."""
    options = f"--train --batch-size 2 --iters {iters} --val-batches 1 --learning-rate 0.01"
    paths = ["--model", folder / model, "--data", folder, "--adapter-path", out]
    if "--num-layers" not in flags:
        flags = (*flags, "--num-layers", "-1")
    if not compiled:
        mx.disable_compile()
    try:
        return commands.main(["lora", *map(str, paths), *options.split(), *map(str, flags)])
    finally:
        mx.enable_compile()


def weights_of(path, **more):
    model = mlx_lm.utils.load(str(path), **more)[0]
    return model, dict(tree_flatten(model.parameters()))


def changed(before, after):
    return {n for n in before if n in after and not mx.array_equal(before[n], after[n])}


@pytest.mark.feature(
    "Training the summary embedding, own projections and norms themselves",
    "`python -m ksa_mlx lora --train-summaries`",
    "works with our command, saved with the adapters ([training.md](training.md)); `mlx_lm.lora` "
    "unfreezes layers only",
)
@pytest.mark.parametrize(
    "case, kind",
    [
        ("two_summaries", "lora"),
        ("two_summaries", "dora"),
        ("two_summaries", "full"),
        ("qwen2_two_summaries", "lora"),
    ],
)
def test_they_train_are_saved_and_fused(case, kind, folder, tmp_path):
    out = tmp_path / "adapters"
    few = ["--num-layers", "2"] if kind == "full" else []
    flags = ["--train-summaries", "--fine-tune-type", kind, *few]
    assert train(folder, case, out, *flags, compiled=(case, kind) == ("two_summaries", "lora")) == 0
    model, before = weights_of(folder / case)
    adapted, after = weights_of(folder / case, adapter_path=str(out))
    own = {n for n in before if "summary" in n}
    assert changed(before, after) >= own and "model.summary_embedding" in own
    if kind != "full":
        assert changed(before, after) == own
        assert not any("proj_summary.l" in n for n in after)  # they have no adapters
    saved = mx.load(str(out / "adapters.safetensors"))
    assert own <= saved.keys() and all(mx.array_equal(after[n], w) for n, w in saved.items())
    text = tokens(90)
    expected = adapted(text)
    assert worst(expected, model(text)) > 1e-3
    again, _ = ksa_mlx.load(folder / case, adapter_path=str(out))
    assert mx.array_equal(again(text), expected)
    fuse = ["fuse", "--model", folder / case, "--adapter-path", out, "--save-path", tmp_path / "f"]
    assert commands.main([*map(str, fuse)]) == 0
    assert worst(weights_of(tmp_path / "f")[0](text), expected) < 1e-3


def test_without_the_flag_they_stay(folder, tmp_path):
    out = tmp_path / "adapters"
    assert train(folder, "hybrid_mix1", out) == 0
    _, before = weights_of(folder / "hybrid_mix1")
    _, after = weights_of(folder / "hybrid_mix1", adapter_path=str(out))
    assert not changed(before, after)
    saved = mx.load(str(out / "adapters.safetensors"))
    assert {n.rpartition(".")[2] for n in saved} == {"lora_a", "lora_b"}


def test_quantised_projections_get_adapters(folder, tmp_path, capsys):
    out = tmp_path / "adapters"
    assert train(folder, "quantised", out, "--train-summaries", "--num-layers", "2") == 0
    line = (
        "q_proj_summary, self_attn.v_proj_summary are quantised: they get adapters, in the last 2"
    )
    assert line in capsys.readouterr().err
    _, before = weights_of(folder / "quantised")
    _, after = weights_of(folder / "quantised", adapter_path=str(out))
    assert changed(before, after) == {"model.summary_embedding"}
    assert "model.layers.2.self_attn.k_proj_summary.lora_a" in after
    assert train(folder, "quantised", out, "--train-summaries", "--fine-tune-type", "full") == 1
    assert "k_proj_summary" in (err := capsys.readouterr().err) and "cannot train" in err


def test_a_run_that_goes_on_starts_where_the_last_one_ended(folder, tmp_path, monkeypatch):
    first = tmp_path / "first"
    assert train(folder, "hybrid_mix1", first, "--train-summaries") == 0
    saved = mx.load(str(first / "adapters.safetensors"))
    seen = {}
    monkeypatch.setattr(
        lora, "train", lambda model, **kw: seen.update(tree_flatten(model.trainable_parameters()))
    )
    resume = ["--resume-adapter-file", first / "adapters.safetensors"]
    assert train(folder, "hybrid_mix1", tmp_path / "next", "--train-summaries", *resume) == 0
    assert seen.keys() == saved.keys() and all(mx.array_equal(seen[n], saved[n]) for n in seen)


@pytest.mark.parametrize(
    "change, line",
    [
        (lambda w: w.pop("model.summary_embedding"), "missing weights: model.summary_embedding"),
        (lambda w: w.update({"model.norm.weight": mx.zeros(64)}), "does not have: model.norm"),
        (
            lambda w: w.update({"model.summary_embedding": mx.zeros((2, 64))}),
            "another shape: model.summary_embedding",
        ),
    ],
)
def test_other_weights_are_refused(change, line, folder, tmp_path, capsys):
    out = tmp_path / "adapters"
    assert train(folder, "hybrid_mix1", out, "--train-summaries", iters=1) == 0
    weights = mx.load(str(out / "adapters.safetensors"))
    change(weights)
    mx.save_safetensors(str(out / "adapters.safetensors"), weights)
    capsys.readouterr()
    argv = ["generate", "--model", folder / "hybrid_mix1", "--adapter-path", out, "--prompt", "w1"]
    assert commands.main([*map(str, argv)]) == 1
    err = capsys.readouterr().err
    assert line in err and "adapters.safetensors" in err and "Traceback" not in err


def test_a_model_whose_summaries_nobody_reads(folder, tmp_path, capsys):
    source = hub_folder(tmp_path / "hub", summary_sliding_chunk_num=512)
    add_tokenizer(source)
    assert convert(source, folder / "full") == 0
    assert train(folder, "full", tmp_path / "adapters", "--train-summaries") == 1
    assert "--train-summaries" in (err := capsys.readouterr().err) and "full: found no" in err


def test_the_trainable_set():
    model = build(**VARIANTS["own qk norms"])
    model.freeze()
    adapters.unfreeze_summaries(model)
    found = {n for n, _ in tree_flatten(model.trainable_parameters())}
    everything = {n for n, _ in tree_flatten(model.parameters())}
    assert found == {n for n in everything if "summary" in n}
    assert any("k_norm_summary" in n for n in found)


def test_mlx_lm_still_refuses_them(folder, tmp_path):
    """When this fails, mlx-lm loads other weights beside adapters: `load_adapters` may go."""
    out = tmp_path / "adapters"
    assert train(folder, "hybrid_mix1", out, "--train-summaries", iters=1) == 0
    model = mlx_lm.utils.load(str(folder / "hybrid_mix1"))[0]
    with pytest.raises(ValueError, match="not an adapter parameter"):
        adapters._load_adapters(model, str(out))


def test_the_help(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit):
        commands.main(["lora", "--help"])
    assert "--train-summaries" in capsys.readouterr().out
