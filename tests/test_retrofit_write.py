"""Folders that a retrofit writes: weights, configs, and a tokenizer that begins every text."""

import json
import sys

import mlx.core as mx
import mlx_lm
import mlx_lm.chat
import numpy as np
import pytest
from mlx.utils import tree_flatten
from safetensors.numpy import load_file
from tokenizers import processors

import ksa_mlx
from ksa_mlx import naive
from ksa_mlx.chat.conversation import Conversation
from ksa_mlx.convert import convert
from ksa_mlx.errors import KSAError
from ksa_mlx.retrofit.base import open_base
from ksa_mlx.retrofit.build import build
from ksa_mlx.retrofit.prefix import choose_prefix, save, with_prefix
from ksa_mlx.retrofit.write import write

from ._bases import KINDS, TEMPLATE, TEXTS, base_folder
from ._models import worst
from ._server import OURS, STOCK, serving
from .test_retrofit_base import WINDOWS, some_ids

SAID = [{"role": "user", "content": "hi 12"}]


def trained(base, own_rank: int = 0, lora: int = 0):
    """A student whose own parts, and what adapts the base, are not as they began."""
    model = build(base, WINDOWS, own_rank=own_rank)
    if lora:
        settings = {"rank": lora, "scale": 2.0, "dropout": 0.0}
        keys = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        mlx_lm.tuner.utils.linear_to_lora_layers(model, 3, {**settings, "keys": keys})
    mx.random.seed(1)
    changed = [
        (name, w + 0.1 * mx.random.normal(w.shape))
        for name, w in tree_flatten(model.parameters())
        if ("summary" in name and "linear" not in name) or "lora" in name
    ]
    model.load_weights(changed, strict=False)
    model.eval()
    return model


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return {kind: open_base(base_folder(folder / kind, kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def written(bases, tmp_path_factory):
    """A trained Qwen3, its prefix, and both folders."""
    folder = tmp_path_factory.mktemp("written")
    base, paths = bases["qwen3"], (folder / "mlx", folder / "hub")
    student, prefix = trained(base, lora=2), choose_prefix(base.tokenizer)
    lines = write(student, base, paths[0], prefix, paths[1])
    assert lines[:2] == [f"Wrote {path}" for path in paths]
    assert lines[2:] == [
        f"{paths[1]}: the official code runs it with its modeling_qwen3sa.py and "
        "summary_context.py in it"
    ]
    return student, prefix, *paths


@pytest.mark.parametrize("kind", KINDS)
def test_the_folder_is_the_student(bases, tmp_path, kind):
    base = bases[kind]
    student = trained(base, own_rank=2 * (kind == "llama"), lora=2)
    write(student, base, tmp_path / "out", choose_prefix(base.tokenizer))
    model, _, config = ksa_mlx.load(tmp_path / "out", return_config=True)
    assert worst(model(some_ids()), student(some_ids())) < 2e-4
    assert worst(model(some_ids()), naive.forward(model, some_ids())) < 2e-4
    assert model.args.windows == WINDOWS
    assert config["eos_token_id"] == [0, 2] and config["torch_dtype"] == "float32"
    assert worst(mlx_lm.load(str(tmp_path / "out"))[0](some_ids()), model(some_ids())) == 0


@pytest.mark.parametrize("kind", KINDS)
def test_the_hub_folder_converts_to_the_mlx_folder(bases, tmp_path, kind):
    base = bases[kind]
    student = trained(base)
    lines = write(
        student, base, tmp_path / "mlx", choose_prefix(base.tokenizer), tmp_path / "hub", "bfloat16"
    )
    assert ("official code has no model" in lines[-1]) == (kind != "qwen3")
    convert(str(tmp_path / "hub"), str(tmp_path / "converted"))
    a, b = (mx.load(str(tmp_path / n / "model.safetensors")) for n in ("mlx", "converted"))
    assert a.keys() == b.keys() and all(mx.array_equal(a[n], b[n]) for n in a)
    assert {w.dtype for w in a.values()} == {mx.bfloat16}
    ours, theirs = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("mlx", "converted")
    )
    assert {n: v for n, v in theirs.items() if n != "architectures"} == ours
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "mlx" / name).read_bytes() == (
            tmp_path / "converted" / name
        ).read_bytes()


def test_the_hub_folder_is_the_official_layout(bases, written):
    """Names and fields of the released checkpoint's."""
    _, prefix, mlx, hub = written
    config = json.loads((hub / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"] and config["model_type"] == "qwen3"
    expected = {
        "use_summary_attention": True,
        "vocab_size": 641,
        "summary_token_begin": 640,
        "truncate_predict_nums": 640,
        "summary_chunk_size": 8,
        "summary_token_num": 1,
        "summary_sliding_chunk_num": [2, 64, 1],
        "mix_coeff": 1.0,
        "summary_independent_parameters": True,
        "summary_independent_attention_layernorm": True,
        "summary_chunk_position_ids_type": "origin",
        "summary_token_position_ids_type": "last_chunk_slice_right",
        "prefix_token_ids": prefix,
    }
    assert {name: config.get(name) for name in expected} == expected
    tensors = load_file(hub / "model.safetensors")
    assert tensors["model.embed_tokens.weight"].shape == (641, 64)
    own = mx.load(str(mlx / "model.safetensors"))["model.summary_embedding"]
    np.testing.assert_array_equal(tensors["model.embed_tokens.weight"][640:], np.array(own))
    # The official model has them in every layer, also where nothing reads a summary.
    for layer in range(3):
        for name in ("q", "k", "v"):
            assert f"model.layers.{layer}.self_attn.{name}_proj_summary.weight" in tensors
    last = "model.layers.2.self_attn.q_proj"
    np.testing.assert_array_equal(tensors[f"{last}_summary.weight"], tensors[f"{last}.weight"])


def test_the_heads_summary_row_is_zero(bases, tmp_path):
    base = bases["llama"]
    write(trained(base), base, tmp_path / "a", choose_prefix(base.tokenizer), tmp_path / "b")
    head = load_file(tmp_path / "b" / "model.safetensors")["lm_head.weight"]
    assert head.shape == (641, 64) and not head[640].any() and head[639].any()


@pytest.mark.parametrize("lora", [0, 2])
def test_a_packed_base_stays_packed(bases, tmp_path, lora):
    """But for what training changed; and the Hub's layout is never packed."""
    mlx_lm.convert(str(bases["qwen3"].folder), str(tmp_path / "packed"), quantize=True, q_bits=4)
    base = open_base(tmp_path / "packed")
    base.config["quantization"]["model.layers.0.self_attn.q_proj"] = {"group_size": 64, "bits": 4}
    student = trained(base, own_rank=2, lora=lora)
    write(student, base, tmp_path / "a", choose_prefix(base.tokenizer), tmp_path / "b", "float32")
    weights = mx.load(str(tmp_path / "a" / "model.safetensors"))
    down = "model.layers.0.mlp.down_proj"
    assert mx.array_equal(weights[f"{down}.weight"], base.weights[f"{down}.weight"])
    plain = "model.layers.0.self_attn.{}_proj{}.weight".format
    assert weights[plain("k", "_summary")].shape == (32, 64)
    assert (weights[plain("k", "")].dtype == mx.uint32) == (not lora)
    settings = json.loads((tmp_path / "a" / "config.json").read_text())["quantization"]
    assert ("model.layers.0.self_attn.q_proj" in settings) == (not lora)
    for name in ("a", "b"):
        model = ksa_mlx.load_model(tmp_path / name)[0]
        assert worst(model(some_ids()), student(some_ids())) < 2e-3
    assert "quantization" not in json.loads((tmp_path / "b" / "config.json").read_text())


def test_shards(bases, tmp_path):
    base = bases["qwen3"]
    student = trained(base)
    write(student, base, tmp_path / "a", choose_prefix(base.tokenizer), max_shard_bytes=100_000)
    assert len(list((tmp_path / "a").glob("model-*.safetensors"))) > 2
    assert worst(ksa_mlx.load_model(tmp_path / "a")[0](some_ids()), student(some_ids())) < 2e-4


def test_refused(bases, tmp_path):
    base = bases["qwen3"]
    student, prefix = trained(base), choose_prefix(base.tokenizer)
    split = base.tokenizer.convert_tokens_to_ids(["t", "h", "e", "Ġ"] * 2)

    def refuses(message, prefix=prefix, folder=tmp_path / "a", hub=tmp_path / "b"):
        with pytest.raises(ValueError) as e:
            write(student, base, folder, prefix, hub)
        assert message in str(e.value)
        assert [p.name for p in tmp_path.iterdir()] == ["there"]

    (tmp_path / "there").mkdir()
    refuses("there: exists already", folder=tmp_path / "there")
    refuses("there: exists already", hub=tmp_path / "there")
    refuses("found 7 tokens, expected a chunk, 8", prefix=prefix[:7])
    refuses("expected ids that their own text is spelled with", prefix=split)
    layer = student.model.layers[0].self_attn.k_proj_summary
    layer.weight = layer.weight * float("nan")
    refuses("k_proj_summary.weight: found NaN or Inf")


# The prefix


def test_a_prefix_is_a_chunk_that_its_own_text_spells(bases):
    tokenizer = bases["qwen3"].tokenizer
    for chunk in (6, 8, 12):
        prefix = choose_prefix(tokenizer, chunk)
        text = tokenizer.decode(prefix)
        assert len(prefix) == chunk and text.endswith("\n")
        for after in TEXTS:
            ids = tokenizer.encode(text + after, add_special_tokens=False)
            assert (
                ids == prefix + tokenizer.encode(after, add_special_tokens=False)
                or after[0] == "\n"
            )
    with pytest.raises(KSAError, match="found no beginning of 1 tokens"):
        choose_prefix(tokenizer, 1)


def with_bos(base):
    """A tokenizer that begins with a BOS, as Llama 3's, and so does its template."""
    tokenizer = with_prefix(base.tokenizer, [1])  # any copy
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    bos = [("<|im_start|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", pair="<|im_start|> $A $B", special_tokens=bos
    )
    return tokenizer


def test_a_bos_is_part_of_the_prefix(bases):
    plain = with_bos(bases["qwen3"])
    prefix = choose_prefix(plain)
    assert len(prefix) == 8 and prefix[0] == 1
    made = with_prefix(plain, prefix)
    body = made.encode("hi", add_special_tokens=False)
    assert made.encode("hi") == [*prefix, *body]
    chat = made.apply_chat_template(SAID, return_dict=False)
    assert chat == [*prefix, *plain.apply_chat_template(SAID, return_dict=False)[1:]]


@pytest.mark.parametrize(
    "template",
    ["{%- if true %}" + TEMPLATE + "{% endif %}", "\n" + TEMPLATE, {"default": TEMPLATE}],
)
def test_templates(bases, template):
    """One that takes the blanks before it away, and one of several."""
    plain = with_prefix(bases["qwen3"].tokenizer, [1])
    plain.chat_template = template
    prefix = choose_prefix(plain)
    if template == "\n" + TEMPLATE:  # would merge with the prefix's own line end
        with pytest.raises(KSAError, match="found a chat that begins"):
            with_prefix(plain, prefix)
        return
    chat = with_prefix(plain, prefix).apply_chat_template(SAID, return_dict=False)
    assert chat == [*prefix, *plain.apply_chat_template(SAID, return_dict=False)]


def test_other_classes_load_it_as_it_is(bases, tmp_path):
    """Qwen's and Llama's own classes would make the post-processor anew."""
    base = bases["qwen3"]
    prefix = choose_prefix(base.tokenizer)
    made = with_prefix(base.tokenizer, prefix)
    made.init_kwargs["add_bos_token"] = True
    save(made, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "add_bos_token" not in config
    loaded = mlx_lm.tokenizer_utils.load(tmp_path)
    assert loaded.encode("hi")[:8] == prefix
    assert loaded.eos_token_ids == {0}


@pytest.fixture
def prompts(written, monkeypatch):
    """What mlx-lm's commands have read of `SAID`: lists of ids."""
    found = []

    def read(model, tokenizer, prompt, *args, **kwargs):
        found.append(list(prompt))
        return iter(()) if kwargs.get("prompt_cache") else ""

    monkeypatch.setattr(sys.modules["mlx_lm.generate"], "generate", read)
    monkeypatch.setattr(mlx_lm.chat, "stream_generate", read)
    return found


@pytest.mark.parametrize(
    ("command", "flags"),
    [("generate", []), ("generate", ["--ignore-chat-template"]), ("chat", [])],
)
def test_mlx_lms_commands_read_the_prefix_once(written, prompts, monkeypatch, command, flags):
    _, prefix, mlx, _ = written
    tokenizer = ksa_mlx.load(mlx)[1]
    module = sys.modules[f"mlx_lm.{command}"]
    argv = [command, "--model", str(mlx), "--trust-remote-code", *flags]
    argv += ["--prompt", SAID[0]["content"]] if command == "generate" else []
    monkeypatch.setattr(sys, "argv", argv)
    if command == "chat":
        said = iter([SAID[0]["content"], "q"])
        monkeypatch.setattr(mlx_lm.chat.ChatUI, "prompt", lambda self: next(said))
        monkeypatch.setattr(mlx_lm.chat.ChatUI, "end_turn", lambda *args: None)
    module.main()
    text = SAID[0]["content"]
    if not flags:
        text = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert prompts == [[*prefix, *tokenizer.encode(text, add_special_tokens=False)]]


@pytest.mark.parametrize("use_template", [True, False])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_our_chat_reads_the_prefix_once(written, use_template, system):
    _, prefix, mlx, _ = written
    tokenizer = ksa_mlx.load(mlx)[1]
    conversation = Conversation(tokenizer, system, use_template)
    prompt = conversation.prompt("hi 12")
    assert prompt[:8] == prefix and prompt[8:16] != prefix
    opening = conversation.opening()
    assert opening == prompt[: len(opening)]
    conversation.answered("hi 12", "yes", [*prompt, 5])
    again = conversation.prompt("and")
    assert again[:8] == prefix and tokenizer.decode(again).count(tokenizer.decode(prefix)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("command", [OURS, STOCK])
def test_servers_read_the_prefix_once(written, tmp_path, command):
    _, prefix, mlx, _ = written
    tokenizer = ksa_mlx.load(mlx)[1]
    text = [*prefix, *tokenizer.encode("hi 12", add_special_tokens=False)]
    chat = tokenizer.apply_chat_template(SAID, add_generation_prompt=True)
    flags = ["--trust-remote-code"] if command == STOCK else []
    with serving(command, mlx, tmp_path / "log", *flags) as server:
        for body, read in (({"messages": SAID}, chat), ({"prompt": "hi 12"}, text)):
            answer = server.ask({**body, "max_tokens": 2}, chat="messages" in body)
            assert answer["prompt_tokens"] == len(read) and read[:8] == prefix
