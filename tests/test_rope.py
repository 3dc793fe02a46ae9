"""RoPE settings compute what transformers computes from the same config, or are refused by name."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.rope_utils import initialize_rope

from ksa_mlx.config import ModelArgs
from ksa_mlx.errors import ConfigError

from ._models import BASE

torch = pytest.importorskip("torch", reason="the torch extra is not installed")
from transformers import Qwen3Config  # noqa: E402
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS  # noqa: E402
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding  # noqa: E402

DIM, CONTEXT = 64, 131072
POSITIONS = (0, 1, 60, 1000, 4000)
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LONG = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32}
LENGTH = {"original_max_position_embeddings": 32768}

ACCEPTED = {
    "none": None,
    "empty": {},
    "default": {"rope_type": "default"},
    "default, in older words": {"type": "default", "partial_rotary_factor": 1.0},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "both names": {"type": "linear", "rope_type": "linear", "factor": 4},
    "llama3": {"rope_type": "llama3", **LLAMA3, **LENGTH},
    "llama3, no original length": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **LENGTH},
    "yarn, no original length": {"rope_type": "yarn", "factor": 4.0},
    "yarn, attention_factor 1": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0},
    "yarn, attention_factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.3},
    "yarn, mscale alone": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7},
    "yarn, mscale_all_dim alone": {"rope_type": "yarn", "factor": 4.0, "mscale_all_dim": 1.0},
    "yarn, both": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "mscale_all_dim": 1.0},
    "yarn, betas": {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, **LENGTH},
    "yarn, truncate": {"rope_type": "yarn", "factor": 4.0, "truncate": True, "beta_fast": None},
    "yarn that shrinks": {"rope_type": "yarn", "factor": 0.5},
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25},
    "proportional, odd": {"rope_type": "proportional", "partial_rotary_factor": 0.35},
    "proportional, scaled": {"rope_type": "proportional", "factor": 2.0},
}
REFUSED = {
    "truncate": {"rope_type": "yarn", "factor": 4.0, "truncate": False},
    "factor": {"rope_type": "linear"},
    "low_freq_factor": {"rope_type": "llama3", "factor": 2.0, "high_freq_factor": 4.0},
    "high_freq_factor": {"rope_type": "llama3", **LLAMA3, "high_freq_factor": 0.5},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "longrope": {"rope_type": "longrope", **LONG, **LENGTH},
    "mrope": {"type": "mrope", "mrope_section": [8, 12, 12]},
    "mrope_section": {"type": "default", "mrope_section": [8, 12, 12]},
    "su": {"type": "su", **LONG},
    "axial": {"rope_type": "axial"},
    "partial_rotary_factor": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5},
    "attention_factor": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 2.0},
    "beta_fast": {"rope_type": "yarn", "factor": 4.0, "beta_fast": "32"},
    "full_attention": {"full_attention": {"rope_type": "yarn", "factor": 4.0}},
    "rope_scaling.type": {"rope_type": "yarn", "type": "linear", "factor": 4.0},
    "mystery": {"rope_type": "yarn", "factor": 4.0, "mystery": 3},
}


def args_of(scaling, theta=5e6, **fields):
    config = {**BASE, "head_dim": DIM, "max_position_embeddings": CONTEXT, "rope_theta": theta}
    return ModelArgs.from_dict({**config, "rope_scaling": scaling, **fields})


def ours(args):
    """Cosines and sines of the frequencies, (positions, DIM / 2) each: unit vectors, rotated."""
    rope = initialize_rope(
        args.head_dim, args.rope_theta, False, args.rope_scaling, args.max_position_embeddings
    )
    x = mx.concatenate([mx.ones(DIM // 2), mx.zeros(DIM // 2)]).reshape(1, 1, 1, DIM)
    rows = np.array([np.array(rope(x, offset=p)).reshape(-1) for p in POSITIONS])
    return rows[:, : DIM // 2], rows[:, DIM // 2 :]


def theirs(theta=5e6, **fields):
    config = Qwen3Config(
        head_dim=DIM, max_position_embeddings=CONTEXT, rope_theta=theta, hidden_size=256, **fields
    )
    rope = Qwen3RotaryEmbedding(config)
    cos, sin = rope(torch.zeros(1), torch.tensor([POSITIONS]))
    return cos[0, :, : DIM // 2].numpy(), sin[0, :, : DIM // 2].numpy()


def assert_same(mine, reference):
    for a, b in zip(mine, reference, strict=True):
        # Single precision of an angle, which a factor of 0.1 makes ten times the position.
        assert np.abs(a - b).max() < 4e-3 * max(1, np.abs(b).max())


@pytest.mark.parametrize("name", ACCEPTED)
@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters"])
def test_as_transformers(name, field):
    scaling = ACCEPTED[name]
    args = args_of(None, **{field: scaling})
    copy = None if scaling is None else dict(scaling)
    assert_same(ours(args), theirs(rope_scaling=copy))
    # The settings stand for themselves when they are read again.
    assert args_of(args.rope_scaling).rope_scaling == args.rope_scaling


@pytest.mark.parametrize("word", REFUSED)
def test_refused_by_name(word):
    with pytest.raises(ConfigError) as e:
        args_of(REFUSED[word])
    message = str(e.value)
    assert message.startswith("rope_scaling.") and word in message and "\n" not in message


def test_every_type_is_here():
    kinds = {s.get("rope_type", s.get("type")) for s in (ACCEPTED | REFUSED).values() if s}
    assert ROPE_INIT_FUNCTIONS.keys() <= kinds


def test_fields_beside():
    """What older configs say at their top level, as transformers reads it."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    beside = {"original_max_position_embeddings": 4096}
    assert_same(ours(args_of(scaling, **beside)), theirs(rope_scaling=dict(scaling), **beside))
    scaling, beside = {"rope_type": "proportional"}, {"partial_rotary_factor": 0.5}
    assert_same(ours(args_of(scaling, **beside)), theirs(rope_scaling=dict(scaling), **beside))
    with pytest.raises(ConfigError, match="partial_rotary_factor"):
        args_of(None, partial_rotary_factor=0.5)
    with pytest.raises(ConfigError, match=r"rope_parameters: .*what rope_scaling says"):
        args_of(
            {"rope_type": "linear", "factor": 2.0},
            rope_parameters={"rope_type": "yarn", "factor": 2.0},
        )
    theta = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
    with pytest.raises(ConfigError, match=r"rope_scaling\.rope_theta: found 7.0"):
        args_of(theta)


NUMBERS = st.floats(0.1, 64).map(lambda x: round(x, 2))
ANY = st.one_of(NUMBERS, st.none(), st.booleans(), st.sampled_from([0, 1, 32, -2, "32"]))
SOME = st.one_of(NUMBERS, NUMBERS, NUMBERS, ANY)
KEYS = ("factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")
KEYS += ("mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor")
KEYS += ("partial_rotary_factor",)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(["yarn", "llama3", "linear", "proportional", "default"]),
    st.dictionaries(st.sampled_from(KEYS), SOME, max_size=5),
    st.sampled_from([None, 64, 4096, 70000]),
)
def test_any_settings(kind, scaling, length):
    scaling = {"rope_type": kind, **scaling}
    if kind == "llama3":
        scaling = {**LLAMA3, **scaling}
    if kind in ("yarn", "llama3") and length:
        scaling["original_max_position_embeddings"] = length
    try:
        args = args_of(scaling)
    except ConfigError as e:
        assert str(e).startswith("rope_scaling") and "\n" not in str(e)
        return
    assert_same(
        ours(args), theirs(rope_scaling={k: v for k, v in scaling.items() if v is not None})
    )
