"""The terminal program: one answer, the chat, the demonstration, and what they refuse."""

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_generate
from mlx_lm import stream_generate
from mlx_lm.generate import setup_arg_parser
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.tuner.utils import linear_to_lora_layers

import ksa_mlx
from ksa_mlx.chat import flags, notebook, reading
from ksa_mlx.chat.report import cache_bytes, cache_line, full_bytes
from ksa_mlx.chat.session import Session
from ksa_mlx.chat.terminal import chat, ctrl_c_stops
from ksa_mlx.convert import main as convert
from ksa_mlx.errors import ContextError, SessionError
from ksa_mlx.generate import main

ROOT = Path(__file__).parent.parent
SYSTEM = "The locker of Maria is 4821.\nOmar's bike is red.\nThe code of Klara is 775."


@pytest.fixture(scope="module", autouse=True)
def no_network():
    with pytest.MonkeyPatch.context() as m:
        m.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def folder():
    return notebook.CHECKPOINT


@pytest.fixture(scope="module")
def loaded(folder):
    return ksa_mlx.load(folder)


@pytest.fixture
def session(loaded, folder):
    return Session(*loaded, str(folder), system_prompt=SYSTEM, max_tokens=12)


def say(session: Session, text: str) -> str:
    return "".join(session.answer(text))


def fresh(session: Session, messages) -> str:
    """The answer of a model that reads the whole conversation at once."""
    prompt = session.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return mlx_generate(session.model, session.tokenizer, prompt, max_tokens=session.max_tokens)


def refused(capsys, argv, *words):
    """`main(argv)` fails with one line that has the words, and prints no answer."""
    try:
        status = main(argv)
    except SystemExit as e:  # argparse
        status = e.code
    out, err = capsys.readouterr()
    assert status not in (0, None)
    assert out.strip() == ""
    last = err.strip().splitlines()[-1]
    assert "error: " in last and "Traceback" not in err
    assert err.startswith("usage:") or len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in last, last


# One answer


def test_answer_is_mlx_lms(capsys, folder, loaded):
    model, tokenizer = loaded
    argv = ["--model", str(folder), "--system-prompt", SYSTEM.replace("\n", " ")]
    assert main([*argv, "--prompt", "What is the locker of Maria?", "--max-tokens", "9"]) == 0
    out, err = capsys.readouterr()
    messages = [
        {"role": "system", "content": SYSTEM.replace("\n", " ")},
        {"role": "user", "content": "What is the locker of Maria?"},
    ]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert out == mlx_generate(model, tokenizer, prompt, max_tokens=9) + "\n"
    assert f"Prompt: {len(prompt)} tokens" in err
    for name in ("Generation: ", "Peak memory: ", "KV cache: ", "full attention would hold"):
        assert name in err


def test_converted_and_unconverted_checkpoint(capsys, folder, tmp_path):
    converted = tmp_path / "converted"
    assert convert(["--hf-path", str(folder), "--mlx-path", str(converted)]) == 0
    capsys.readouterr()
    ask = ["--system-prompt", SYSTEM, "--prompt", "What is the locker of Maria?"]
    answers = []
    for model in (folder, converted):
        assert main(["--model", str(model), *ask]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_the_embedded_checkpoint_is_loaded_as_it_ships(capsys, folder, tmp_path, monkeypatch):
    """Nothing is written anywhere, and nothing else is read that could be stale or damaged."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    before = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert main(["--demo"]) == 0
    assert not list(tmp_path.iterdir())
    assert {f: f.stat().st_mtime_ns for f in folder.iterdir()} == before


def test_prompt_from_a_file_and_from_standard_input(capsys, folder, tmp_path, monkeypatch):
    (tmp_path / "prompt.txt").write_text("What is the code of Zoë?")
    (tmp_path / "system.txt").write_text("The code of Zoë is 552.")
    argv = ["--model", str(folder), "--system-prompt", f"@{tmp_path}/system.txt", "--prompt"]
    monkeypatch.setattr(
        sys, "stdin", io.TextIOWrapper(io.BytesIO("What is the code of Zoë?".encode()))
    )
    answers = []
    for prompt in (f"@{tmp_path}/prompt.txt", "-", "What is the code of Zoë?"):
        assert main([*argv, prompt]) == 0
        answers.append(capsys.readouterr())
    assert len({out for out, _ in answers}) == 1
    assert len({re.search(r"Prompt: (\d+) tokens", err).group(1) for _, err in answers}) == 1


def test_flags(capsys, folder):
    ask = ["--model", str(folder), "--prompt", "a", "--ignore-chat-template", "--max-tokens", "20"]
    sample = [*ask, "--temp", "1.5", "--top-p", "0.98", "--min-p", "0.001", "--top-k", "900"]

    def run(*argv):
        assert main(list(argv)) == 0
        return capsys.readouterr()

    assert run(*sample, "--seed", "1").out == run(*sample, "--seed", "1").out
    assert len({run(*sample, "--seed", str(i)).out for i in range(4)}) > 1
    # Steps change nothing but the steps; the raw prompt has one token.
    assert run(*ask, "--prefill-step-size", "1").out == run(*ask).out
    assert "Prompt: 1 tokens" in run(*ask).err
    out, err = run(*ask, "--verbose", "False", "--max-tokens", "1")
    assert len(out) < 20 and "KV cache" not in err


def test_plain_completion_without_a_template(capsys, folder, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    model, tokenizer = ksa_mlx.load(base)
    text = "The locker of Maria is"
    assert main(["--model", str(base), "--prompt", text, "--max-tokens", "8"]) == 0
    expected = mlx_generate(model, tokenizer, text, max_tokens=8)
    assert capsys.readouterr().out == expected + "\n"

    # A chat goes on with the same text.
    s = Session(model, tokenizer, str(base), max_tokens=4)
    first, second = say(s, text), say(s, " and")
    tokens = tokenizer.encode(text)
    for more, answer in (([], first), (tokenizer.encode(" and"), second)):
        tokens = tokens + more
        new = [r.token for r in stream_generate(model, tokenizer, tokens, max_tokens=4)]
        assert tokenizer.decode(new).strip() == answer.strip()
        tokens = tokens + new
    assert s.tokens == tokens


# Turns on one cache


def test_turns_read_only_what_is_new(session):
    said = list(session.conversation.messages)
    for question in ("What is the locker of Maria?", "Omar's bike?", "What is Klara's code?"):
        held = session.offset
        answer = say(session, question)
        said.append({"role": "user", "content": question})
        assert answer == fresh(session, said)
        full = session.tokenizer.apply_chat_template(said, add_generation_prompt=True)
        assert session.tokens[: len(full)] == full
        assert session.usage.prompt_tokens == len(full) - held
        assert session.offset == len(session.tokens) == session.cache[0].offset
        said.append({"role": "assistant", "content": answer})
    assert session.conversation.messages == said


def test_reading_ahead(session):
    n = session.read_ahead()
    assert n == session.offset == session.cache[-1].offset > 20
    answer = say(session, "Omar's bike?")
    assert session.usage.prompt_tokens < n
    assert answer == fresh(session, session.conversation.messages[:-1])


def test_a_template_that_rewrites_the_past(session, monkeypatch):
    """As Qwen3's does, which drops the thinking of earlier turns."""
    template = session.tokenizer.chat_template
    cut = "m['content'] | trim + '<|end|>'"
    assert cut in template
    monkeypatch.setattr(
        session.tokenizer._tokenizer,
        "chat_template",
        template.replace(cut, "(m['content'] | trim)[:2] + '<|end|>'"),
    )
    say(session, "What is the locker of Maria?")
    answer = say(session, "Omar's bike?")
    said = session.conversation.messages[:-1]
    assert answer == fresh(session, said)
    full = session.tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert session.usage.prompt_tokens == len(full)  # read again, from the start


def test_stop_in_an_answer(session):
    session.max_tokens = 40
    pieces = []
    for piece in session.answer("Omar's bike?"):
        pieces.append(piece)
        session.stop = True
    assert len(pieces) == 1 and session.usage.finish_reason == "stopped"
    assert session.conversation.messages[-1] == {"role": "assistant", "content": pieces[0]}
    assert {c.offset for c in session.cache} == {len(session.tokens)}
    assert say(session, "What is Klara's code?") == fresh(
        session, session.conversation.messages[:-1]
    )


@pytest.mark.parametrize("after", [0, 8, 16])
def test_stop_while_a_prompt_is_read(session, after):
    session.options["prefill_step_size"] = 8

    def progress(done, total):
        session.stop = done >= after

    session.progress = progress
    before = list(session.conversation.messages)
    assert say(session, "Omar's bike?") == "" and session.usage is None
    assert session.conversation.messages == before
    assert {c.offset for c in session.cache} == {len(session.tokens)} == {after}
    session.progress = lambda done, total: None
    assert say(session, "Klara's code?") == fresh(session, session.conversation.messages[:-1])


def test_interrupt_in_the_middle_of_a_step(session, monkeypatch):
    """A second Ctrl-C strikes anywhere: the layers' caches then disagree."""
    say(session, "What is the locker of Maria?")
    layer = session.model.layers[2].self_attn
    with monkeypatch.context() as m:
        m.setattr(type(layer), "__call__", _raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            say(session, "Omar's bike?")
    assert session.offset == 0 and len(session.conversation.messages) == 3
    assert say(session, "Omar's bike?") == fresh(session, session.conversation.messages[:-1])


def _raise_keyboard_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


NEEDS_A_QUESTION = (
    "{%- if messages[-1]['role'] != 'user' -%}{{ raise_exception('Ask.') }}{%- endif -%}"
)


@pytest.mark.parametrize(
    "template",
    [
        NEEDS_A_QUESTION + "{%- for m in messages -%}{{- '<|user|> ' + m['content'] -}}"
        "{%- endfor -%}{{- '<|assistant|>' -}}",
        # The system prompt is part of the user's first turn.
        NEEDS_A_QUESTION + "{{- '<|user|> ' + messages[0]['content'] + ' ' -}}"
        "{%- for m in messages[1:] -%}{{- m['content'] -}}{%- endfor -%}{{- '<|assistant|>' -}}",
    ],
)
def test_reading_ahead_where_the_template_wants_a_question(session, monkeypatch, template):
    monkeypatch.setattr(session.tokenizer._tokenizer, "chat_template", template)
    n = session.read_ahead()
    assert n == session.offset > 20
    answer = say(session, "Omar's bike?")
    assert session.usage.prompt_tokens < n
    assert answer == fresh(session, session.conversation.messages[:-1])


def test_a_template_that_refuses(session, monkeypatch, capsys, folder):
    refusal = "{{ raise_exception('No system prompts.') }}"
    monkeypatch.setattr(session.tokenizer._tokenizer, "chat_template", refusal)
    for act in (session.read_ahead, lambda: say(session, "Omar's bike?")):
        with pytest.raises(SessionError, match=r"^chat template: refused .*No system prompts"):
            act()


def test_one_beginning_of_the_text_whoever_writes_it(session, monkeypatch):
    model, tokenizer = session.model, session.tokenizer
    encode = tokenizer._tokenizer.encode

    def with_bos(text, add_special_tokens=True, **kwargs):
        ids = encode(text, add_special_tokens=False, **kwargs)
        return [tokenizer.bos_token_id, *ids] if add_special_tokens else ids

    monkeypatch.setattr(tokenizer._tokenizer, "encode", with_bos)
    for system in (None, "<s>Notes.", "Notes."):
        for text in ("hello", "<s>hello"):
            s = Session(model, tokenizer, "m", system_prompt=system, use_template=False)
            prompt = s._prompt(text)[0]
            typed = bool(system) and text.startswith("<s>")
            assert prompt[0] == tokenizer.bos_token_id and prompt.count(prompt[0]) == 1 + typed


def test_several_lines_can_be_continued(loaded):
    """mlx_lm.cache_prompt's way to read the beginning of a turn."""
    tokenizer = loaded[1]
    for text in ("one line", "two\nlines", "two\n lines\n\nmore\n", "a"):
        turn = [{"role": "user", "content": text}]
        begun = tokenizer.apply_chat_template(turn, continue_final_message=True)
        full = tokenizer.apply_chat_template(turn, add_generation_prompt=False)
        assert begun == full


def test_text_that_is_not_utf8(session):
    with pytest.raises(SessionError, match=r"^prompt: the text is not UTF-8$"):
        say(session, "caf\udce9")


@pytest.mark.parametrize("rate", [2000, 120, 20])
def test_steps_are_sized_by_time(rate):
    """Rates of tokens a second. No step but the first takes more than two seconds."""
    sizes, clock = [], [0.0]

    def model(part, cache):
        sizes.append(part.shape[1])
        clock[0] += part.shape[1] / rate

    with pytest.MonkeyPatch.context() as m:
        m.setattr(reading.time, "perf_counter", lambda: clock[0])
        done = list(reading.read([(model, [])], list(range(6000)), 2048))
    assert done == [0, *np.cumsum(sizes)] and done[-1] == 6000
    assert all(n <= 2 * rate for n in sizes[1:]) and max(sizes) <= 2048
    assert sizes[1] >= min(rate / 2, 1024)


def test_context(session, monkeypatch):
    question = "What is the locker of Maria?"
    messages = [*session.conversation.messages, {"role": "user", "content": question}]
    n = len(session.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    monkeypatch.setattr(session.model.args, "max_position_embeddings", n)
    with pytest.raises(SessionError, match=rf"found {n} tokens, .* context of {n}"):
        say(session, question)
    session.model.args.max_position_embeddings = n + 2
    say(session, question)
    assert session.offset == n + 2 and session.usage.finish_reason == "context"
    with pytest.raises(ContextError, match="context"):
        say(session, "Omar's bike?")
    assert session.offset == n + 2  # nothing is forgotten


def test_a_full_context_says_what_to_do(session, monkeypatch, capsys):
    monkeypatch.setattr(session.model.args, "max_position_embeddings", 40)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the locker of Maria?\n"))
    assert chat(session) == 1
    err = capsys.readouterr().err
    assert "expected fewer than the context of 40" in err and "/reset begins a new" in err


def test_reset(session):
    first = say(session, "Omar's bike?")
    say(session, "What is Klara's code?")
    session.reset()
    assert session.offset == 0 == cache_bytes(session) and len(session.conversation.messages) == 1
    assert say(session, "Omar's bike?") == first


def test_statistics(session):
    """Like with like: what attention reads, of ours and of full attention, not what is reserved."""
    layers, heads, dim, size, k, window = 5, 2, 64, 2, 8, 4
    row = 2 * layers * heads * dim * size
    for text in ("Omar's bike?", "What is Klara's code?", "And " * 90):
        say(session, text)
        n = session.offset
        assert full_bytes(session) == row * n
        gone = max(0, (n - 1) // k - window)
        assert cache_bytes(session) == row * (n - gone * k + gone)
        ratio = full_bytes(session) / cache_bytes(session)
        assert cache_line(session).endswith(f"{ratio:.2f} times as much")
    assert ratio > 1.5
    session.reset()
    session.conversation.messages.clear()
    say(session, "a")
    assert cache_bytes(session) == full_bytes(session) > 0


def test_a_cache_that_is_quantised_later_says_so(session):
    session.options.update(kv_bits=4, kv_group_size=32)
    say(session, "Omar's bike?")
    assert cache_line(session).endswith("; quantised from 5,000 tokens on (--quantized-kv-start)")


# Saved conversations


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
    assert out == say(session, "Omar's bike?") + "\n"
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
    assert capsys.readouterr().out == expected + "\n"
    other = str(shutil.copytree(folder, tmp_path / "other"))
    refused(capsys, ["--model", other, *argv, "-p", "x"], "cache of another model")
    refused(capsys, argv, "answers one question: give --prompt")
    draft = ["--draft-model", str(folder)]
    refused(capsys, [*argv, *draft, "-p", "x"], "a draft model would have to read", "/save")
    with pytest.raises(SessionError, match="answers one question"):
        Session(model, tokenizer, str(folder)).load(file)


# What is refused


def test_bad_prompts(capsys, folder, tmp_path):
    ask = ["--model", str(folder)]
    refused(capsys, [*ask, "--prompt", ""], "zero tokens")
    refused(capsys, [*ask, "--prompt", "", "--ignore-chat-template"], "zero tokens")
    refused(capsys, [*ask, "--prompt", f"@{tmp_path}/none"], "--prompt", "none", "No such file")
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    refused(capsys, [*ask, "--prompt", f"@{tmp_path}/latin"], "latin is not UTF-8 at byte 3")
    (tmp_path / "long").write_text("a b " * 40_000)
    refused(capsys, [*ask, "--prompt", f"@{tmp_path}/long"], "tokens", "context of 32,768")


@pytest.mark.parametrize(
    "given, expected",
    [
        ("--max-tokens 0", "--max-tokens: found 0, expected at least 1, or -1 for no limit"),
        ("--max-tokens many", "--max-tokens/-m: invalid int value: 'many'"),
        ("--temp -1", "--temp: found -1.0, expected a number of at least 0"),
        ("--temp nan", "--temp: found nan"),
        ("--temp inf", "--temp: found inf"),
        ("--temp 1 --top-p 1.5", "--top-p: found 1.5, expected more than 0 and at most 1"),
        ("--temp 1 --top-p 0", "--top-p: found 0.0"),
        ("--temp 1 --top-k -1", "--top-k: found -1"),
        ("--temp 1 --top-k 99999", "--top-k: found 99999, expected less than the model's"),
        ("--temp 1 --min-p 2", "--min-p: found 2.0"),
        ("--temp 1 --xtc-probability 2", "--xtc-probability: found 2.0"),
        ("--temp 1 --xtc-probability 1 --xtc-threshold 1", "--xtc-threshold: found 1.0"),
        ("--repetition-penalty 0", "--repetition-penalty: found 0.0"),
        ("--prefill-step-size 0", "--prefill-step-size: found 0"),
        ("--chat-template-config [1", "--chat-template-config: found '[1', expected a JSON object"),
        ('--chat-template-config {"tokenize":false}', "--chat-template-config: found 'tokenize'"),
        ("--seed 99999999999999999999999", "--seed: found 99999999999999999999999"),
        ("--system-prompt @", "--system-prompt: found @"),
        ("--kv-bits 7", "--kv-bits: found 7, expected 2, 3, 4, 5, 6 or 8"),
        ("--verbose maybe", "--verbose: found 'maybe', expected True or False"),
        ("--adapter-path none", "--adapter-path: none: found no adapter_config.json"),
        # What means nothing is not passed over.
        ("--max-kv-size 512", "--max-kv-size: not needed"),
        ("--image a.png", "--image: a KSA model reads text only"),
        ("--use-default-chat-template", "--use-default-chat-template: not needed"),
        ("--quantize-activations", "--quantize-activations: expected weights in nvfp4 or mxfp8"),
        ("--top-p 0.9", "--top-p: needs --temp above 0"),
        ("--min-p 0.1", "--min-p: needs --temp above 0"),
        ("--kv-group-size 64", "--kv-group-size: needs --kv-bits"),
        ("--quantized-kv-start 0", "--quantized-kv-start: needs --kv-bits"),
        ("--num-draft-tokens 3", "--num-draft-tokens: needs --draft-model"),
        ("--repetition-context-size 9", "--repetition-context-size: needs --repetition-penalty"),
        ("--temp 1 --xtc-threshold 0.2", "--xtc-threshold: needs --xtc-probability"),
        (
            "--system-prompt x --prompt-cache-file y",
            "--system-prompt: not together with --prompt-c",
        ),
        ("--prefill-response x --ignore-chat-template", "write the beginning behind the prompt"),
        ("--demo", "--demo: not together with --prompt"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_flags(capsys, folder, given, expected):
    refused(capsys, ["--model", str(folder), "--prompt", "x", *given.split()], expected)


def test_bad_flags_without_a_prompt(capsys, folder):
    refused(capsys, ["--model", "", "--prompt", "x"], "--model: found nothing")
    refused(capsys, ["--model", str(folder), "--prompt", "\udcff"], "--prompt", "UTF-8")
    refused(capsys, ["--demo", "--system-prompt", "x"], "--demo: not together with --system-prompt")
    refused(capsys, ["--prefill-response", "x"], "--prefill-response: needs --prompt")


def test_every_flag_of_mlx_lms_has_a_meaning_or_is_refused():
    ours = {a.dest for a in flags.parser()._actions}
    assert {a.dest for a in setup_arg_parser()._actions} <= ours
    checked = {*flags.MEANINGLESS, *flags.LIMITS, *flags.NEEDS, *flags.SAMPLING}
    assert checked <= ours and {x for pair in flags.EXCLUSIVE for x in pair[:2]} <= ours
    # What nobody reads is ignored.
    code = (ROOT / "ksa_mlx/generate.py").read_text() + (ROOT / "ksa_mlx/chat/flags.py").read_text()
    for name in ours - {"help"} - set(flags.MEANINGLESS):
        assert f"args.{name}" in code or f'"{name}"' in (ROOT / "ksa_mlx/generate.py").read_text()


def test_an_answer_that_has_begun(capsys, folder, loaded):
    model, tokenizer = loaded
    ask = ["--model", str(folder), "--system-prompt", SYSTEM, "--prompt", "Omar's bike?"]
    assert main([*ask, "--prefill-response", "The bike of", "--max-tokens", "9"]) == 0
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "Omar's bike?"},
        {"role": "assistant", "content": "The bike of"},
    ]
    prompt = tokenizer.apply_chat_template(messages, continue_final_message=True)
    expected = mlx_generate(model, tokenizer, prompt, max_tokens=9)
    assert capsys.readouterr().out == expected + "\n"


def test_adapters(capsys, folder, loaded, tmp_path):
    """An adapter of zeros changes nothing, one of numbers does, and a damaged one has a name."""
    ask = ["--model", str(folder), "--ignore-chat-template", "--prompt", "The locker of Maria is"]

    def answer():
        assert main([*ask, "--adapter-path", str(tmp_path), "--max-tokens", "9"]) == 0
        return capsys.readouterr().out

    parameters = {"rank": 2, "scale": 20.0, "dropout": 0.0, "keys": ["self_attn.v_proj"]}
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    refused(capsys, [*ask, "--adapter-path", str(tmp_path)], f"--adapter-path: {tmp_path}: ")
    model, _ = ksa_mlx.load(folder)
    linear_to_lora_layers(model, 2, parameters)
    weights = dict(tree_flatten(model.trainable_parameters()))
    weights = {name: w for name, w in weights.items() if "lora" in name}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), weights)
    assert main([*ask, "--max-tokens", "9"]) == 0
    plain = capsys.readouterr().out
    assert answer() == plain
    changed = {name: mx.ones_like(w) * (-1) ** i for i, (name, w) in enumerate(weights.items())}
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), changed)
    assert answer() != plain


def test_a_penalty_sees_the_prompt_as_mlx_lms_does(session):
    """The prompt is read before mlx-lm sees it: its processors are shown it none the less."""
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    session.options.update(logits_processors=[processor], prefill_step_size=8)
    prompt, _ = session._prompt("Omar's bike?")
    say(session, "Omar's bike?")
    assert seen[0] == prompt and len(prompt) > 16
    n = len(prompt)
    assert [x[n:] for x in seen] == [session.tokens[n : n + i] for i in range(len(seen))]
    held = session.offset
    seen.clear()
    say(session, "And Klara's code?")
    assert seen[0] == session.tokens[held : held + len(seen[0])]


def test_a_bad_choice_of_kernels(capsys, folder, monkeypatch):
    monkeypatch.setenv("KSA_MLX_KERNELS", "fast")
    refused(capsys, ["--model", str(folder), "--prompt", "x"], "KSA_MLX_KERNELS", "'fast'")


def test_bad_models(capsys, tmp_path):
    def ask(model):
        return ["--model", str(model), "--prompt", "x"]

    refused(capsys, ask("nobody/no-such-model"), "nobody/no-such-model")
    refused(capsys, ask(tmp_path / "none"), "none")
    refused(capsys, ask(tmp_path), "config.json")
    broken = tmp_path / "broken"
    shutil.copytree(notebook.CHECKPOINT, broken)
    data = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[:-999])
    refused(capsys, ask(broken), "model.safetensors")
    (broken / "model.safetensors").write_bytes(data)
    for file in broken.glob("tokenizer*"):
        file.unlink()
    refused(capsys, ask(broken), "tokenizer")


def test_ids_outside_the_text_vocabulary(capsys, folder, tmp_path):
    """A tokenizer may know the summary token by name; nobody can type it into the model."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    config = json.loads((other / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["1536"] = {
        **config["added_tokens_decoder"]["6"],
        "content": "<|summary|>",
    }
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    argv = ["--model", str(other), "--prompt", "a <|summary|> b"]
    refused(capsys, argv, "token 1536", "<|summary|>", "0 to 1535")


def test_tokens_that_end_an_answer(capsys, folder):
    ask = ["--model", str(folder), "--prompt", "a", "--ignore-chat-template", "--extra-eos-token"]
    for token in ("nosuch", "1536", "99999", "-1"):
        refused(capsys, [*ask, "6", token] if token == "-1" else [*ask, token], "--extra-eos-token")
    assert main([*ask[:-1], "-m", "6"]) == 0
    said, tokenizer = capsys.readouterr().out, ksa_mlx.load(folder)[1]
    first = tokenizer.encode(said, add_special_tokens=False)[0]
    for token in (str(first), tokenizer.convert_ids_to_tokens([first])[0], "<|user|>"):
        assert main([*ask, token, "-m", "6"]) == 0
        out = capsys.readouterr().out
        assert out == said if token == "<|user|>" else out == "\n"


# The embedded default


@pytest.mark.slow
def test_a_question_on_the_command_line_is_about_the_notebook(capsys):
    assert main(["-p", notebook.QUESTIONS[0][0], "--verbose", "False"]) == 0
    assert capsys.readouterr() == (" 6967.\n", "")


@pytest.mark.slow
def test_questions_in_a_pipe_are_answered():
    done = program(input=f"{notebook.QUESTIONS[0][0]}\n")
    assert done.returncode == 0 and done.stdout == "6967.\n", done
    assert "KV cache: " in done.stderr


@pytest.mark.slow
def test_a_pipe_with_nothing_in_it_gets_the_demonstration():
    """One that is empty, and one that nobody writes to and nobody closes."""
    read, write = os.pipe()
    try:
        done = program("--demo", "--max-tokens", "4", stdin=read)
        assert done.returncode == 0 and done.stdout.count("Question: ") == 3
        silent = program("--max-tokens", "4", stdin=read)
        assert silent.stdout.count("Question: ") == 3
        assert "(no question on standard input within 2 s)" in silent.stderr
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    "flags, status, says",
    [
        ("", 1, "error: standard input is closed: give --prompt or --demo\n"),
        ("-p -", 1, "error: --prompt: standard input is closed\n"),
        ("-p hi -m 2 --verbose False --ignore-chat-template", 0, ""),
    ],
)
@pytest.mark.slow
def test_closed_standard_input(flags, status, says):
    command = f'exec "{sys.executable}" "{ROOT}/generate.py" {flags} <&-'
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (status, says)


@pytest.mark.slow
def test_demo(capsys, monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert main([]) == 0
    out, _ = capsys.readouterr()
    for question, note in notebook.QUESTIONS:
        assert question in out and note in out and note in notebook.notes()
    answers = re.findall(r"Answer: +(.*)", out)
    right = sum(
        a.rstrip(".") in note for a, (_, note) in zip(answers, notebook.QUESTIONS, strict=True)
    )
    assert len(answers) == 3 and right >= 2
    held, full = re.search(r"KV cache: ([\d.]+) MB .* hold ([\d.]+) MB", out).groups()
    assert float(full) > 3 * float(held)


def test_embedded_tokenizer_round_trips(loaded):
    tokenizer = loaded[1]
    for text in ("Zoë's code is 12:35 — ok", "日本語 🦊", "  two  spaces\n\n\tx", "a<|end|>b"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert max(ids) < 1536
        detokenizer = tokenizer.detokenizer
        for i in ids:
            detokenizer.add_token(i)
        detokenizer.finalize()
        assert tokenizer.decode(ids) == detokenizer.text == text


# The chat, in a terminal and in a pipe


def program(*argv, **kwargs):
    command = [sys.executable, str(ROOT / "generate.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


class Terminal:
    """A chat behind a pseudo-terminal."""

    def __init__(self, *argv):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "dumb"
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under a script's background job
            os.execv(sys.executable, [sys.executable, str(ROOT / "generate.py"), *argv])
        termios.tcsetwinsize(self.fd, (24, 100))  # a bar needs room
        self.text = ""

    def until(self, pattern: str, seconds: float = 60) -> str:
        """Read until the pattern; returns what came before, and forgets both."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            if not select.select([self.fd], [], [], max(0, end - time.monotonic()))[0]:
                raise AssertionError(f"waited for {pattern!r}, found {self.text!r}")
            try:
                data = os.read(self.fd, 65536)
            except OSError:  # Linux: the other side is closed
                data = b""
            if not data:
                raise AssertionError(f"ended before {pattern!r}: {self.text!r}")
            self.text += data.decode("utf-8", "replace")
        before, self.text = self.text[: found.start()], self.text[found.end() :]
        return before

    def say(self, line: str, pattern: str) -> str:
        os.write(self.fd, line.encode() + b"\n")
        return self.until(pattern)

    def ctrl_c_at_the_prompt(self, pattern: str):
        """Press Ctrl-C, and again where nothing happens, as a person would, until all is quiet.

        Python sees one that comes between readline's prompt and its select() at the next key only
        (CPython, Modules/readline.c: readline_until_enter_or_signal). And the terminal, without
        NOFLSH, drops what is on its way to us (termios(3), ISIG).
        """
        for _ in range(6):
            os.write(self.fd, b"\x03")
            try:
                self.until(pattern, 10)
            except AssertionError:
                continue
            while select.select([self.fd], [], [], 2)[0]:
                self.text += os.read(self.fd, 65536).decode("utf-8", "replace")
            return
        raise AssertionError(f"Ctrl-C six times, and no {pattern!r}: {self.text!r}")

    def end(self) -> int:
        while select.select([self.fd], [], [], 30)[0]:
            try:
                data = os.read(self.fd, 65536)
            except OSError:
                break
            if not data:
                break
            self.text += data.decode("utf-8", "replace")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.slow
def test_chat_in_a_terminal(tmp_path):
    talk = tmp_path / "talk"
    t = Terminal("--max-tokens", "-1", "--temp", "0")
    try:
        greeting = t.until("\n> ")
        question, _ = notebook.QUESTIONS[0]
        assert question in greeting and "/help" in greeting
        loaded_tokens = re.search(r"\(([\d,]+) tokens\)", greeting).group(1)

        first = t.say(question, r"tokens read at.*\r\n> ")
        assert first.strip()
        stats = t.say("/stats", "\n> ")
        assert "tokens-per-sec" in stats and "KV cache: " in stats and "Peak memory" in stats
        saved = t.say(f"/save {talk}", "\n> ")
        assert "saved" in saved and talk.with_suffix(".safetensors").stat().st_size > 1000
        assert "a new conversation" in t.say("/reset", "\n> ")
        assert "for 0 tokens" in t.say("/stats", "\n> ")
        assert re.search(r"loaded [\d,]+ tokens", t.say(f"/load {talk}", "\n> "))
        # Asked again after it was loaded, only the question is read.
        t.say(question, r"\n?\[")
        read = t.until(r" tokens read at.*\r\n> ")
        assert int(read.replace(",", "")) < 40 < int(loaded_tokens.replace(",", ""))
        assert "error: /save: expected a file name" in t.say("/save", "\n> ")
        assert "no such file" in t.say("/load none", "\n> ")
        assert "no such command" in t.say("/nonsense", "\n> ")
        assert "/reset" in t.say("/help", "\n> ") and "/reset" in t.say("/?", "\n> ")
        assert "expected nothing behind it" in t.say("/quit now", "\n> ")
        several = t.say('"""Tom\'s bike is red.\nThe hat of Tom is blue.\n"""', r"read at.*\r\n> ")
        assert several.count("... ") == 2
        t.ctrl_c_at_the_prompt("Ctrl-D")
        os.write(t.fd, b"\x04")  # Ctrl-D
        assert t.end() == 0
        assert "KV cache: " in t.text
    finally:
        os.close(t.fd)


@pytest.mark.slow
def test_ctrl_c_stops_the_answer(tmp_path):
    """An answer without an end: plain completion, sampled so that it does not stop by itself."""
    t = Terminal(
        *("--model", str(notebook.CHECKPOINT), "--ignore-chat-template", "--max-tokens", "20000"),
        *("--temp", "30", "--seed", "3"),
    )
    try:
        t.until("> ")
        for _ in range(2):
            os.write(t.fd, b"The locker\n")
            t.until(r"locker\r\n(?s:.{20})")  # the echo, and some of the answer
            os.write(t.fd, b"\x03")
            t.until(r"\[stopped; (?s:.*)> ", 20)
        assert "KV cache" in t.say("/stats", "\n> ")
        t.say("/quit", "KV cache")
        assert t.end() == 0
    finally:
        os.close(t.fd)


@pytest.mark.slow
def test_ctrl_c_while_a_prompt_is_read():
    """The bar goes, what was read stays read, and the chat says how much that is."""
    t = Terminal()
    try:
        t.until("Reading:")
        pressed = time.monotonic()
        os.write(t.fd, b"\x03")
        t.until(r"\(stopped: ")
        read, total = re.match(r"([\d,]+) of ([\d,]+)$", t.until(" tokens are read")).groups()
        assert time.monotonic() - pressed < 10  # a step of about a second, on a busy machine
        greeting = t.until("\n> ")
        assert f"{read} of {total} tokens" in greeting and "Reading" not in greeting
        read, total = (int(n.replace(",", "")) for n in (read, total))
        assert 0 < read < total
        assert f"for {read:,} tokens" in t.say("/stats", "\n> ")
        t.say(notebook.QUESTIONS[0][0], r"6967\.\r\n")
        rest = re.search(r"([\d,]+) tokens read", t.until("a second"))[1]
        assert total - read < int(rest.replace(",", "")) < total - read + 30
    finally:
        os.close(t.fd)


@pytest.mark.slow
def test_ctrl_c_is_answered_at_once(session, capsys):
    """Python's own handlers run only when MLX gives control back, after the step."""
    begin, seen = time.monotonic(), []

    def press():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        while not session.stop and time.monotonic() < begin + 20:
            time.sleep(0.01)
        seen.append(time.monotonic())

    thread = threading.Thread(target=press)
    a = mx.random.normal((1500, 1500))
    with ctrl_c_stops(session):
        thread.start()
        while time.monotonic() < begin + 1.5:
            for _ in range(20):
                a = (a @ a) * 1e-2
            mx.eval(a)
        ended = time.monotonic()
    thread.join()
    assert session.stop and seen[0] < ended
    assert "(stopping after this step)" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), ctrl_c_stops(session):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_while_it_starts_is_quiet():
    command = [sys.executable, "-X", "importtime", str(ROOT / "generate.py"), "-p", "x"]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "| " not in (line := p.stderr.readline()) or " mlx" not in line:
        assert line
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and not out
    assert not [line for line in err.splitlines() if not line.startswith("import time:")]


@pytest.mark.slow
def test_chat_in_a_pipe_and_ctrl_c_without_one(folder, tmp_path):
    """Lines from a pipe are turns too; and one answer that is stopped ends with 130."""
    command = [sys.executable, str(ROOT / "generate.py"), "--model", str(folder)]
    lines = (
        f"Maria's locker is 4821. Maria's locker?\n/save {tmp_path}/t\n/load {tmp_path}/t\n/stats\n"
    )
    r = subprocess.run(command, input=lines, capture_output=True, text=True, timeout=60)
    assert r.returncode == 0 and r.stdout.count("KV cache: ") == 1, r
    assert "KV cache: " in r.stderr and "Traceback" not in r.stderr
    failed = subprocess.run(command, input="/load none\n", capture_output=True, text=True)
    assert failed.returncode == 1 and failed.stderr == "error: none.safetensors: no such file\n"
    assert "(saved " in r.stdout and "(loaded " in r.stdout

    endless = ["--ignore-chat-template", "-p", "a", "--temp", "30", "-m", "20000"]
    p = subprocess.Popen([*command, *endless], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert p.stdout.read(20)
    p.send_signal(signal.SIGINT)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 130 and b"KV cache" in err and b"Traceback" not in err
