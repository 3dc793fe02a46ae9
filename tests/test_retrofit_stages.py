"""The lessons of a retrofit against their definitions; a killed run; a run on two machines."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten

from ksa_mlx.errors import CheckpointError, KSAError
from ksa_mlx.retrofit import closed_form, distill, probe, regression
from ksa_mlx.retrofit import state as states
from ksa_mlx.retrofit.base import open_base
from ksa_mlx.retrofit.build import build, teacher
from ksa_mlx.retrofit.features import collect, grouped, sampled
from ksa_mlx.retrofit.stages import STAGES, Retrofit
from ksa_mlx.retrofit.state import Place
from ksa_mlx.retrofit.streams import (
    attend_all,
    attend_near,
    merged,
    sees_near,
    summary_stream,
    text_stream,
)
from ksa_mlx.retrofit.trainable import adapt, is_adapter, is_summary, trainable
from tests._bases import base_folder
from tests._retrofit import SETTINGS, Texts, ids, retrofit, student
from tests.test_distributed import ROOT, launch

FIRST = 32  # beyond a window of two chunks and the sink
POSITIONS = np.stack([sampled(96, 20, FIRST, [50], np.random.default_rng(i)) for i in range(2)])


def dense(queries, keys, values, sees):
    """Attention by the definition, in float64: sees (rows, columns)."""
    q, k, v = (np.array(x, dtype=np.float64) for x in (queries, keys, values))
    k, v = (np.repeat(x, q.shape[1] // k.shape[1], axis=1) for x in (k, v))
    scores = np.where(sees, q @ k.swapaxes(-1, -2) * q.shape[-1] ** -0.5, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ v


def close(a, b, tolerance=2e-5):
    a, b = np.array(a, dtype=np.float64), np.array(b, dtype=np.float64)
    assert a.shape == b.shape
    assert np.abs(a - b).max() <= tolerance * max(1, np.abs(b).max())


@pytest.mark.parametrize("n", [9, 96, 300])
def test_attention_that_forgets_is_the_definition(n):
    rng = np.random.default_rng(n)
    q, k, v = (mx.array(rng.normal(size=(2, h, n, 8)).astype(np.float32)) for h in (4, 2, 2))
    p = np.arange(n)
    sees = [[j <= i and (j >= (i // 8 - 2) * 8 or j < 8) for j in p] for i in p]
    assert (sees_near(p, p, 2, 8, 8) == np.array(sees)).all()
    close(attend_near([2], 8)(0, q, k, v), dense(q, k, v, np.array(sees)))
    close(attend_near([None], 8)(0, q, k, v), attend_all(0, q, k, v))
    close(attend_all(0, q, k, v), dense(q, k, v, np.tril(np.ones((n, n), bool))))


def test_the_teacher_is_the_base_and_the_student_its_model():
    model = student()
    base, x = teacher(model), ids()
    close(base.head(text_stream(base, x, attend_all)), base(x))
    for checkpointed in (False, True):
        h, kept = distill.states_of(model, x, {2: None}, checkpointed)
        close(model.head(h), model(x))
        assert list(kept) == [2] and kept[2].shape == h.shape
    # Within the window both are one.
    close(model(x[:, :24]), base(x[:, :24]))
    assert np.abs(np.array(model(x) - base(x))).max() > 0.1


def test_a_lesson_is_attention_with_and_without_summaries():
    model, x = student(), ids()
    base = teacher(model)
    features = collect(base, model.args.windows, x, POSITIONS)
    assert sorted(features.lessons) == [0, 2, 3]
    p = np.arange(96)
    for i, rows in summary_stream(model, features.texts.__getitem__, features.chunks):
        if i not in features.lessons:
            continue
        lesson, (k, v) = features.lessons[i], features.texts[i]
        for b in range(2):
            q = lesson.queries[b : b + 1]
            text = [y[b : b + 1] for y in (k, v)]
            at = POSITIONS[b]
            near = sees_near(at, p, 2, 8, 8)
            full = mx.array(dense(q, *text, p <= at[:, None]).astype(np.float32))
            o_proj = base.model.layers[i].self_attn.o_proj
            close(lesson.target[b : b + 1], o_proj(merged(full)))
            close(lesson.near[b : b + 1], dense(q, *text, near))
            own = [y[b : b + 1] for y in rows.pair()]
            chunk = np.arange(12)
            far = (chunk >= 1) & (chunk < at[:, None] // 8 - 2)
            both = [mx.concatenate([t, s], axis=2) for t, s in zip(text, own, strict=True)]
            wanted = dense(q, *both, np.concatenate([near, far], axis=1))
            close(
                regression.with_summaries(lesson, rows.pair(), features.visible)[b : b + 1], wanted
            )


def test_summary_rows_alone_are_those_of_the_model():
    """With no layer windowed but the last, the text is the base's in all layers."""
    model = student(summary_sliding_chunk_num=[2000, 2000, 2000, 2])
    base, x = teacher(model), ids()
    features = collect(base, model.args.windows, x, POSITIONS)
    cache = model.make_cache()
    model(x, cache=cache)
    *_, (last, rows) = summary_stream(model, features.texts.__getitem__, features.chunks)
    assert last == 3
    keys, values = rows.pair()
    newest_first = cache[3].summaries()
    count = newest_first[0].shape[2]
    for own, cached in zip((keys, values), newest_first, strict=True):
        close(own[:, :, :count], cached[:, :, ::-1], 1e-4)


@pytest.mark.parametrize("norms", [True, False])
def test_the_closed_form_helps_and_sinks(norms):
    model = student(use_qk_norm=norms)
    base = teacher(model)
    numbers = [Texts().sequence(i).ids for i in range(16)]
    batches = [
        collect(base, model.args.windows, mx.array(np.stack(numbers[i : i + 2])), POSITIONS)
        for i in range(0, 16, 2)
    ]

    def error():
        each = [regression.relative(regression.errors(model, f), {}) for f in batches]
        return np.mean([np.array(x).mean() for x in each])

    before = error()
    closed_form.start(model, batches, np.random.default_rng(0))
    assert error() < before

    def summaries():
        rows = summary_stream(model, batches[0].texts.__getitem__, 12)
        return {i: [np.array(x) for x in r.pair()] for i, r in rows}

    def off(keys, layer):
        """How far the first summary's log mass is from that of its text: the root mean square."""
        lesson, text = batches[0].lessons[layer], batches[0].texts[layer][0][:, :, :8]
        wanted = mx.logsumexp(grouped(lesson.queries, text), axis=-1)
        got = grouped(lesson.queries, mx.array(keys[:, :, :1]))[..., 0]
        return float((got - wanted).square().mean() ** 0.5)

    kept = summaries()
    assert sorted(closed_form.sink(model, batches)) == [2, 3]
    for layer, found in summaries().items():
        moved = [
            np.abs(x - y).mean(axis=(0, 1, 3)) for x, y in zip(found, kept[layer], strict=True)
        ]
        if layer in (2, 3):
            assert off(found[0], layer) < off(kept[layer][0], layer)
            assert all(x[0] > 3 * x[1:].mean() for x in moved), moved


def test_rope_is_taken_back():
    model = student()
    attn, positions = model.model.layers[0].self_attn, mx.array([7, 15, 800])
    x = mx.random.normal((2, 2, 3, 8))
    close(
        closed_form._unrotated(attn, closed_form._rotated(attn, x, positions), positions), x, 1e-4
    )


def test_probe_finds_the_layer_that_reads_far():
    model = student()
    # Layer 2 sees nothing: its values are zero, so no window takes anything from it.
    base = teacher(model)
    base.model.layers[2].self_attn.v_proj.weight *= 0
    lost = probe.lost(base, 2, [(ids(), POSITIONS)])
    assert lost[2] == 0 and lost.min() >= 0

    assert probe.choose({"a": [0.0, 2.0, 1.0, 1.0]}, 2) == [1, 2]


def test_distillation_loss_is_the_definition():
    model = student()
    base, x = teacher(model), ids()
    weights = np.ones(POSITIONS.shape, np.float32)
    goal = distill.goal(base, x, POSITIONS, weights, FIRST)
    loss, said = distill.loss(model, goal)

    def log_softmax(logits):
        z = np.array(logits, dtype=np.float64)
        return z - np.log(np.exp(z).sum(-1, keepdims=True))

    p, q = log_softmax(base(x)), log_softmax(model(x))
    rows = np.arange(2)[:, None]
    kl = (np.exp(p) * (p - q)).sum(-1)[rows, POSITIONS].mean()
    close(said["kl"], kl, 1e-4)
    assert loss.item() == pytest.approx(said["kl"].item() + said["hidden"].item(), rel=1e-6)
    # A student whose windows cover all is its base.
    assert distill.loss(base, goal)[0].item() < 1e-5


def test_what_trains():
    model = student()
    own = trainable(model, is_summary)
    assert len(own) == 1 + 4 + 3 * 4 - 1  # the embedding, norms, k and v, q but the last layer's
    adapt(model, 2)
    adapters = trainable(model, is_adapter)
    assert len(adapters) == 4 * 4 * 2


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = retrofit(tmp_path_factory.mktemp("unbroken"))
    run.run()
    return run


def results(run: Retrofit):
    return trainable(run.student, lambda name: is_summary(name) or is_adapter(name))


def same(a: Retrofit, b: Retrofit):
    a, b = results(a), results(b)
    assert a.keys() == b.keys() and all(mx.array_equal(a[k], b[k]) for k in a)


def test_training_lowers_the_losses(unbroken):
    lines = unbroken.place.lines()
    held = [x["error"] for x in lines if x.get("what") == "held out"]
    assert held[-1] < held[0]
    kl = [x["kl"] for x in lines if x["stage"] == "distillation"]
    assert len(kl) == 4 and np.isfinite(kl).all()


class Killed(Exception):
    pass


@pytest.mark.parametrize("stage", ["regression", "distillation"])
def test_a_killed_run_goes_on_to_the_bit(stage, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(states, "SECONDS", 0)  # keep every step

    def die(at, step, steps, said):
        if at == stage and step == 2 and steps is not None:
            raise Killed

    with pytest.raises(Killed):
        retrofit(tmp_path, tick=die).run()
    again = retrofit(tmp_path)
    assert (again.stage, again.step) == (stage, 2)
    again.run()
    same(again, unbroken)
    done = retrofit(tmp_path)
    assert done.stage == STAGES[-1]
    done.run()
    same(done, unbroken)


def test_a_stop_keeps_the_step(unbroken, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        retrofit(tmp_path, stop=lambda: True).run()
    again = retrofit(tmp_path)
    assert (again.stage, again.step) == ("regression", 1)
    again.run()
    same(again, unbroken)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_packed_base_trains_at_low_rank(dtype, tmp_path):
    """4 bits stay as they are; what trains is kept in float32, and computes in the base's dtype."""
    folder = base_folder(tmp_path / "plain", "qwen3")
    mlx_lm.convert(str(folder), str(tmp_path / "packed"), quantize=True, q_bits=4, dtype=dtype)
    base = open_base(tmp_path / "packed")
    before = {k: mx.array(v) for k, v in base.weights.items()}
    model = build(base, [2, None, 2], own_rank=4)
    place = Place(tmp_path / "run", {})
    run = Retrofit(model, teacher(model), SETTINGS, Texts(), place)
    run.run()
    lines = place.lines()
    held = [x["error"] for x in lines if x.get("what") == "held out"]
    assert held[-1] < held[0] and np.isfinite([x.get("loss", 0) for x in lines]).all()
    assert model(ids()).dtype == getattr(mx, dtype)
    now = dict(tree_flatten(model.parameters()))
    for name in ("model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.scales"):
        assert mx.array_equal(now[name], before[name])
    again = Retrofit(other := build(base, [2, None, 2], own_rank=4), teacher(other), SETTINGS,
                     Texts(), place)  # fmt: skip
    again.run()
    assert mx.array_equal(other(ids()), model(ids()))


def test_other_settings_do_not_go_on(tmp_path):
    place = states.Place(tmp_path, {"--seed": 0, "--window": 16})
    place.save(lambda: {"a": mx.array([1.0])}, {"stage": "start"}, now=True)
    assert place.found()[1] == {"stage": "start"}
    with pytest.raises(CheckpointError, match=r"--window: found 8, expected 16 as the run began"):
        states.Place(tmp_path, {"--seed": 0, "--window": 8}).found()
    (tmp_path / states.FILE).write_bytes(b"nonsense")
    with pytest.raises(CheckpointError, match="not a state of a retrofit"):
        place.found()


def test_small_and_dead_layers_train(tmp_path):
    """Two layers, of which one has attention that gives nothing, and one head asks nothing."""
    model = student(num_hidden_layers=2, summary_sliding_chunk_num=[2, 2])
    first, second = (layer.self_attn for layer in model.model.layers)
    first.v_proj.weight *= 0
    first.v_proj_summary.weight *= 0
    second.q_proj.weight *= 0
    run = Retrofit(model, teacher(model), SETTINGS, Texts(), Place(tmp_path, {}))
    run.run()
    lines = run.place.lines()
    assert np.isfinite([x["loss"] for x in lines if "loss" in x]).all()
    assert all(mx.isfinite(x).all() for x in results(run).values())


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(distill, "loss", lambda *_: (mx.array(float("nan")), {}))
    run = retrofit(tmp_path)
    with pytest.raises(KSAError, match="distillation, step 1: found a loss of nan"):
        run.run()
    arrays, place = run.place.found()
    assert place["step"] == 0 and all(mx.isfinite(x).all() for x in arrays.values())


def test_a_student_of_other_windows_is_refused(tmp_path):
    with pytest.raises(KSAError, match="expected 3 or None, 3 once"):
        retrofit(tmp_path, replace(SETTINGS, window=3))


@pytest.mark.slow
def test_machines_stop_at_the_same_step(tmp_path):
    """Ctrl-C that only the first hears."""
    worker = ROOT / "tests" / "_retrofit_worker.py"
    pair = launch(sys.executable, worker, tmp_path, "1", "stop")
    out, _ = pair.communicate(timeout=200)
    assert sorted(re.findall(r"STOPPED (.*)", out)) == ["0 regression 2", "1 regression 2"]


@pytest.mark.slow
def test_two_machines_are_one_with_twice_the_batch(tmp_path):
    worker = ROOT / "tests" / "_retrofit_worker.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    one = subprocess.run(
        [sys.executable, worker, tmp_path / "one", "2"],
        env=env,
        text=True,
        capture_output=True,
        timeout=200,
    )
    pair = launch(sys.executable, worker, tmp_path / "two", "1")
    out, _ = pair.communicate(timeout=200)
    found = [json.loads(re.search(r"LOSSES (.*)", x)[1]) for x in (one.stdout, out)]
    assert len(found[0]) == 9
    np.testing.assert_allclose(found[1], found[0], rtol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("at", ["regression-3", "distillation-2"])
def test_kill_9_loses_a_minute_at_most(at, unbroken, tmp_path):
    """The state is whole whenever the process dies, and the run after it ends as an unbroken one."""
    worker = ROOT / "tests" / "_retrofit_worker.py"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    died = subprocess.run([sys.executable, worker, tmp_path, "2", at], env=env, timeout=200)
    assert died.returncode == -9
    again = retrofit(tmp_path, replace(SETTINGS))
    again.run()
    same(again, unbroken)
