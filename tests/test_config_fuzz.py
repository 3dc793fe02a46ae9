"""Mutated configs of the goldens: each loads to the right logits, or is refused in one line.

A field that the model does not read changes nothing; one that it reads gives what the definition
gives for the same arguments. Nothing else: no traceback, no silent difference.
"""

import copy
import json
import os
import random

import mlx.core as mx
import pytest

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.convert import convert
from ksa_mlx.errors import KSAError

from ._convert_helpers import GOLDENS, HUB, WEIGHTS, read_config
from ._models import worst

IDS = mx.arange(45)[None] * 7 % 96
JUNK = (None, True, False, 0, 1, 2, -1, 3, 8, 97, 10**9, 10**30, 0.5, 1.5, -0.0, 1e-6, 1e300)
JUNK += (
    float("nan"),
    float("inf"),
    "",
    "x",
    "8",
    "true",
    "[1]*4",
    "([2]*3+[512]*1)*1",
    "\n",
    "silu",
)
JUNK += ([], [1, 0, 1, 1], [2, 2, 2, 512], [[1]], ["x"], [None], {}, {"a": 1}, "__import__('os')")
# Fields of other configs, of transformers' and of ours, that might find their way in.
OTHER = {
    "partial_rotary_factor": (0.5, 1.0),
    "original_max_position_embeddings": (1024, "x"),
    "rope_parameters": ({"rope_type": "yarn", "factor": 4.0}, {"rope_theta": 5.0}, {}, [], "x"),
    "rope_scaling": ({"type": "linear", "factor": 2.0}, {"rope_type": "dynamic", "factor": 2.0}),
    "layer_types": (["full_attention"] * 4, ["sliding_attention"] * 4),
    "summary_layer_freq": (0, 1, 2, [1, 0, 1, 1], "[1]*4", -1),
    "summary_independent_qk_norm": (True, False),
    "quantization": ({"group_size": 64, "bits": 4}, {"bits": 4}, {}),
    "quantization_config": ({"quant_method": "fp8"}, {}, None),
    "model_file": ("ksa_model.py", "evil.py"),
    "model_type": ("qwen3_ksa", "llama", "qwen3"),
    "rollback": (0, 4, -1, "x"),
    "dtype": ("float16", "int8", None),
    "num_experts": (8,),
    "sliding_window": (4096,),
    "embed_dim": (64,),
    "quantize_activations": (True,),
    "text_config": ({"hidden_size": 3},),
}


def mutated(config, pick):
    """A copy with one to three fields changed, and the names of those."""
    config, names = copy.deepcopy(config), set()
    for _ in range(pick.choice([1, 1, 1, 2, 3])):
        name = pick.choice([*config, *OTHER])
        names.add(name)
        way = pick.random()
        if way < 0.15:
            config.pop(name, None)
        elif name in OTHER and way < 0.6:
            config[name] = pick.choice(OTHER[name])
        elif way < 0.3:
            config[name] = config[pick.choice(list(config))]
        elif type(config.get(name)) is int and way < 0.55:
            config[name] += pick.choice([-1, 1, config[name], -config[name] // 2])
        elif isinstance(config.get(name), str) and way < 0.45:
            text = list(config[name])
            for _ in range(pick.randint(1, 3)):
                text[pick.randrange(len(text) + 1) : 0] = pick.choice("0123456789[](),+*- ax")
            config[name] = "".join(text)
        else:
            config[name] = pick.choice(JUNK)
    return config, names


@pytest.fixture(scope="module")
def goldens(tmp_path_factory):
    """For each case: its config, its logits, and a folder that has its weights."""
    folder, cases = tmp_path_factory.mktemp("fuzz"), {}
    for case in HUB:
        (folder / case).mkdir()
        os.symlink(GOLDENS / case / WEIGHTS, folder / case / WEIGHTS)
        model, _ = ksa_mlx.load_model(GOLDENS / case)
        cases[case] = read_config(GOLDENS / case), model.args, model(IDS), folder / case
    return cases


def read_fields(args):
    return {k: v for k, v in vars(args).items() if k not in ("model_type", "rollback")}


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_mutated_configs(seed, goldens):
    pick, loaded, refused = random.Random(seed), 0, 0
    for number in range(200):
        config, args, expected, folder = goldens[pick.choice(HUB)]
        config, names = mutated(config, pick)
        (folder / "config.json").write_text(json.dumps(config))
        what = f"seed {seed}, number {number}: { ({n: config.get(n) for n in names}) }"
        try:
            model, _ = ksa_mlx.load_model(folder)
        except KSAError as e:
            assert "\n" not in str(e) and str(folder) in str(e) and len(str(e)) < 600, what
            refused += 1
            continue
        loaded += 1
        logits = model(IDS)
        if read_fields(model.args) == read_fields(args):
            assert mx.array_equal(logits, expected), what
        else:
            assert worst(logits, naive.forward(model, IDS)) < 1e-3, what
        if number % 20 == 0:  # the converter's view of it
            out = folder.with_name(f"{folder.name}-{seed}-{number}")
            if config.get("model_type") == "qwen3_ksa":
                continue
            convert(str(folder), str(out), dtype="float32")
            assert worst(ksa_mlx.load_model(out)[0](IDS), logits) < 1e-4, what
    assert loaded > 20 and refused > 20
