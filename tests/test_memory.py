"""What is counted without computing is what caches hold, to the byte."""

import argparse

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.generate import generate_step
from mlx_lm.models import qwen3
from mlx_lm.models.cache import make_prompt_cache

from ksa_mlx.config import ModelArgs
from ksa_mlx.errors import MemoryLimitError
from ksa_mlx.memory.caches import Quantised, Sizes, arrays
from ksa_mlx.memory.room import Room, device_limit, gb, parse_size
from ksa_mlx.model import Model

from ._models import BASE, VARIANTS, build


def qwen(**overrides):
    names = set(qwen3.ModelArgs.__dataclass_fields__)
    config = {**BASE, "model_type": "qwen3", **overrides}
    return qwen3.Model(qwen3.ModelArgs(**{k: v for k, v in config.items() if k in names}))


def read(model, prompt, answer, step, quantised):
    """The caches of mlx-lm's own reading and generation, of which each token is read."""
    cache = make_prompt_cache(model)
    flags = {}
    if quantised:
        flags = {"kv_bits": quantised.bits, "kv_group_size": quantised.group_size}
        flags["quantized_kv_start"] = quantised.start
    steps = generate_step(
        mx.zeros(prompt, mx.int32), model, prompt_cache=cache, max_tokens=answer,
        prefill_step_size=step, **flags
    )  # fmt: skip
    for _ in steps:
        pass
    return cache


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(
    ("prompt", "answer", "step"), [(1, 3, 64), (7, 40, 64), (300, 5, 64), (1100, 21, 512)]
)
def test_bytes_of_our_caches(name, prompt, answer, step):
    check(build(**VARIANTS[name]), prompt, answer, step)


@pytest.mark.parametrize("answer", [0, 1, 30, 300])
@pytest.mark.parametrize("prompt", [1, 513, 640, 1001])
def test_bytes_of_mlx_lms_caches(prompt, answer):
    check(qwen(), prompt, answer, 100)


FOUR = Quantised(4, 32, 0)


@pytest.mark.parametrize(
    "quantised", [FOUR, FOUR._replace(bits=8, start=90), FOUR._replace(start=420)]
)
@pytest.mark.parametrize("make", [build, qwen])
def test_bytes_of_quantised_caches(make, quantised):
    model = make(head_dim=32, summary_sliding_chunk_num=[2, 2000, 70])
    check(model, 400, 60, 64, quantised)
    check(model, 50, 60, 64, quantised)


@pytest.mark.slow
def test_bytes_along_a_long_answer():
    check(build(summary_chunk_size=1, summary_sliding_chunk_num=[1, 2000, 40]), 30, 1100, 64)


@pytest.mark.parametrize("answer", range(5))
def test_bytes_of_caches_that_take_back(answer):
    check(build(rollback=6), 41, answer, 16)
    check(build(rollback=6, head_dim=32), 41, answer, 16, FOUR)


def check(model, prompt, answer, step, quantised=None):
    cache = read(model, prompt, answer, step, quantised)
    assert all(c.offset == prompt + answer for c in cache)
    held = Sizes(model, quantised, step).held(prompt, answer)
    assert held.now == sum(c.nbytes for c in cache)
    assert held.largest >= max(c.nbytes for c in cache) and held.most >= held.now


# The released 4B's.
LARGE = {
    "hidden_size": 2560,
    "num_hidden_layers": 36,
    "intermediate_size": 9728,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151944,
    "max_position_embeddings": 131072,
    "summary_chunk_size": 8,
    "summary_token_begin": 151936,
    "summary_sliding_chunk_num": "([128]*3+[16768]*1)*9",
    "mix_coeff": 0,
}


def test_conversations_of_the_4b_in_16_gb():
    """docs/server.md's table, of models that nobody computes."""
    ours, plain = Model(ModelArgs.from_dict({**BASE, **LARGE})), qwen(**LARGE)
    for model in ours, plain:
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, 64, 4)
    weights = sum(x.nbytes for x in arrays(ours.parameters()))
    assert weights == pytest.approx(2.26e9, rel=0.01)
    fit = []
    for model, bits in ((ours, None), (ours, 8), (ours, 4), (plain, None), (plain, 4)):
        held = Sizes(model, Quantised(bits) if bits else None).held(32768, 512)
        fit.append((round(held.now / 1e9, 2), (16 * 10**9 - weights) // held.now))
    assert fit == [(1.8, 7), (0.95, 14), (0.5, 27), (4.91, 2), (1.38, 9)]


SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_attention_heads": 8,
    "head_dim": 32,
    "summary_chunk_size": 8,
    "summary_sliding_chunk_num": [32, 2000, 32],
}


@pytest.mark.parametrize("quantised", [None, Quantised(4, 32, 500)])
@pytest.mark.parametrize("make", [build, qwen])
@pytest.mark.skipif(mx.default_device() != mx.cpu, reason="scores are not held on a GPU")
def test_what_a_step_holds(make, quantised):
    """The whole need is not less than the peak, and not much more."""
    model, step = make(**SHAPE), 512
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    read(model, 2048, 1, step, quantised)
    peak = mx.get_peak_memory() - before
    need = Room([model], None, quantised, step).need((2048, 1))
    assert need.weights <= before
    assert peak <= need.total - need.weights <= 1.6 * peak


def test_a_prompt_that_does_not_fit():
    model = build(**SHAPE)
    need = Room([model], 1).need((2048, 100))
    assert str(need).startswith(f"{need.total / 1e6:.2f} MB (weights ")
    Room([model], need.total).check("prompt", (2048, 100))
    room = Room([model], need.total - 1)
    with pytest.raises(MemoryLimitError) as e:
        room.check("prompt", (2048, 100))
    says = str(e.value)
    assert says.startswith("prompt: 2,048 tokens and 100 of an answer need ")
    assert f"there are {gb(need.total - 1)} (--memory-limit)" in says
    # What it names fits, and one token more does not.
    tokens = int(says.split("at most ")[1].split(" tokens")[0].replace(",", ""))
    room.check("prompt", (tokens, 100))
    with pytest.raises(MemoryLimitError):
        room.check("prompt", (tokens + 1, 100))


def test_bits_and_fewer_clients_are_named():
    model = build(**{**SHAPE, "num_key_value_heads": 8, "head_dim": 64})
    one, four = (4000, 1), [(4000, 1)] * 3
    plain = Room([model], 1, step=16)
    need = plain.need(one, four)
    assert need.others >= 3 * need.caches > 3e6
    room = Room([model], need.total - 1, step=16)
    room.check("prompt", one)
    with pytest.raises(
        MemoryLimitError, match=r"other requests .*the same without 3 other requests"
    ):
        room.check("prompt", one, four)
    with pytest.raises(MemoryLimitError, match=r"what fits: .*--kv-bits 8"):
        Room([model], plain.need((30000, 1)).total - 1, step=16).check("prompt", (30000, 1))
    with pytest.raises(MemoryLimitError, match="what fits: nothing does with this model"):
        Room([model], 1000).check("prompt", (1, 1))


def test_a_batch_pads_full_layers_to_its_longest():
    model = build(**SHAPE)
    room = Room([model], 1)
    short, long = room.held(10, 10), room.held(3000, 10)
    need = room.need((10, 10), [(3000, 10)])
    expected = short.most - short.padded + long.most - long.padded + 2 * long.padded
    assert need.caches + need.others == expected


def test_sizes():
    for text, size in {"20GB": 20e9, "1.5g": 1.5e9, "300 MB": 3e8, "7": 7, "2K": 2000}.items():
        assert parse_size(text) == size
    for text in ("", "GB", "1GiB", "-1", "1e9", "nan"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected a size such as 20GB"):
            parse_size(text)
    limit, source = device_limit()
    assert limit > 2**28 and source
