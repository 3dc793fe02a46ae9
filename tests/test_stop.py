"""Where an answer ends: the tokens that a checkpoint's files name, and its template's own."""

import json

import mlx.core as mx
import mlx_lm
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

import ksa_mlx

from ._convert_helpers import convert, hub_folder, read_config, refused

# As Qwen3's, of the released 4B: a turn ends with <|im_end|>, while the files name <|endoftext|>.
CHATML = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{{- message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""
LLAMA2 = """{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {{ m.content }} [/INST]
{%- else %} {{ m.content }} </s>{% endif %}{% endfor %}"""
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
NO_TEXT = "{{ '<|im_end|>' }}"
REFUSES = "{{ raise_exception('no chat') }}"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>")


def folder_with(path, template, eos=90, generation=None):
    """A golden checkpoint with a tokenizer of 96 words, its last ones special, and a template."""
    source = hub_folder(path, eos_token_id=eos)
    names = [f"w{i}" for i in range(96 - len(SPECIAL))] + list(SPECIAL)
    tokenizer = Tokenizer(models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(SPECIAL))
    tokenizer.save(str(source / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config["eos_token"] = "<|endoftext|>"
    (source / "tokenizer_config.json").write_text(json.dumps(config))
    if generation is not None:
        (source / "generation_config.json").write_text(json.dumps(generation))
    return source


ENDOFTEXT, IM_END, S_END = 91, 93, 95


@pytest.mark.parametrize(
    "template, eos, generation, ids, added",
    [
        (CHATML, ENDOFTEXT, {"eos_token_id": ENDOFTEXT, "top_k": 1}, [ENDOFTEXT, IM_END], "im_end"),
        (CHATML, ENDOFTEXT, {"eos_token_id": [5, IM_END]}, [5, IM_END], None),
        (CHATML, [ENDOFTEXT, 7], None, [ENDOFTEXT, 7, IM_END], "im_end"),
        (CHATML, None, {"eos_token_id": None}, [ENDOFTEXT, IM_END], "im_end"),
        (LLAMA2, 7, {}, [7, S_END], "/s"),
        (NO_END, 7, None, [7], None),
        (NO_TEXT, 7, None, [7], None),
        (REFUSES, 7, None, [7], None),
        (None, 7, None, [7], None),
    ],
)
def test_the_template_ends_a_turn(template, eos, generation, ids, added, tmp_path, capsys):
    source = folder_with(tmp_path / "hub", template, eos, generation)
    assert convert(source, tmp_path / "mlx") == 0
    said = capsys.readouterr().out
    if added:
        assert f"{added}" in said and f"({ids[-1]}) to eos_token_id: the chat template" in said
        assert read_config(tmp_path / "mlx")["eos_token_id"] == ids
        if generation is not None:
            file = tmp_path / "mlx" / "generation_config.json"
            assert json.loads(file.read_text()) == {**generation, "eos_token_id": ids}
    else:
        assert "eos_token_id" not in said
        assert read_config(tmp_path / "mlx").get("eos_token_id") == eos
    # Converted or not, by us or by mlx-lm after import: the same tokens end an answer.
    for folder in (source, tmp_path / "mlx"):
        for load in (ksa_mlx.load, mlx_lm.load):
            _, tokenizer = load(str(folder))[:2]
            assert tokenizer.eos_token_ids == {*ids, ENDOFTEXT}
        assert ksa_mlx.load_model(folder)[1].get("eos_token_id") == ids


def test_a_chat_stops_there(tmp_path):
    """A model that says <|im_end|> and nothing else stops at once."""
    model, tokenizer = ksa_mlx.load(folder_with(tmp_path / "hub", CHATML, ENDOFTEXT))
    prompt = [5, 6]
    head = mx.zeros_like(model.lm_head.weight)
    head[IM_END] = model.model(mx.array([prompt]))[0, -1]
    model.lm_head.weight = head
    parts = list(mlx_lm.stream_generate(model, tokenizer, prompt, max_tokens=6))
    assert [p.token for p in parts] == [IM_END] and parts[-1].finish_reason == "stop"


@pytest.mark.parametrize(
    "eos", ["x", [2, "x"], {"a": 1}, -1, True, 2.5, [[2]], [None], 97, [5, 96]]
)
@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_odd_end_tokens_are_named(eos, where, tmp_path, capsys):
    if where == "config.json":
        source = folder_with(tmp_path / "hub", None, eos)
    else:
        source = folder_with(tmp_path / "hub", None, 90, {"eos_token_id": eos})
    message = refused(capsys, source, tmp_path / "mlx")
    assert message.startswith(f"error: {source / where}: eos_token_id: found {eos!r}, expected")
    for load in (ksa_mlx.load, ksa_mlx.load_model):
        with pytest.raises(ValueError) as e:
            load(source)
        assert f"error: {e.value}" == message


@pytest.mark.parametrize("content", ["null", "[]", "{,", "5"])
def test_odd_generation_configs_are_named(content, tmp_path, capsys):
    source = folder_with(tmp_path / "hub", None)
    (source / "generation_config.json").write_text(content)
    assert "generation_config.json: " in refused(capsys, source, tmp_path / "mlx")
    with pytest.raises(ValueError, match=r"generation_config\.json: "):
        ksa_mlx.load(source)


def test_a_broken_tokenizer(tmp_path, capsys):
    source = folder_with(tmp_path / "hub", CHATML)
    (source / "tokenizer.json").write_text("{")
    assert convert(source, tmp_path / "mlx") == 0
    assert f"warning: {source}: no tokenizer that loads" in capsys.readouterr().out
    (source / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="no tokenizer files"):
        ksa_mlx.load(source)
