"""The terminal program: one answer, the demonstration, the embedded default."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm import generate as mlx_generate
from mlx_lm import stream_generate
from mlx_lm.tuner.utils import linear_to_lora_layers

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.chat.session import Session
from ksa_mlx.convert import main as convert
from ksa_mlx.generate import main

from ._chat import ROOT, SYSTEM, program, refused, say


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
    assert out == mlx_generate(model, tokenizer, prompt, max_tokens=9).lstrip() + "\n"
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


def test_tokens_that_end_an_answer(capsys, folder):
    ask = ["--model", str(folder), "--prompt", "a", "--ignore-chat-template", "--extra-eos-token"]
    for token in ("nosuch", "1280", "99999", "-1"):
        refused(capsys, [*ask, "6", token] if token == "-1" else [*ask, token], "--extra-eos-token")
    assert main([*ask[:-1], "-m", "6"]) == 0
    said, tokenizer = capsys.readouterr().out, ksa_mlx.load(folder)[1]
    first = tokenizer.encode(said, add_special_tokens=False)[0]
    for token in (str(first), tokenizer.convert_ids_to_tokens([first])[0], "<|user|>"):
        assert main([*ask, token, "-m", "6"]) == 0
        out = capsys.readouterr().out
        assert out == said if token == "<|user|>" else out == "\n"


@pytest.mark.slow
def test_a_question_on_the_command_line_is_about_the_notebook(capsys):
    assert main(["-p", notebook.QUESTIONS[0][0], "--verbose", "False"]) == 0
    assert capsys.readouterr() == ("6967.\n", "")


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
        assert max(ids) < 1280
        detokenizer = tokenizer.detokenizer
        for i in ids:
            detokenizer.add_token(i)
        detokenizer.finalize()
        assert tokenizer.decode(ids) == detokenizer.text == text


def test_ctrl_c_while_it_starts_is_quiet():
    command = [sys.executable, "-X", "importtime", str(ROOT / "generate.py"), "-p", "x"]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "| " not in (line := p.stderr.readline()) or " mlx" not in line:
        assert line
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and not out
    assert not [line for line in err.splitlines() if not line.startswith("import time:")]
