"""Conversations on disk, and caches of mlx_lm.cache_prompt."""

import json
import shutil

import mlx.core as mx
import pytest
from mlx_lm import generate as mlx_generate
from mlx_lm import stream_generate
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.chat.conversation import Document
from ksa_mlx.chat.report import cache_bytes
from ksa_mlx.chat.session import Session
from ksa_mlx.errors import SessionError
from ksa_mlx.generate import main

from ._chat import SYSTEM, refused, say


def test_save_and_load(session, loaded, folder, tmp_path):
    file = tmp_path / "talk"
    say(session, "What is the locker of Maria?")
    session.save(file)
    session.save(file)  # over itself
    assert [f.name for f in tmp_path.iterdir()] == ["talk.safetensors"]
    other = Session(*loaded, str(folder), max_tokens=12)
    other.load(file)
    assert (other.tokens, other.conversation.messages) == (
        session.tokens,
        session.conversation.messages,
    )
    assert say(other, "Omar's bike?") == say(session, "Omar's bike?")
    assert other.usage.prompt_tokens == session.usage.prompt_tokens < 20
    assert cache_bytes(other) == cache_bytes(session)


def test_saved_file_is_mlx_lms_too(session, tmp_path):
    file = tmp_path / "talk.safetensors"
    say(session, "What is the locker of Maria?")
    session.save(file)
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert metadata["model"] == session.name and json.loads(metadata["tokenizer_config"]) == {}
    assert [c.offset for c in cache] == [session.offset] * 5


def test_save_refuses(session, tmp_path):
    with pytest.raises(SessionError, match="nothing to save"):
        session.save(tmp_path / "empty")
    say(session, "Omar's bike?")
    notes = tmp_path / "notes.safetensors"
    notes.write_text("mine")
    with pytest.raises(SessionError, match=r"notes.safetensors: found another kind of file"):
        session.save(notes)
    assert notes.read_text() == "mine"
    with pytest.raises(SessionError, match=r"no such folder: no such folder$"):
        session.save(tmp_path / "no such folder" / "talk")
    assert [f.name for f in tmp_path.iterdir()] == ["notes.safetensors"]


def test_load_refuses_another_models_cache(session, loaded, tmp_path):
    file = tmp_path / "talk"
    say(session, "Omar's bike?")
    session.save(file)
    model, _ = ksa_mlx.load_model(notebook.CHECKPOINT)
    norm = model.layers[3].mlp.up_proj
    norm.weight = norm.weight * 1.01
    other = Session(model, loaded[1], "a fine-tune")
    with pytest.raises(
        SessionError, match=r"cache of another model .* expected one of a fine-tune"
    ):
        other.load(file)
    assert other.offset == 0 and say(other, "Omar's bike?") is not None


@pytest.mark.parametrize(
    "damage", ["cut", "garbage", "empty", "layers", "offset", "window", "text"]
)
def test_load_refuses_damage(session, tmp_path, damage):
    file = tmp_path / "talk.safetensors"
    say(session, "Omar's bike?")
    session.save(file)
    before = session.tokens
    if damage in ("cut", "garbage", "empty"):
        data = file.read_bytes()
        file.write_bytes({"cut": data[:-100], "garbage": b"x" * 5000, "empty": b""}[damage])
    else:
        cache, metadata = load_prompt_cache(str(file), return_metadata=True)
        saved = json.loads(metadata["ksa_mlx"])
        if damage == "layers":
            cache = cache[:-1]
        if damage == "offset":
            cache[2].place = cache[2].place._replace(offset=session.offset - 1)
        if damage == "window":
            cache[1].place = cache[1].place._replace(window=9)
        if damage == "text":
            saved["tokens"] = "none"
        save_prompt_cache(str(file), cache, {**metadata, "ksa_mlx": json.dumps(saved)})
    with pytest.raises(SessionError, match=r"talk.safetensors: "):
        session.load(file)
    assert session.tokens == before  # the conversation stays as it was


def test_load_refuses_another_kind_of_file(session, folder):
    with pytest.raises(SessionError, match=r"model.safetensors: found no prompt cache"):
        session.load(folder / "model.safetensors")


def test_prompt_cache_file(capsys, session, folder, tmp_path):
    file = tmp_path / "talk"
    say(session, "What is the locker of Maria?")
    session.save(file)
    # The file names its model.
    assert main(["--prompt-cache-file", str(file), "--prompt", "Omar's bike?"]) == 0
    out, err = capsys.readouterr()
    assert out == say(session, "Omar's bike?").lstrip() + "\n"
    assert f"Prompt: {session.usage.prompt_tokens} tokens" in err
    refused(
        capsys,
        ["--prompt-cache-file", str(tmp_path / "none"), "-p", "x"],
        "none.safetensors: no such file",
    )
    file.with_suffix(".safetensors").write_bytes(b"{}")
    argv = ["--model", str(folder), "--prompt-cache-file", str(file), "-p", "x"]
    refused(capsys, argv, "talk.safetensors: ", "prompt cache")


def test_cache_of_mlx_lm_cache_prompt(capsys, loaded, folder, tmp_path):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": SYSTEM}]
    head = tokenizer.apply_chat_template(messages)
    cache = model.make_cache()
    for _ in stream_generate(model, tokenizer, head[:-1], max_tokens=1, prompt_cache=cache):
        pass
    cache = model.make_cache()
    model(mx.array(head)[None], cache=cache)
    file = tmp_path / "stock.safetensors"
    save_prompt_cache(str(file), cache, {"model": str(folder), "tokenizer_config": "{}"})
    argv = ["--prompt-cache-file", str(file), "--max-tokens", "8"]
    question = " What is Klara's code?"
    assert main([*argv, "--prompt", question]) == 0
    suffix = tokenizer.encode(f"{question}<|assistant|>", add_special_tokens=False)
    expected = mlx_generate(model, tokenizer, head + suffix, max_tokens=8)
    assert capsys.readouterr().out == expected.lstrip() + "\n"
    other = str(shutil.copytree(folder, tmp_path / "other"))
    refused(capsys, ["--model", other, *argv, "-p", "x"], "cache of another model")
    refused(capsys, argv, "answers one question: give --prompt")
    draft = ["--draft-model", str(folder)]
    refused(capsys, [*argv, *draft, "-p", "x"], "does not say which text it holds", "/save")
    with pytest.raises(SessionError, match="answers one question"):
        Session(model, tokenizer, str(folder)).load(file)


@pytest.mark.parametrize("template", [True, False])
def test_a_loaded_conversation_can_be_taken_back(loaded, folder, tmp_path, template):
    """Its turns, and the document that waits; files of earlier versions lack the latter."""
    file, kind = tmp_path / "talk.safetensors", {"use_template": template, "max_tokens": 4}
    session = Session(*loaded, str(folder), **kind, rollback=64)
    say(session, "The locker of Maria is 4821.")
    held = list(session.tokens)
    session.conversation.documents = [Document("a.txt", "Alpha.")]
    session.save(file)
    other = Session(*loaded, str(folder), **kind)
    other.load(file)
    assert other.undo() == "a.txt" and other.tokens == held
    assert other.undo() == "The locker of Maria is 4821." and not other.conversation.begun
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    saved = json.loads(metadata["ksa_mlx"])
    del saved["asked"], saved["documents"]
    save_prompt_cache(str(file), cache, {**metadata, "ksa_mlx": json.dumps(saved)})
    other.load(file)
    assert other.tokens == held and not other.conversation.documents
