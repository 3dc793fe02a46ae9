"""What the terminal program refuses, in one line."""

import json
import shutil

import pytest
from mlx_lm.generate import setup_arg_parser

from ksa_mlx.chat import flags, notebook

from ._chat import ROOT, refused


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
    config["added_tokens_decoder"]["1280"] = {
        **config["added_tokens_decoder"]["6"],
        "content": "<|summary|>",
    }
    (other / "tokenizer_config.json").write_text(json.dumps(config))
    argv = ["--model", str(other), "--prompt", "a <|summary|> b"]
    refused(capsys, argv, "token 1280", "<|summary|>", "0 to 1279")
