"""The kernels through the whole model, executed on the CPU; and when they are chosen."""

import warnings

import mlx.core as mx
import pytest

from ksa_mlx import naive
from ksa_mlx.attention import choice, decode, kernel, metal, prefill, record
from ksa_mlx.attention.plan import Step
from ksa_mlx.attention.trial import DECODE, PREFILL
from ksa_mlx.cache.make import make_cache
from ksa_mlx.cache.storage import PLAIN, Affine, Segment

from . import metal_cpu
from ._models import VARIANTS, build, tokens, worst

# The official outputs again, this time by the metal.
from .test_goldens import converted, golden, test_decode, test_prefill  # noqa: F401

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))

DIM = {"head_dim": 32}


@pytest.fixture(autouse=True)
def log():
    """All tests here run with the kernels forced, in the instrument."""
    instrument = metal_cpu.running(reload=[metal], check=False, pretend_gpu=False)
    with instrument as log, metal.using("metal"):
        yield log


def feed(model, text, sizes, cache):
    """Logits of a text fed in pieces of these sizes, over and over."""
    outs, at = [], 0
    while at < text.shape[1]:
        n = min(sizes[len(outs) % len(sizes)], text.shape[1] - at)
        outs.append(model(text[:, at : at + n], cache=cache))
        mx.eval(outs[-1], [c.state for c in cache])
        at += n
    return mx.concatenate(outs, axis=1)


@pytest.mark.quick(2)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sizes", [[1], [30, 1, 3, 9, 8, 2]], ids=str)
def test_any_split(variant, sizes, log):
    """Every edge of chunks and windows is crossed, one token at a time and several."""
    model, text = build(**{**VARIANTS[variant], **DIM}), tokens(80, 2)
    got = feed(model, text, sizes, make_cache(model, rollback=9 if len(sizes) > 1 else 0))
    assert worst(got, naive.forward(model, text)) <= 1e-3
    assert log.of("ksa_decode") and (len(sizes) == 1 or log.of("ksa_prefill"))


@pytest.mark.quick(1)
@pytest.mark.parametrize("bits, text_bits", [(4, 4), (8, 8), (4, 8)])
def test_quantised_caches(bits, text_bits, log):
    """The same as MLX's operations on the same quantised cache.

    One layer: in a second one the last bit decides which way the format rounds.
    """
    shape = {"num_hidden_layers": 1, "head_dim": 64, "summary_sliding_chunk_num": 4}
    model, text = build(**shape), tokens(90, 2)

    def caches():
        cache = make_cache(model, text_bits=text_bits)
        return [c.to_quantized(group_size=32, bits=bits) for c in cache]

    got = feed(model, text, [1, 2, 40, 1], caches())
    assert log.of("ksa_decode") and log.of("ksa_prefill")
    with metal.using("ops"):
        expected = feed(model, text, [1, 2, 40, 1], caches())
    assert worst(got, expected) <= 1e-4


def test_a_decode_step_reads_what_it_sees(log):
    """One launch a layer, no copy, and of the cache exactly the visible slots, once."""
    model, text = build(summary_sliding_chunk_num=[2, 5, 1], **DIM), tokens(64)
    cache = make_cache(model)
    feed(model, text[:, :50], [50], cache)
    for at in range(50, 64):
        log.clear()
        with metal_cpu.settings(check=True):
            model(text[:, at : at + 1], cache=cache)
        assert [launch.kernel for launch in log.launches] == ["ksa_decode_1_plain"] * 3
        for launch, held in zip(log.launches, cache, strict=False):
            (seen,) = held.visible
            start, stop = seen.start, seen.stop
            assert not launch.copies
            for buffer in (launch.buffers["keys_0"], launch.buffers["values_0"]):
                assert buffer.touched[:, :, start:stop].all()
                # The last key is read again in place of what a tile lacks.
                assert buffer.loaded_elements < buffer.touched.sum() * (1 + 16 / (stop - start))
                assert buffer.touched.sum() == buffer.touched[:, :, start:stop].size


def test_a_model_in_training_uses_operations(log):
    model, text = build(**DIM), tokens(40)
    model.train()
    feed(model, text, [30, 1], make_cache(model))
    assert not log.launches


def test_gradients_do_not_meet_the_kernels(log):
    """Without a cache there is no kernel, in training or not."""
    model, text = build(**DIM), tokens(40)

    def loss(embedding):
        return model(text, input_embeddings=embedding).square().mean()

    gradient = mx.grad(loss)(model.model.embed_tokens(text))
    assert mx.isfinite(gradient).all() and not log.launches


# ---- Choosing, where nothing can be timed; test_choice.py is about the rest


@pytest.fixture
def gpu(monkeypatch):
    """A function that starts the instrument as a GPU, with nothing known. Yields its log."""
    known = record.Record(None, "here")
    monkeypatch.setattr(record, "here", lambda: known)
    modules = [choice, metal]

    def start(**settings):
        return metal_cpu.running(reload=modules, check=False, **settings)

    return start


def asks(kernels=None, dtype=mx.float32, dim=64, heads=2, kernel="decode", bits=0):
    """Whether the kernel runs for one query on 16 keys of one KV head."""
    queries, keys = (
        mx.zeros((1, heads, 1, dim), dtype=dtype),
        mx.zeros((1, 1, 16, dim), dtype=dtype),
    )
    if kernels is not None:
        with metal.using(kernels):
            return asks(None, dtype, dim, heads, kernel, bits)
    wanted = metal.wanted()
    if not wanted:
        return False
    if kernel == "prefill":
        return prefill.arm(wanted, queries, keys) == "kernel"
    form = Affine(bits, 32) if bits else PLAIN
    segment = Segment(*form.pair(form.encode(keys, keys)), 0, 16, form)
    return decode.arm(wanted, queries, [[segment]]) == "kernel"


def test_forced():
    assert asks("metal") and not asks("ops")
    assert not asks("auto"), "the default device is a CPU"


def test_what_the_kernels_take():
    assert not asks("metal", dim=72)
    assert not asks("metal", heads=17)
    assert not asks("metal", dtype=mx.int32)
    for bits in (2, 4, 6, 8):
        assert asks("metal", bits=bits) == (bits in (4, 8))
    queries, keys = mx.zeros((1, 1, 1, 64), dtype=mx.float16), mx.zeros((1, 1, 16, 64))
    form = Affine(8, 32)
    segment = Segment(*form.pair(form.encode(keys, keys)), 0, 16, form)
    assert decode.arm("metal", queries, [[segment]]) == "operations", "scales of another dtype"


def test_the_environment(monkeypatch):
    monkeypatch.setattr(metal, "_override", None)
    for value, expected in (("metal", True), ("ops", False), ("auto", False), ("retune", False)):
        monkeypatch.setenv("KSA_MLX_KERNELS", value)
        assert asks() == expected
        assert not asks("ops"), "the argument wins"
    monkeypatch.setenv("KSA_MLX_KERNELS", "cuda")
    expected = "KSA_MLX_KERNELS: found 'cuda', expected auto, metal, ops or retune"
    with pytest.raises(ValueError, match=expected):
        asks()


def test_untimed(gpu):
    """Kernels where MLX's operations are certainly slow, operations elsewhere."""
    with gpu():
        assert not asks("auto") and not asks("auto", kernel="prefill")
        assert asks("auto", dim=80) and asks("auto", dim=32)
        assert asks("auto", bits=4) and asks("auto", bits=8)


@pytest.mark.parametrize("dtype", metal.DTYPES, ids=str)
def test_on_a_gpu_the_first_use_compares(dtype, gpu):
    with gpu() as log, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert asks("auto", dtype, bits=4)
        compared = len(log.launches)
        assert {x.template["PARTIAL"] for x in log.of("ksa_decode")} == {True, False}
        assert asks("auto", dtype, bits=4)
        assert len(log.launches) == compared, "only the first use"


@pytest.mark.parametrize("dtype", metal.DTYPES, ids=str)
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("kernel", ["decode", "prefill"])
def test_both_arms_are_right(kernel, dim, dtype, gpu):
    """Both on the inputs of the comparison, well within what is allowed."""
    module = {"decode": decode, "prefill": prefill}[kernel]
    trial = {"decode": DECODE, "prefill": PREFILL}[kernel]
    key = choice.Key(kernel, dtype, dim, 2, 2, 1, (PLAIN,), 1024)
    with gpu():
        for arm in module.ARMS.values():
            assert choice.difference(key, arm, trial) <= choice.ALLOWED / 1.5


@pytest.mark.slow
@pytest.mark.parametrize("bits, text_bits", [(0, 0), (8, 8), (4, 8)])
def test_whatever_runs_was_compared(bits, text_bits, gpu, monkeypatch):
    """Each combination of template arguments is a kernel of its own to Metal's compiler."""
    compared, used = set(), set()
    # A head_dim where the kernel is taken untimed.
    shape = {"head_dim": 32, "num_hidden_layers": 1, "summary_sliding_chunk_num": 70}
    model, text = build(**shape), tokens(400, 1)
    cache = make_cache(model, text_bits=text_bits)
    if bits:
        cache = [c.to_quantized(group_size=32, bits=bits) for c in cache]

    def note(log, to):
        to.update((launch.kernel, *launch.template.items()) for launch in log.launches)
        log.clear()

    monkeypatch.setattr(kernel, "KEYS", 8)
    with gpu() as log, metal.using("auto"):
        find = choice.difference

        def watched(*asked):
            note(log, used)
            found = find(*asked)
            note(log, compared)
            return found

        monkeypatch.setattr(choice, "difference", watched)
        # Windowed text alone, then with summaries; few slots, then split ones.
        feed(model, text, [5, 5, 230, 1, 2, 3, 5, 8, 40], cache)
        note(log, used)
    assert {True, False} <= {dict(arguments).get("PARTIAL") for _, *arguments in used}
    assert used <= compared


@pytest.mark.parametrize("fault", ["differs", "does not compile", "wrong size", "no numbers"])
def test_a_kernel_that_fails_is_replaced_with_one_warning(fault, gpu, monkeypatch):
    def wrong(queries, segments):
        if fault == "differs":
            return queries * 0
        if fault == "no numbers":
            return queries * mx.nan
        raise (RuntimeError if fault == "does not compile" else ValueError)("line 1: error")

    with gpu():
        for module in (decode, prefill):
            monkeypatch.setitem(module.ARMS, "kernel", wrong)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for other in ({"bits": 4}, {"bits": 4}, {"bits": 8, "dim": 128}, {"dim": 80}):
                assert not asks("auto", **other)
        assert asks("metal")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert "report" in message and "macOS" in message and mx.__version__ in message


def test_a_broken_source_is_noticed(gpu, monkeypatch):
    """The self-check sees a kernel that computes something else."""
    with gpu():
        text = metal.source("forms.h")
        monkeypatch.setattr(
            metal,
            "source",
            lambda name, source=metal.source: (
                text.replace("1.44269504f", "1.4f") if name == "forms.h" else source(name)
            ),
        )
        with pytest.warns(RuntimeWarning, match="decode differs"):
            assert not asks("auto", bits=4)


def test_sources_lie_beside_the_package_or_in_the_repository(tmp_path, monkeypatch):
    package = tmp_path / "site-packages" / "ksa_mlx"
    (package / "metal").mkdir(parents=True)
    monkeypatch.setattr(metal, "__file__", str(package / "attention" / "metal.py"))
    with pytest.raises(FileNotFoundError, match=r"decode.metal: not found in .*reinstall"):
        metal.source("decode.metal")
    (tmp_path / "site-packages" / "metal").mkdir()
    (tmp_path / "site-packages" / "metal" / "decode.metal").write_text("repository")
    assert metal.source("decode.metal") == "repository"
    (package / "metal" / "decode.metal").write_text("wheel")
    assert metal.source("decode.metal") == "wheel"


def test_summary_rows_take_one_launch_of_mlx():
    """No kernel of ours: all chunks are one batch of mx.fast.scaled_dot_product_attention."""
    calls, original = [], mx.fast.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(args[0].shape)
        return original(*args, **kwargs)

    model = build(summary_sliding_chunk_num=[1, 1, 2000], **DIM)
    mx.fast.scaled_dot_product_attention = count
    try:
        model(tokens(60), cache=make_cache(model))
    finally:
        mx.fast.scaled_dot_product_attention = original
    rows = Step.plan(model.args, 0, 60, 0).chunks
    assert [shape for shape in calls if shape[0] == rows] == [(rows, 4, 1, 32)]
