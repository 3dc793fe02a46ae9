"""python -m ksa_mlx COMMAND, and that each patch of mlx-lm in ksa_mlx/stock is still needed."""

import contextlib
import os
import subprocess
import sys

import mlx.core as mx
import mlx_lm.cli
import mlx_lm.models.cache
import mlx_lm.utils
import pytest
from mlx_lm.models.cache import LRUPromptCache, load_prompt_cache, save_prompt_cache
from mlx_lm.tokenizer_utils import StreamingDetokenizer
from transformers import AutoConfig

import ksa_mlx
from ksa_mlx.__main__ import OURS, main
from ksa_mlx.cache.rollback import ENOUGH, ROLLBACK
from ksa_mlx.chat.notebook import CHECKPOINT
from ksa_mlx.stock import commands, register
from ksa_mlx.stock.prompt_cache import PromptCache
from ksa_mlx.stock.server import ResponseGenerator

from ._convert_helpers import add_tokenizer, convert, hub_folder
from ._models import VARIANTS, after_drafts, build, tokens

NOT_NEEDED = "mlx-lm does it itself now: remove stock/"


@contextlib.contextmanager
def fails_without(patch, error, says):
    """The block raises, as stock mlx-lm does without this patch of ours."""
    with pytest.raises(error, match=says):
        yield
        pytest.fail(NOT_NEEDED + patch)


# Commands


def test_both_kinds_are_listed(capsys):
    assert {"server", "chat", "lora", "fuse", "cache_prompt"} < set(commands.names())
    for argv in ([], ["--help"], ["-h"]):
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) < 14 and all(len(line) <= 100 for line in lines)
        assert set(" ".join(lines).split()) > {*OURS, *commands.names()}
    assert main(["--version"]) == 0 and capsys.readouterr().out.strip() == ksa_mlx.__version__


def test_unknown_command(capsys):
    assert main(["nosuch", "--model", "x"]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: found 'nosuch', expected a command") and err.count("\n") == 1
    assert not out


@pytest.mark.quick(1)
@pytest.mark.parametrize("command", [*OURS, "server", "chat"])
def test_help_of_a_command(command):
    done = subprocess.run(
        [sys.executable, "-m", "ksa_mlx", command, "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "--model" in done.stdout + ("--model" * (command in OURS))
    assert len(done.stdout) > 100


@pytest.fixture
def called(monkeypatch):
    """What reaches mlx-lm instead of a command."""
    seen = []
    monkeypatch.delenv(ROLLBACK, raising=False)
    monkeypatch.setattr(
        mlx_lm.cli, "main", lambda: seen.append((sys.argv[:], os.environ.get(ROLLBACK)))
    )
    yield seen
    os.environ.pop(ROLLBACK, None)


def test_the_channel_to_mlx_lm(called, tmp_path):
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    before, model = sys.argv, str(tmp_path)
    for flags, rollback in (
        ([], None),
        (["--draft-model", model], ENOUGH),
        ([f"--draft-model={model}", "--num-draft-tokens", "100"], 100),
        (["--draft-model", model, "--num-draft-tokens", "x"], ENOUGH),
    ):
        os.environ.pop(ROLLBACK, None)
        assert commands.run("chat", ["--model", model, *flags]) == 0
        argv, found = called.pop()
        assert argv == ["mlx_lm", "chat", "--model", model, *flags]
        assert found == (None if rollback is None else str(rollback))
    os.environ[ROLLBACK] = "7"
    commands.run("chat", ["--draft-model", model])
    assert called.pop()[1] == "7" and sys.argv is before


@pytest.mark.feature(
    "A bounded cache",
    "`--max-kv-size`",
    "ignored with a warning: nothing of the past is dropped",
)
def test_max_kv_size_is_answered(called, capsys):
    for flags in (["--max-kv-size", "512"], ["--max-kv-size=512"]):
        assert commands.run("chat", flags) == 0 and called.pop()[0][2:] == flags
        err = capsys.readouterr().err
        assert "--max-kv-size: a KSA model ignores it" in err and err.count("\n") == 1
    commands.run("chat", [])
    assert capsys.readouterr().err == ""
    model = build()
    cache = mlx_lm.models.cache.make_prompt_cache(model, max_kv_size=8)
    assert [type(c) for c in cache] == [type(c) for c in model.make_cache()]


@pytest.mark.parametrize(
    ("command", "flags", "package", "says"),
    [
        ("evaluate", ["--tasks", "x"], "lm_eval", "lm_eval: pip install 'mlx-lm[evaluate]'"),
        ("perplexity", [], "datasets", "datasets: pip install 'mlx-lm[train]'"),
    ],
)
def test_packages_that_are_missing(folder, monkeypatch, capsys, command, flags, package, says):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"mlx_lm.{command}", raising=False)
    assert commands.run(command, ["--model", str(folder), *flags]) == 1
    assert capsys.readouterr().err == f"error: {command}: needs the package {says}\n"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["chat", "--model", "./nosuch"], "chat: --model: ./nosuch: no such file or folder"),
        (["chat", "--model", "no/such"], "--model: no/such: no such folder here"),
        (["server", "--draft-model", "./x"], "server: --draft-model: ./x: no such file"),
        (["manage", "--scan"], "manage: CacheNotFound: Cache directory not found"),
        (["upload", "--path", "x", "--upload-repo", "a/b"], "upload: Cannot load RepoCard"),
    ],
)
def test_refusals_in_one_line(argv, says, monkeypatch, tmp_path, capsys):
    for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE"):
        value = True if name == "HF_HUB_OFFLINE" else str(tmp_path / "none")
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)
    assert commands.run(argv[0], argv[1:]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and says in lines[0]


@pytest.mark.parametrize(("command", "status"), [("chat", 0), ("manage", 1)])
def test_the_end_of_standard_input(command, status, monkeypatch, capsys):
    def ended():
        raise EOFError

    monkeypatch.setattr(mlx_lm.cli, "main", ended)
    assert commands.run(command, []) == status
    assert capsys.readouterr().err.count("\n") == status


# Patches: each test fails when stock mlx-lm no longer shows the fault


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An unconverted checkpoint whose summaries share the text's parameters."""
    place = tmp_path_factory.mktemp("stock") / "hub"
    source = hub_folder(place, "hybrid_mix1")
    add_tokenizer(source)
    return source


@pytest.fixture(scope="module")
def folder(source):
    assert convert(source, source.parent / "model", "--dtype", "float32") == 0
    return source.parent / "model"


def stock_load_model():
    return mlx_lm.utils.load_model.__wrapped__


def test_know_model(monkeypatch):
    assert mlx_lm.utils._get_classes({"model_type": "qwen3_ksa"})[0] is ksa_mlx.Model
    monkeypatch.delitem(sys.modules, "mlx_lm.models.qwen3_ksa")
    with fails_without("register.know_model", ValueError, "not supported"):
        mlx_lm.utils._get_classes({"model_type": "qwen3_ksa"})


def test_text_never_goes_back():
    _, tokenizer = ksa_mlx.load(CHECKPOINT)

    def pieces(last_segment, text):
        detokenizer, found = tokenizer.detokenizer, []
        for token in tokenizer.encode(text, add_special_tokens=False):
            detokenizer.add_token(token)
            found.append(last_segment(detokenizer))
        detokenizer.finalize()
        return "".join([*found, last_segment(detokenizer)])

    def stock(detokenizer):
        text = detokenizer.text
        segment, detokenizer.offset = text[detokenizer.offset :], len(text)
        return segment

    ours = StreamingDetokenizer.last_segment.fget
    for text in ("plain words", "naïve café", "日本語", "🎉🎉 ok", "ąę\n\nZürich 東京"):
        assert pieces(ours, text) == text
    assert pieces(stock, "日本語") != "日本語", NOT_NEEDED + "text_never_goes_back"


def test_know_cache(monkeypatch, tmp_path):
    model, file = build(), str(tmp_path / "cache.safetensors")
    cache = model.make_cache()
    model(tokens(30), cache=cache)
    save_prompt_cache(file, cache)
    assert [c.offset for c in load_prompt_cache(file)] == [30, 30, 30]
    monkeypatch.delattr(mlx_lm.models.cache, "RollingSummaryCache")
    with fails_without("register.know_cache", KeyError, "RollingSummaryCache"):
        load_prompt_cache(file)


def test_know_config():
    assert type(AutoConfig.for_model("qwen3_ksa")) is register._Config
    with fails_without("register.know_config", ValueError, "Unrecognized model identifier"):
        AutoConfig.for_model("a type that nobody registered")


def test_load_ours(folder):
    with fails_without("register.load_ours", ValueError, "trust_remote_code"):
        stock_load_model()(folder)
    assert isinstance(mlx_lm.utils.load_model(folder)[0], ksa_mlx.Model)


def test_an_unconverted_folder_is_never_a_plain_qwen3(tmp_path):
    """Where the summaries have no weights of their own, stock builds a plain Qwen3 of it."""
    source = hub_folder(tmp_path / "hub", "shared_params")
    model, config = mlx_lm.utils.load_model(source)
    assert isinstance(model, ksa_mlx.Model) and config["model_type"] == "qwen3_ksa"
    plain, _ = stock_load_model()(source)
    assert type(plain).__module__ == "mlx_lm.models.qwen3", NOT_NEEDED + "register.load_ours"
    ours, _ = ksa_mlx.load_model(source)
    text = tokens(40)
    assert mx.array_equal(model(text), ours(text))


def test_prompt_cache_exact_hit():
    """mlx-lm#1887."""
    model, text = build(), tokens(30)[0].tolist()
    for kind, rest in ((LRUPromptCache, []), (PromptCache, text)):
        kept, cache = kind(4), model.make_cache()
        model(mx.array([text]), cache=cache)
        kept.insert_cache("model", text, cache)
        found = kept.fetch_nearest_cache("model", text)[1]
        assert found == rest, NOT_NEEDED + "prompt_cache.PromptCache.fetch_nearest_cache"


def test_prompt_cache_beyond_the_rollback():
    """mlx-lm#1494: a longer text is trimmed to a prefix, however far back that is."""
    model, text = build(), tokens(40)[0].tolist()
    cache = ksa_mlx.make_cache(model, 4)
    model(mx.array([text]), cache=cache)
    ours, stock = PromptCache(4), LRUPromptCache(4)
    for kept in (ours, stock):
        kept.insert_cache("model", text, cache)
    assert ours.fetch_nearest_cache("model", text[:20]) == (None, text[:20])
    with fails_without("prompt_cache._Whole", ValueError, "cannot take back"):
        stock.fetch_nearest_cache("model", text[:20])


def test_prompt_cache_after_speculation():
    """`speculative_generate_step` leaves caches that have not read all that it has yielded."""
    model, draft = build(), build(seed=1, **VARIANTS["different windows"])
    text, behind = tokens(40)[0].tolist(), []
    for stop in range(1, 8):
        cache, said = after_drafts(model, draft, text, stop)
        behind.append(len(text) + len(said) - cache[0].offset)
    assert max(behind) > 0, NOT_NEEDED + "the use of settle in prompt_cache"


def test_drafts_within_the_rollback(monkeypatch):
    """mlx-lm#1446: a request may ask for more drafts than a cache can take back."""
    asked = type("", (), {"num_draft_tokens": 100})()
    seen = []
    monkeypatch.setattr(
        ResponseGenerator.__base__,
        "_serve_single",
        lambda self, request, *args, **kwargs: seen.append((request, args, kwargs)),
    )
    generator = ResponseGenerator.__new__(ResponseGenerator)
    model = type("", (), {"rollback": 8})()
    generator.model_provider = type("", (), {"model": model, "draft_model": None})()
    generator._serve_single(("queue", "request", asked), "stream", new="argument")
    assert asked.num_draft_tokens == 8
    assert seen == [(("queue", "request", asked), ("stream",), {"new": "argument"})]
