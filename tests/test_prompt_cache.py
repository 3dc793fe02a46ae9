"""Prompt caches in files, by mlx-lm's own commands, by those through ksa_mlx, and by ours."""

import json
import shutil
import subprocess
import sys

import pytest
from mlx_lm import generate
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache
from mlx_lm.utils import load

from ksa_mlx.chat import notebook
from ksa_mlx.generate import main

from ._server import environment

# Several lines, which the template changes: mlx_lm.cache_prompt looks for them as they are.
NOTES = "\n".join(notebook.notes().splitlines()[:25])
QUESTION = " What is the phone of Hugo?"


def run(*argv, stdin=None, **env):
    return subprocess.run(
        [sys.executable, "-m", *map(str, argv)],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(**env),
    )


@pytest.fixture(scope="module")
def model(notebook_models):
    return notebook_models[0]


@pytest.fixture(scope="module")
def file(model, tmp_path_factory):
    """A file of the stock mlx_lm.cache_prompt."""
    file = tmp_path_factory.mktemp("caches") / "notes.safetensors"
    argv = ("--model", model, "--prompt", NOTES, "--prompt-cache-file", file)
    done = run("mlx_lm", "cache_prompt", "--trust-remote-code", *argv)
    assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def expected(model):
    """The answer without a cache file."""
    loaded, tokenizer = load(str(model))
    messages = [{"role": "user", "content": f"{NOTES}{QUESTION}"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    return generate(loaded, tokenizer, prompt, max_tokens=12)


def refused(done, *words):
    assert done.returncode == 1 and not done.stdout.strip(), done
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and "Traceback" not in done.stderr
    for word in words:
        assert word in last, last


@pytest.mark.slow
@pytest.mark.feature("Prompt cache, writing", "`mlx_lm.cache_prompt`", "works")
def test_cache_prompt(file):
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    assert {type(c).__name__ for c in cache} == {"RollingSummaryCache"}
    assert all(c.offset > 300 for c in cache) and "model" in metadata


@pytest.mark.slow
@pytest.mark.feature(
    "Prompt cache, reading",
    "`python -m ksa_mlx generate --prompt-cache-file`, `generate.py --prompt-cache-file`",
    "works with our commands; `mlx_lm.generate` reads the file before any model is known to it",
)
def test_reading(file, model, expected, capsys):
    done = run(
        "ksa_mlx",
        "generate",
        "--prompt-cache-file",
        file,
        "--prompt",
        QUESTION,
        "--max-tokens",
        12,
        "--verbose",
        "False",
    )
    assert done.returncode == 0 and done.stdout.rstrip("\n") == expected.lstrip(), done.stderr
    argv = ["--prompt-cache-file", str(file), "--prompt", QUESTION, "--max-tokens", "12"]
    assert main(argv) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.lstrip()
    stock = run(
        "mlx_lm",
        "generate",
        "--trust-remote-code",
        "--prompt-cache-file",
        file,
        "--prompt",
        QUESTION,
    )
    assert stock.returncode != 0 and "KeyError: 'RollingSummaryCache'" in stock.stderr


@pytest.mark.slow
@pytest.mark.feature("Prompt cache of another model, or damaged", "as above", "refused in one line")
def test_refusals(file, model, notebook_models, tmp_path, capsys):
    ask = ("--prompt", QUESTION, "--prompt-cache-file")

    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(file.read_bytes()[:-5000])
    refused(run("ksa_mlx", "generate", *ask, damaged), str(damaged), "damaged")
    refused(
        run("ksa_mlx", "generate", "--model", notebook_models[1], *ask, file),
        "found a cache of another model",
    )
    refused(run("ksa_mlx", "generate", *ask, tmp_path / "none.safetensors"), "no such file")

    # Another model under the same name.
    changed = shutil.copytree(model, tmp_path / "model")
    config = json.loads((changed / "config.json").read_text())
    config["summary_sliding_chunk_num"] = "[5]*5"
    (changed / "config.json").write_text(json.dumps(config))
    cache, metadata = load_prompt_cache(str(file), return_metadata=True)
    other = tmp_path / "other.safetensors"
    save_prompt_cache(str(other), cache, {**metadata, "model": str(changed)})
    refused(run("ksa_mlx", "generate", *ask, other), "does not hold", "of this model")
    assert main(["--model", str(changed), *ask, str(file)]) == 1
    assert "found a cache of another model" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.feature("Prompt cache, quantised", "`mlx_lm.cache_prompt --kv-bits`", "works")
def test_quantised_file(model, tmp_path, capsys, expected):
    file = tmp_path / "q8.safetensors"
    bits = ("--kv-bits", 8, "--kv-group-size", 32)
    done = run(
        "mlx_lm",
        "cache_prompt",
        "--trust-remote-code",
        "--model",
        model,
        "--prompt",
        NOTES,
        "--prompt-cache-file",
        file,
        *bits,
        "--quantized-kv-start",
        0,
    )
    assert done.returncode == 0, done.stderr
    cache = load_prompt_cache(str(file))
    assert cache[0].storage.bits == 8
    ask = ["--prompt-cache-file", str(file), "--prompt", QUESTION, "--max-tokens", "12"]
    assert main([*ask, *map(str, bits)]) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected.lstrip()


@pytest.mark.slow
@pytest.mark.feature("Chat in a terminal", "`mlx_lm.chat`", "works")
def test_chat(model):
    for command, flags in (("mlx_lm", ["--trust-remote-code"]), ("ksa_mlx", [])):
        done = run(
            command,
            "chat",
            "--model",
            model,
            *flags,
            "--system-prompt",
            NOTES,
            stdin=f"{QUESTION}\nq\n",
        )
        assert done.returncode == 0 and "891" in done.stdout, done.stderr


@pytest.mark.slow
def test_generate_py_with_quantised_caches(model, capsys):
    ask = ["--model", str(model), "--system-prompt", NOTES, "--prompt", QUESTION]
    assert main(ask) == 0
    plain = capsys.readouterr()
    bits = ["--kv-bits", "8", "--quantized-kv-start", "0", "--kv-group-size"]
    assert main([*ask, *bits, "32"]) == 0
    quantised = capsys.readouterr()
    assert quantised.out == plain.out

    def held(text):
        return float(text.split("KV cache: ")[1].split(" MB")[0])

    # 8 bits and two 32-bit numbers a group of 32, instead of 32 bits.
    assert held(quantised.err) == pytest.approx(held(plain.err) * 10 / 32, rel=0.02)
    # The text of the windows in fewer bits than the summaries: less still.
    assert main([*ask, *bits, "32", "--kv-text-bits", "4"]) == 0
    assert held(capsys.readouterr().err) < 0.98 * held(quantised.err)
    assert main([*ask, "--kv-text-bits", "8"]) == 1
    assert "--kv-text-bits: needs --kv-bits" in capsys.readouterr().err
    assert main([*ask, *bits, "128"]) == 1
    assert "--kv-group-size: found 128, expected a divisor" in capsys.readouterr().err
