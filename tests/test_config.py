"""`config.json`: every field checked, patterns parsed and never evaluated."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ksa_mlx.checkpoint.muse import to_hub_config
from ksa_mlx.config import ModelArgs, parse_pattern
from ksa_mlx.errors import ConfigError

from ._convert_helpers import GOLDENS, HUB, MUSE, read_config

BASE = read_config(GOLDENS / "hybrid_mix1")
MUSE_BASE = read_config(GOLDENS / "muse_bypass")


@pytest.mark.parametrize("case", HUB)
def test_golden_configs(case):
    args = ModelArgs.from_dict(read_config(GOLDENS / case))
    assert len(args.windows) == args.num_hidden_layers
    assert args.num_predicted == args.summary_token_begin == 96


def test_windows():
    args = ModelArgs.from_dict(BASE)
    # 512 chunks of 8 cover the context of 4096.
    assert args.windows == [2, 2, 2, None] and args.last_windowed == 2
    assert [args.own_kv(i) for i in range(4)] == [True, True, True, False]
    assert [args.own_q(i) for i in range(4)] == [True, True, False, False]
    covering = ModelArgs.from_dict({**BASE, "max_position_embeddings": 24})
    assert covering.windows == [None] * 4 and covering.last_windowed == -1
    assert ModelArgs.from_dict({**BASE, "max_position_embeddings": 25}).windows[0] == 2


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("([128]*3+[16768]*1)*9", ([128] * 3 + [16768]) * 9),
        ("[3]*4", [3] * 4),
        (" [1, 4, 1] ", [1, 4, 1]),
        ("2*[1]+[0]*0+[-1]", [1, 1, -1]),
        ("7", 7),
        ("(2+3)*4", 20),
    ],
)
def test_patterns(pattern, expected):
    assert parse_pattern("field", pattern) == expected


@pytest.mark.parametrize(
    "pattern",
    [
        "__import__('os').system('touch ran')",
        "[x for x in [1]]",
        "(lambda: [1])()",
        "[1]*3 if 1 else [2]",
        "[1].__class__",
        "[1][0]",
        "[[1]*3]*3",
        "[1]*[2]",
        "[1]+2",
        "[1]-[1]",
        "2**9999999",
        "9**9",
        "[1]*10**9",
        "[1]*999999999",
        "([1]*4000)*4000*4000",
        "99999999999*99999999999",
        "[True]",
        "['1']",
        "[1.5]",
        "f'{1}'",
        "",
        "[1",
        "\x00",
        "(" * 500 + "1" + ")" * 500,
        "-" * 2000 + "1",
        "1+" * 490 + "1" + " " * 5000,
        "[{**{}}]",
        "(yield)",
        "x:=1",
    ],
)
def test_hostile_patterns(pattern, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as e:
        parse_pattern("summary_sliding_chunk_num", pattern)
    message = str(e.value)
    assert message.startswith("summary_sliding_chunk_num: found ")
    assert "\n" not in message and len(message) < 300
    assert not list(tmp_path.iterdir())


@settings(max_examples=200, deadline=None)
@given(st.text("0123456789[](),+-* abe_.'\"\n", max_size=40))
def test_any_text_is_a_pattern_or_refused(text):
    try:
        value = parse_pattern("f", text)
    except ConfigError:
        return
    assert type(value) is int or all(type(v) is int for v in value)


MISSING = object()


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("summary_sliding_chunk_num", [2, 2, 2], "4 entries"),
        ("summary_sliding_chunk_num", "[2]*5", "5 entries"),
        ("summary_sliding_chunk_num", [2, -1, 2, 2], "layer 1"),
        ("summary_sliding_chunk_num", [2, 2, 2.5, 2], "layer 2"),
        ("summary_sliding_chunk_num", -3, "at least 0"),
        ("summary_sliding_chunk_num", None, "None"),
        ("summary_sliding_chunk_num", {"a": 1}, "pattern"),
        ("summary_chunk_size", 0, "at least 1"),
        ("summary_chunk_size", 8.0, "8.0"),
        ("summary_chunk_size", True, "True"),
        ("summary_token_num", 0, "at least 1"),
        ("summary_token_begin", 97, "vocab_size = 97"),
        ("summary_token_begin", 0, "summary ids"),
        ("summary_token_begin", "96", "'96'"),
        ("summary_chunk_position_ids_type", "outer", "origin"),
        ("summary_token_position_ids_type", "right", "last_chunk_slice_right"),
        ("summary_layer_freq", [1, 0, 2, 1], "layer 2"),
        ("summary_layer_freq", -1, "at least 0"),
        ("summary_independent_parameters", 1, "true or false"),
        ("mix_coeff", 1.5, "[0, 1]"),
        ("mix_coeff", MISSING, "mix_coeff"),
        ("hidden_act", "gelu", "silu"),
        ("num_attention_heads", 3, "num_key_value_heads"),
        ("num_hidden_layers", 10**9, "at most"),
        ("rope_theta", MISSING, "positive"),
        ("rms_norm_eps", float("nan"), "positive"),
        ("rope_theta", float("inf"), "positive"),
        ("rope_parameters", "yarn", "JSON object"),
        ("rope_scaling", [1], "JSON object"),
        ("rope_parameters", {"rope_theta": 5.0}, "rope_theta = "),
        ("head_dim", 31, "even"),
        *((f, MISSING, f) for f in ("hidden_size", "vocab_size", "summary_chunk_size")),
    ],
)
def test_nonsense_names_the_field(field, value, words):
    config = {**BASE, field: value}
    if value is MISSING:
        del config[field]
    with pytest.raises(ConfigError) as e:
        ModelArgs.from_dict(config)
    assert field in str(e.value) and words in str(e.value)


def test_summary_ids_outside_the_vocabulary():
    with pytest.raises(ConfigError, match="summary_token_begin: found 96, expected 2 summary ids"):
        ModelArgs.from_dict({**BASE, "summary_token_num": 2})


def test_plain_qwen3_is_not_ksa():
    config = {k: v for k, v in BASE.items() if k != "use_summary_attention"}
    with pytest.raises(ConfigError, match="plain qwen3"):
        ModelArgs.from_dict(config)


@pytest.mark.parametrize("case", MUSE)
def test_muse_configs(case):
    muse = read_config(GOLDENS / case)
    args = ModelArgs.from_dict({**to_hub_config(muse), "model_type": "qwen3_ksa"})
    assert args.vocab_size == 97 and args.mix_coeff == 1 and args.num_predicted == 96
    assert args.bypass == [[False, False, False, True], [False, True] * 2][case == MUSE[1]]


def test_muse_blend():
    """Own projections weigh 1, or 0 where turned off; in between only the user can know."""

    def mix(**fields):
        config = to_hub_config({**MUSE_BASE, **fields})
        return config["summary_independent_parameters"], config["mix_coeff"]

    assert mix() == (True, 1.0)
    assert mix(summary_independent_qkv=False) == (True, 0)
    assert mix(mix_coeff=0.25, summary_mix_qkv=True) == (True, 0.25)
    assert mix(summary_independent_parameters=False) == (False, 0)
    assert mix(summary_independent_parameters=False, summary_independent_qkv=True) == (True, 1.0)
    with pytest.raises(ConfigError, match=r"mix_coeff: found None.*step 30"):
        mix(summary_mix_qkv=True, summary_mix_end_iter=30)


@pytest.mark.parametrize(
    "field, value",
    [("k_norm", False), ("q_norm", 1), ("layer_sliding_window", "[8]*4"), ("vocab_size", 90)],
)
def test_muse_refusals(field, value):
    with pytest.raises(ConfigError, match=field):
        to_hub_config({**MUSE_BASE, field: value})


def test_muse_defaults():
    """Fields that a Muse config leaves out have Muse's defaults, not the Hub's."""
    config = to_hub_config({"model_class": "Qwen3SummaryModel", "summary_token_begin": 100})
    assert config["summary_chunk_position_ids_type"] == "inner_chunk"
    assert config["summary_token_position_ids_type"] == "zeros"
    assert config["tie_word_embeddings"] is True and config["head_dim"] == 128
