"""What the model computes, and how much work it does for it."""

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3
from mlx_lm.models.cache import KVCache, QuantizedKVCache, trim_prompt_cache

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.attention.plan import CHUNKS, Step
from ksa_mlx.cache.storage import segments_of

from ._models import VARIANTS, build, tokens, worst


def plain_qwen3(model):
    """mlx-lm's Qwen3 with the text weights of a KSA model."""
    args = model.args
    names = [k for k in qwen3.ModelArgs.__dataclass_fields__ if hasattr(args, k)]
    full = qwen3.Model(
        qwen3.ModelArgs(
            **{**{k: getattr(args, k) for k in names}, "vocab_size": args.summary_token_begin}
        )
    )
    weights = [(k, w) for k, w in tree_flatten(model.parameters()) if "summary" not in k]
    full.load_weights(weights)
    return full


def rows_by_step(model, lengths):
    """Feed texts of these lengths; the summary rows that each call ran."""
    cache, rows = model.make_cache(), []
    for n in lengths:
        windowed = cache[model.args.last_windowed]
        before = windowed.place.summarised
        model(tokens(n), cache=cache)
        rows.append((windowed.place.summarised - before) * model.args.summary_token_num)
    return rows


@pytest.mark.parametrize("windows", ["[2000]*3", [40, 2000, 40]])
def test_equals_qwen3_within_the_window(windows):
    model = build(summary_sliding_chunk_num=windows, mix_coeff=0)
    full = plain_qwen3(model)
    text = tokens(160, 2)
    assert worst(model(text), full(text)) <= 1e-4
    ours, theirs = model.make_cache(), [KVCache() for _ in full.layers]
    for a, b in ((0, 100), (100, 101), (101, 108), (108, 160)):
        part = text[:, a:b]
        assert worst(model(part, cache=ours), full(part, cache=theirs)) <= 1e-4


def test_a_window_over_the_context_keeps_text_only():
    model = build(summary_sliding_chunk_num=[2, 1023, 1022])
    kinds = [type(c) for c in model.make_cache()]
    assert kinds == [ksa_mlx.RollingSummaryCache, KVCache, ksa_mlx.RollingSummaryCache]


def test_summaries_are_late_and_in_batches():
    k, W = 4, 40
    model = build(summary_sliding_chunk_num=W, summary_chunk_size=k, mix_coeff=0)
    # Token by token, no summary row while the window holds the text; then CHUNKS at a time.
    rows = rows_by_step(model, [1] * ((W + 1) * k + 3 * CHUNKS * k + 1))
    assert sum(rows[: (W + 1) * k]) == 0
    due = [i for i, r in enumerate(rows) if r]
    assert due == [(W + 1) * k + i * CHUNKS * k for i in range(4)]
    assert {rows[i] for i in due} == {CHUNKS}
    # Without a cache exactly those that are read; with one, filled up to a batch.
    assert Step.plan(model.args, 0, (W + 1) * k + 1, 0, cached=False).chunks == 1
    for n, rows in (((W + 1) * k, 0), ((W + 1) * k + 1, CHUNKS), (500, 499 // k - W)):
        assert rows_by_step(model, [n]) == [rows]


@pytest.mark.parametrize("window", [0, 1, 3])
def test_small_windows_batch_as_much_as_they_hold(window):
    model = build(summary_sliding_chunk_num=window)
    assert max(rows_by_step(model, [1] * 60)) == window + 1


def test_summary_rows_stop_where_nobody_reads_them():
    """The last windowed layer computes no summary queries, later layers no summary rows."""
    model = build(summary_sliding_chunk_num=[1, 1, 2000])
    seen = []

    class Watch(nn.Module):
        def __init__(self, inner, name):
            super().__init__()
            self.inner, self.name = inner, name

        def __call__(self, x):
            seen.append((self.name, x.shape[1]))
            return self.inner(x)

    for i, layer in enumerate(model.layers):
        layer.self_attn.q_proj = Watch(layer.self_attn.q_proj, f"q{i}")
        layer.mlp = Watch(layer.mlp, f"mlp{i}")
    model(tokens(40), cache=model.make_cache())
    rows = 8  # chunks 0 .. 7: the last query is in chunk 9 and reads 8 and 9 as text
    assert dict(seen) == {
        "q0": 40 + rows,
        "mlp0": 40 + rows,
        "q1": 40,
        "mlp1": 40,
        "q2": 40,
        "mlp2": 40,
    }


def test_no_dense_mask_in_prefill():
    step = Step.plan(build(summary_sliding_chunk_num=3).args, 0, 4096, 0)
    for a, b, text, count, mask in step.blocks(3):
        assert b - a <= 256 and a - text < 4 * 4
        if count:
            assert mask.shape == (b - a, count + b - text)


@pytest.mark.quick(1)
@pytest.mark.parametrize("windows", [3, [3, 2000, 3], 300])
@pytest.mark.slow
def test_many_rows_go_block_by_block(windows):
    """A call of several blocks: its values, its gradient, and a workspace of one block."""
    model = build(summary_sliding_chunk_num=windows, num_attention_heads=4)
    text = tokens(700)
    logits = naive.forward(model, text)
    assert worst(model(text), logits) <= 1e-3
    assert worst(model(text, cache=model.make_cache()), logits) <= 1e-3

    def loss(forward):
        return nn.value_and_grad(model, lambda text: mx.logsumexp(forward(text)))(text)[1]

    expected = dict(tree_flatten(loss(lambda t: naive.forward(model, t))))
    for key, g in tree_flatten(loss(model)):
        assert worst(g, expected[key]) <= 1e-4 * max(1, mx.abs(expected[key]).max().item()), key

    n = 5000 if windows == 3 else 3000
    for cache in (model.make_cache(), None):
        mx.reset_peak_memory()
        base = mx.get_active_memory()
        mx.eval(model(tokens(n), cache=cache))
        scores = 4 * n * n * 4  # of one layer at once
        assert mx.get_peak_memory() - base < scores / 3


def test_summary_positions():
    def at(kind, s, k=8, first=2, last=4):
        args = build(
            summary_token_num=s,
            summary_chunk_size=k,
            vocab_size=64 + s,
            summary_token_position_ids_type=kind,
        ).args
        return naive.summary_positions(args, first, last).tolist()

    assert at("last_chunk_slice_right", 1) == [23, 31]
    assert at("last_chunk_slice_right", 2) == [19, 23, 27, 31]
    assert at("last_chunk_slice_left", 2) == [16, 19, 24, 27]
    assert at("last_chunk_slice_left", 3, first=0, last=1) == [0, 1, 4]
    assert at("zeros", 1) == [0, 0]


def test_visibility_by_hand():
    """Chunk 2, window 1, five tokens: two complete chunks."""
    sees = naive.visibility(5, 2, 1, 1)
    expected = """
        1000000
        1100000
        1110000
        1111000
        0011110
        1100010
        0011001
    """
    assert sees.astype(int).tolist() == [[int(x) for x in row] for row in expected.split()]


def test_input_embeddings():
    model, text = build(**VARIANTS["two summaries"]), tokens(50)
    embedded = model.model.embed_tokens(text)
    assert worst(model(text, input_embeddings=embedded), model(text)) == 0


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_stays(name, dtype):
    model = build(**VARIANTS[name])
    model.set_dtype(dtype)
    cache = model.make_cache()
    for n in (50, 1, 3):
        out = model(tokens(n), cache=cache)
        assert out.dtype == dtype and out.shape == (1, n, 64)
    segments = [one for c in cache for one in segments_of(c)]
    assert {x.dtype for one in segments for x in (one.keys, one.values)} == {dtype}


def test_what_is_never_predicted():
    """Logits are as wide as the text vocabulary, so that no bias or penalty is out of bounds."""
    whole = build(truncate_predict_nums=-1)(tokens(3))
    for dtype in (mx.float32, mx.bfloat16):
        model = build(truncate_predict_nums=60)
        model.set_dtype(dtype)
        logits = model(tokens(3))
        assert logits.shape == whole.shape == (1, 3, 64) and logits.dtype == dtype
        assert (logits[..., 60:] == -mx.inf).all() and mx.isfinite(logits[..., :60]).all()
        if dtype == mx.float32:
            assert mx.array_equal(logits[..., :60], whole[..., :60])


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_definition(name):
    model = build(**VARIANTS[name])
    model.train()
    text = tokens(30, 2)

    def loss(forward):
        def of(model, text):
            return nn.losses.cross_entropy(forward(model, text)[:, :-1], text[:, 1:]).mean()

        return nn.value_and_grad(model, of)(model, text)

    ours, grads = loss(lambda m, t: m(t))
    theirs, expected = loss(naive.forward)
    assert abs(ours - theirs) < 1e-5
    expected = dict(tree_flatten(expected))
    for key, g in tree_flatten(grads):
        assert worst(g, expected[key]) <= 2e-4 * max(1, mx.abs(expected[key]).max().item()), key
    summary = mx.abs(dict(tree_flatten(grads))["model.summary_embedding"]).max()
    assert (summary > 0).item()


def test_quantised_full_layers():
    """The pending chunks' keys are read from mlx-lm's cache, also from a quantised one."""
    model = build(summary_sliding_chunk_num=[1, 2000, 1], head_dim=32, hidden_size=64, mix_coeff=0)
    text = tokens(90)
    exact, cache = model(text), model.make_cache()
    outs = []
    for a in range(0, 90, 6):
        outs.append(model(text[:, a : a + 6], cache=cache))
        if a == 30:
            cache[1] = cache[1].to_quantized(group_size=32, bits=8)
    assert isinstance(cache[1], QuantizedKVCache)
    got = mx.concatenate(outs, axis=1)
    assert 0 < worst(got, exact) < 0.05 * mx.abs(exact).max().item()


def test_a_foreign_cache_is_refused():
    model = build()
    with pytest.raises(ValueError, match="KVCache, expected RollingSummaryCache"):
        model(tokens(3), cache=[KVCache() for _ in model.layers])
    with pytest.raises(ValueError, match="found 2, expected 3"):
        model(tokens(3), cache=model.make_cache()[:2])


def test_layers_that_hold_different_texts_are_refused():
    """A trim that raises in one layer may have trimmed another: nothing goes on from there."""
    model = build(summary_sliding_chunk_num=[2000, 1, 1])
    cache = ksa_mlx.make_cache(model, rollback=4)
    for _at in range(0, 60, 4):
        model(tokens(4), cache=cache)
    with pytest.raises(ValueError, match="cannot take back 40 of 60 tokens"):
        trim_prompt_cache(cache, 40)
    with pytest.raises(ValueError, match=r"layers of \[20, 60\] tokens"):
        model(tokens(1), cache=cache)


def test_dead_weights_are_not_held():
    names = lambda **kw: {k for k, _ in tree_flatten(build(**kw).parameters())}
    assert not any("proj_summary" in n for n in names(mix_coeff=0))
    own = names(summary_sliding_chunk_num=[2, 2, 2000])
    assert {n for n in own if "proj_summary" in n} == {
        f"model.layers.{i}.self_attn.{p}_proj_summary.weight"
        for i, p in ((0, "q"), (0, "k"), (0, "v"), (1, "k"), (1, "v"))
    }
