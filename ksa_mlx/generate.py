"""Talk to a KSA model in the terminal: one answer with --prompt, a chat without."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from tqdm import tqdm

from . import __version__
from .chat.notebook import embedded_model, notes, run_demo, welcome
from .chat.prompt_cache_file import cache_owner
from .chat.session import Session
from .chat.terminal import chat, read_ahead, show_references, turn
from .checkpoint.load import fetch, load
from .checkpoint.tensors import read_json
from .config import is_ksa
from .errors import CheckpointError, SessionError, one_line


def number(kind, low, high=None):
    """An argparse type: a number of at least `low`, at most `high`."""

    def read(text: str):
        value = kind(text)
        if not low <= value or (high is not None and value > high):
            upto = "" if high is None else f" and at most {high}"
            raise argparse.ArgumentTypeError(f"found {text}, expected at least {low}{upto}")
        return value

    read.__name__ = kind.__name__
    return read


def tokens_limit(text: str) -> int:
    value = int(text)
    if value < 1 and value != -1:
        raise argparse.ArgumentTypeError(f"found {text}, expected at least 1, or -1 for no limit")
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="generate.py",
        description=__doc__,
        epilog="Without a model, a small one that ships with the package answers questions about "
        "a sample notebook: a chat in a terminal, a short demonstration elsewhere.",
    )
    p.add_argument(
        "--model",
        help="A converted folder, an unconverted KSA checkpoint in the Hub's layout, or a repo id.",
    )
    p.add_argument("--prompt", "-p", help="Text, - for standard input, or @FILE. Without: a chat.")
    p.add_argument("--system-prompt", help="Text or @FILE.")
    p.add_argument("--demo", action="store_true", help="Run the short demonstration.")
    p.add_argument(
        "--max-tokens", "-m", type=tokens_limit, default=256, help="Tokens of an answer (256)."
    )
    p.add_argument("--temp", type=number(float, 0), default=0.0, help="Temperature (0: greedy).")
    p.add_argument("--top-p", type=number(float, 0, 1), default=1.0)
    p.add_argument("--min-p", type=number(float, 0, 1), default=0.0)
    p.add_argument("--top-k", type=number(int, 0), default=0)
    p.add_argument("--repetition-penalty", type=number(float, 0))
    p.add_argument("--repetition-context-size", type=number(int, 1), default=20)
    p.add_argument("--seed", type=number(int, 0, 2**64 - 1), help="Seed of the sampling.")
    p.add_argument("--ignore-chat-template", action="store_true", help="Continue plain text.")
    p.add_argument("--chat-template-config", help="JSON: further arguments of the chat template.")
    p.add_argument("--extra-eos-token", nargs="+", default=(), help="Tokens that end an answer.")
    p.add_argument(
        "--prefill-step-size", type=number(int, 1), default=2048, help="Prompt tokens a step."
    )
    p.add_argument(
        "--draft-model", help="A smaller model (KSA or plain) that proposes tokens: same answer."
    )
    p.add_argument(
        "--num-draft-tokens", type=number(int, 1), default=3, help="Tokens it proposes at a time."
    )
    p.add_argument("--kv-bits", type=int, choices=(2, 3, 4, 5, 6, 8), help="Quantise the KV cache.")
    p.add_argument(
        "--kv-text-bits",
        type=int,
        choices=(2, 3, 4, 5, 6, 8),
        help="Those of the text in the windows, where a few more bits cost little (--kv-bits).",
    )
    p.add_argument("--kv-group-size", type=int, choices=(32, 64, 128), default=64)
    p.add_argument(
        "--quantized-kv-start", type=number(int, 0), default=5000, help="From so many tokens on."
    )
    p.add_argument(
        "--references", action="store_true", help="Show what each answer was drawn from."
    )
    p.add_argument(
        "--references-html", type=Path, metavar="FILE", help="The same as a page, token by token."
    )
    p.add_argument(
        "--prompt-cache-file", type=Path, help="A saved conversation (/save) to go on with."
    )
    p.add_argument(
        "--trust-remote-code", action="store_true", help="Run the tokenizer's own code, if any."
    )
    p.add_argument(
        "--verbose",
        type=lambda text: text.lower() not in ("false", "f"),
        default=True,
        help="False: print nothing but the answer.",
    )
    return p.parse_args(argv)


def read_text(flag: str, text: str) -> str:
    """The text of a flag: itself, standard input for -, or a file for @FILE."""
    if text == "@":
        raise SessionError(f"{flag}: found @, expected @FILE")
    if text != "-" and not text.startswith("@"):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise SessionError(f"{flag}: the text is not UTF-8") from None
        return text
    try:
        if text == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as e:
        where = "standard input" if text == "-" else text[1:]
        raise SessionError(f"{flag}: {where} is not UTF-8 at byte {e.start:,}") from None
    except OSError as e:
        raise SessionError(f"{flag}: {text[1:]}: {e.strerror}") from None


def options(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that mlx-lm's `stream_generate` takes as they are."""
    return {
        "sampler": make_sampler(args.temp, args.top_p, args.min_p, top_k=args.top_k),
        "logits_processors": make_logits_processors(
            repetition_penalty=args.repetition_penalty,
            repetition_context_size=args.repetition_context_size,
        ),
    }


def kv_options(args: argparse.Namespace, head_dim: int) -> dict[str, int]:
    """The flags that say how mlx-lm quantises the cache."""
    if args.kv_bits is None:
        if args.kv_text_bits is not None:
            raise SessionError("--kv-text-bits: needs --kv-bits, for everything else")
        return {}
    if head_dim % args.kv_group_size:
        raise SessionError(
            f"--kv-group-size: found {args.kv_group_size}, expected a divisor of the model's "
            f"head_dim = {head_dim}"
        )
    names = ("kv_bits", "kv_group_size", "quantized_kv_start")
    return {name: getattr(args, name) for name in names}


def sources_options(args: argparse.Namespace, tokenizer):
    """What to do with the sources of an answer; None without a flag."""
    page = args.references_html
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        found = "a folder" if page.is_dir() else "no folder to write it to"
        raise SessionError(f"--references-html: {page}: found {found}, expected a file's name")
    if page is None and not args.references:
        return None
    return show_references(tokenizer, page, args.references)


def load_draft(args: argparse.Namespace, tokenizer):
    """The model of --draft-model, a KSA model or one of mlx-lm's; None without the flag."""
    name = args.draft_model
    if name is None:
        return None
    if is_ksa(read_json(fetch(name, patterns=["config.json"]) / "config.json")):
        draft, other = load(name, trust_remote_code=args.trust_remote_code)
    else:
        try:
            draft, other = mlx_lm.load(name)
        except Exception as e:  # the many ways in which no model loads
            raise SessionError(f"--draft-model: {name}: {one_line(e)}") from None
    if other.vocab_size != tokenizer.vocab_size:
        raise SessionError(
            f"--draft-model: found a vocabulary of {other.vocab_size:,}, expected the model's, "
            f"of {tokenizer.vocab_size:,}"
        )
    return draft


def progress_bar():
    """A callback (tokens read, tokens to read) that shows a bar on a terminal, if it takes long."""
    bar: tqdm | None = None

    def show(done: int, total: int):
        nonlocal bar
        if bar is None:
            bar = tqdm(
                total=total, desc="Reading", unit=" tokens", leave=False, disable=None, delay=0.5
            )
        bar.update(done - bar.n)
        if done == total:
            bar.close()
            bar = None

    return show


def open_session(args: argparse.Namespace, model_path: str, system: str | None) -> Session:
    template_options = {}
    if args.chat_template_config is not None:
        try:
            template_options = dict(json.loads(args.chat_template_config))
        except (ValueError, TypeError):
            raise SessionError(
                f"--chat-template-config: found {args.chat_template_config!r}, "
                "expected a JSON object"
            ) from None
    for key in {"tokenize", "add_generation_prompt"} & set(template_options):
        raise SessionError(f"--chat-template-config: found {key!r}, which is not for you to set")
    model, tokenizer = load(model_path, trust_remote_code=args.trust_remote_code)
    if args.top_k >= model.args.num_predicted:
        raise SessionError(
            f"--top-k: found {args.top_k}, expected less than the model's "
            f"{model.args.num_predicted} ids"
        )
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty tokenizer where the files of one are missing.
        raise SessionError(f"{model_path}: found no tokenizer (tokenizer.json or tokenizer.model)")
    for token in args.extra_eos_token:
        try:
            tokenizer.add_eos_token(token)
        except ValueError as e:
            raise SessionError(f"--extra-eos-token: {one_line(e)}") from None
    return Session(
        model,
        tokenizer,
        model_path,
        system_prompt=system,
        use_template=not args.ignore_chat_template,
        template_options=template_options,
        max_tokens=args.max_tokens,
        prefill_step_size=args.prefill_step_size,
        options=options(args),
        progress=progress_bar() if args.verbose else None,
        draft_model=load_draft(args, tokenizer),
        num_draft_tokens=args.num_draft_tokens,
        kv=kv_options(args, model.args.head_dim),
        text_bits=args.kv_text_bits,
        on_sources=sources_options(args, tokenizer),
    )


def run(args: argparse.Namespace) -> int:
    if args.seed is not None:
        mx.random.seed(args.seed)
    prompt, system = args.prompt, args.system_prompt
    if prompt is not None:
        # As mlx_lm.generate does, which gets its prompt from a shell too.
        literal = prompt != "-" and not prompt.startswith("@")
        prompt = read_text("--prompt", prompt)
        prompt = prompt.replace("\\n", "\n").replace("\\t", "\t") if literal else prompt
    if system is not None:
        system = read_text("--system-prompt", system)

    name = args.model
    if name == "":
        raise SessionError("--model: found nothing, expected a folder or a repo id")
    if system is not None and args.prompt_cache_file is not None:
        raise SessionError("--system-prompt: the conversation of --prompt-cache-file has its own")
    if name is None and args.prompt_cache_file is not None:
        name = cache_owner(args.prompt_cache_file)
    embedded = name is None
    nothing_asked = prompt is None and args.prompt_cache_file is None
    demo = args.demo or (embedded and nothing_asked and not sys.stdin.isatty())
    # The notebook is there for a chat and for the demonstration, not for a prompt of one's own.
    notebook = system is None and (demo or (embedded and nothing_asked))
    if notebook:
        system = notes()

    session = open_session(args, str(embedded_model()) if embedded else name, system)
    if args.prompt_cache_file is not None:
        session.load(args.prompt_cache_file)
    if demo:
        run_demo(session)
    elif prompt is not None:
        return one_answer(session, prompt, args.verbose)
    else:
        terminal_chat(session, "the embedded notebook model" if embedded else name, notebook)
    return 0


def one_answer(session: Session, prompt: str, verbose: bool) -> int:
    """Stream one answer to standard output; the report goes to standard error."""
    done = turn(session, prompt, about=False)
    if verbose:
        print("\n".join(session.report()), file=sys.stderr)
    return 0 if done else 130


def terminal_chat(session: Session, name: str, notebook: bool):
    if session.stock_tokens:
        raise SessionError("a cache of mlx_lm.cache_prompt answers one question: give --prompt")
    size = sum(w.size for _, w in tree_flatten(session.model.parameters()))
    where = "GPU" if mx.default_device() == mx.gpu else "CPU"
    print(f"ksa-mlx {__version__}: {name}, {size / 1e6:,.1f} M parameters, {where}")
    if not session.has_template:
        print("No chat template: what you type is text that the model continues.")
    if not session.tokens:
        read_ahead(session)
    if notebook:
        print(welcome(session))
    print("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    chat(session)
    if session.offset:
        print("\n".join(session.report()))


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status; every error is one line on standard error."""
    try:
        return run(parse_args(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (SessionError, CheckpointError) as e:
        print(f"error: {e}", file=sys.stderr)
    except (OSError, RuntimeError, ValueError, MemoryError) as e:  # MLX's own errors, too
        print(f"error: {one_line(e)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
