"""What loading a model finds out on a Mac: MLX's own attention, and the arms of plain caches."""

import warnings
from types import SimpleNamespace
from typing import NamedTuple

import mlx.core as mx
import pytest

from ksa_mlx import naive
from ksa_mlx.attention import choice, decode, metal, prefill, record, trial, tune
from ksa_mlx.cache.make import make_cache
from ksa_mlx.checkpoint import load
from ksa_mlx.errors import KSAError

from . import metal_cpu
from ._models import build, tokens, worst
from .test_choice import TRIAL, arms, clock, restart  # noqa: F401  (clock is a fixture)


class Shape(NamedTuple):
    """What `prepare` asks a layer for."""

    n_heads: int = 4
    n_kv_heads: int = 2
    head_dim: int = 64


@pytest.fixture
def mac(clock, monkeypatch):  # noqa: F811
    """Loads a model of layers with these windows; MLX's attention is looked at on few keys."""
    monkeypatch.setattr(tune, "LENGTHS", (16, 64))
    monkeypatch.setattr(metal, "wanted", lambda: "auto")
    ways = arms(clock, 1.0, kernel=0.5)
    for module, name in ((decode, "DECODE"), (prefill, "PREFILL")):
        monkeypatch.setattr(module, "ARMS", ways)
        monkeypatch.setattr(module, name, TRIAL)

    def load(*windows, dtype=mx.float16, **shape):
        norm = SimpleNamespace(weight=mx.ones(1, dtype))
        layer = SimpleNamespace(self_attn=Shape(**shape), input_layernorm=norm)
        model = SimpleNamespace(windows=list(windows))
        tune.prepare(SimpleNamespace(layers=[layer] * len(windows), model=model))
        return sorted((key.kernel, key.keys, name) for key, name in choice.choices())

    return load


def test_at_load_plain_caches_are_tried(mac, clock):  # noqa: F811
    assert mac(128, 128, None) == [("decode", 1024, "kernel"), ("prefill", 4096, "kernel")]
    assert record.here().find("attention", "attention, float16, head_dim 64, 2 KV heads of 2, "
                                           "rows 1, plain, keys 0").keys() == {"16", "64"}  # fmt: skip
    count = len(clock.calls)
    mac(128, 128, None)
    assert len(clock.calls) == count, "once"


@pytest.mark.parametrize("kernels", [None, "metal"])
def test_forced_ways_are_not_timed(mac, monkeypatch, kernels):
    monkeypatch.setattr(metal, "wanted", lambda: kernels)
    assert mac(128, None) == [] and record.here().find("attention", "x") is None
    assert record.here()._found["attention"], "MLX's attention is looked at all the same"


def test_without_windows_nothing_is_timed(mac):
    assert mac(None, None) == []


def test_without_metal_nothing_is_done(mac, monkeypatch):
    monkeypatch.setattr(choice, "can_time", lambda: False)
    assert mac(128, None) == [] and not record.here()._found


@pytest.mark.parametrize("fault", ["wrong", "none"])
def test_wrong_attention_of_mlx_is_named(mac, monkeypatch, tmp_path, fault):
    """mlx#4022: garbage from 1,024 keys on, on one machine. Said in each process."""
    attention = mx.fast.scaled_dot_product_attention

    def garbage(queries, keys, values, **rest):
        if fault == "none":
            raise RuntimeError("[metal] no kernel")
        return attention(queries, keys, values, **rest) + 9 * (keys.shape[2] >= 64)

    file = tmp_path / "kernels.json"
    restart(monkeypatch, file)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", garbage)
    what = "no kernel at 16 keys" if fault == "none" else "is off by .* at 64 keys"
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match=f"{what}.*mlx/issues/4022"):
            mac(None)
        restart(monkeypatch, file)
        monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", attention)


def test_right_attention_of_mlx_says_nothing(mac):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mac(None, 3, dtype=mx.bfloat16)


def test_loading_prepares(tmp_path, monkeypatch, notebook_models):
    prepared = []
    monkeypatch.setattr(load, "prepare", prepared.append)
    model, _ = load.load_model(notebook_models[0])
    assert prepared == [model]
    load.load_model(notebook_models[0], lazy=True)
    assert len(prepared) == 1, "not what stays on disk"


def test_a_nonsense_choice_is_refused_at_load(monkeypatch, notebook_models):
    monkeypatch.setenv("KSA_MLX_KERNELS", "fast")
    with pytest.raises(KSAError) as refused:
        load.load_model(notebook_models[0])
    assert str(refused.value) == (
        "KSA_MLX_KERNELS: found 'fast', expected auto, metal, ops or retune"
    )


@pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))
def test_the_very_kernels_are_tried(monkeypatch):
    """In the instrument, as a GPU: all arms of a model are compared and timed, and it runs on."""
    model, text = build(head_dim=32, summary_sliding_chunk_num=[2, 2000, 2]), tokens(40)
    exact = naive.forward(model, text)
    known = record.Record(None, "here")
    monkeypatch.setattr(record, "here", lambda: known)
    monkeypatch.setattr(tune, "LENGTHS", (64,))
    short = choice.Trial(trial.DECODE.make, checked=(61, 300), timed=(64, 128))
    monkeypatch.setattr(decode, "DECODE", short)
    monkeypatch.setattr(prefill, "ROWS", 32)
    monkeypatch.setattr(prefill, "KEYS", 64)
    once = choice.Trial(trial.PREFILL.make, checked=(61,), timed=(64,))
    monkeypatch.setattr(prefill, "PREFILL", once)
    with metal_cpu.running(reload=[metal, choice], check=False) as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(choice, "can_time", lambda: True)
        monkeypatch.setattr(choice, "CHAIN_BYTES", 1)
        monkeypatch.setattr(choice, "TURNS", 1)
        tune.prepare(model)
        kernels, launches = {key.kernel for key, _ in choice.choices()}, len(log.launches)
        assert kernels == {"decode", "prefill"} and launches > 8
        assert set(known._found) == {"attention", "difference", "milliseconds"}
        # Whatever won, it takes the model's own caches, and nothing is tried again.
        cache = make_cache(model)
        got = [model(text[:, :30], cache=cache)]
        got += [model(text[:, i : i + 1], cache=cache) for i in range(30, 40)]
        assert worst(mx.concatenate(got, axis=1), exact) <= 1e-3
        assert {key.rows for key, _ in choice.choices()} == {1, 32}
