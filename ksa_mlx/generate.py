"""Talk to a KSA model in the terminal: one answer with --prompt, a chat without."""

import argparse
import json
import os
import select
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import transformers
from mlx.utils import tree_reduce
from mlx_lm.sample_utils import make_logits_processors, make_sampler

from . import __version__
from .chat import smollm2
from .chat.behind import answer_behind
from .chat.conversation import check_utf8
from .chat.documents import read_text as read_file
from .chat.flags import parse
from .chat.notebook import CHECKPOINT, notes, run_demo, welcome
from .chat.prompt_cache_file import cache_owner, is_conversation
from .chat.report import report
from .chat.screen import say, show
from .chat.session import Session
from .chat.terminal import chat, header
from .chat.turns import read_ahead, references_shown, turn
from .chat.waiting import Waiting
from .checkpoint.load import load
from .checkpoint.source import fetch_config
from .config import is_ksa
from .errors import KSAError, SessionError, one_line
from .stock.prompt_lookup import PromptLookup

# Tokens that a chat's cache can take back, for /undo and /again: a question and its answer.
ROLLBACK = 512

# Seconds to wait for a question in a pipe that nobody has written to.
PATIENCE = 2


def text_of(flag: str, text: str) -> str:
    """The text of a flag: itself, standard input for -, or a file for @FILE."""
    if text == "@":
        raise SessionError(f"{flag}: found @, expected @FILE")
    if text != "-" and not text.startswith("@"):
        check_utf8(flag, text)
        return text
    if text != "-":
        try:
            return read_file(Path(text[1:]).expanduser())
        except SessionError as e:
            raise SessionError(f"{flag}: {e}") from None
    if sys.stdin is None:
        raise SessionError(f"{flag}: standard input is closed")
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as e:
        raise SessionError(f"{flag}: standard input is not UTF-8 at byte {e.start:,}") from None


def options(args: argparse.Namespace, tokenizer, head_dim: int) -> dict[str, Any]:
    """The flags that mlx-lm's `stream_generate` takes."""
    found = {
        "sampler": make_sampler(
            args.temp,
            args.top_p,
            args.min_p,
            args.min_tokens_to_keep,
            top_k=args.top_k,
            xtc_probability=args.xtc_probability,
            xtc_threshold=args.xtc_threshold,
            # As in mlx_lm.generate.
            xtc_special_tokens=[*tokenizer.encode("\n"), *tokenizer.eos_token_ids],
        ),
        "logits_processors": make_logits_processors(
            repetition_penalty=args.repetition_penalty,
            repetition_context_size=args.repetition_context_size,
        ),
    }
    names = ["prefill_step_size"]
    if args.kv_bits is not None:
        names += ["kv_bits", "kv_group_size", "quantized_kv_start"]
        if head_dim % args.kv_group_size:
            raise SessionError(
                f"--kv-group-size: found {args.kv_group_size}, expected a divisor of the model's "
                f"head_dim = {head_dim}"
            )
    found |= {name: getattr(args, name) for name in names}
    return {**found, "num_draft_tokens": args.prompt_lookup or args.num_draft_tokens}


def template_options(args: argparse.Namespace) -> dict[str, Any]:
    """The further arguments of the chat template."""
    if args.chat_template_config is None:
        return {}
    try:
        found = dict(json.loads(args.chat_template_config))
    except (ValueError, TypeError):
        raise SessionError(
            f"--chat-template-config: found {args.chat_template_config!r}, expected a JSON object"
        ) from None
    for key in {"tokenize", "add_generation_prompt", "continue_final_message"} & set(found):
        raise SessionError(f"--chat-template-config: found {key!r}, which is not for you to set")
    return found


def on_references(args: argparse.Namespace, tokenizer, name: str):
    """What to do with the references of an answer; None without a flag."""
    page = args.references_html
    if page is not None and (page.is_dir() or not page.parent.is_dir()):
        found = "a folder" if page.is_dir() else "no folder to write it to"
        raise SessionError(f"--references-html: {page}: found {found}, expected a file's name")
    if page is None and not args.references:
        return None
    return references_shown(tokenizer, name, page, args.references)


def load_draft(args: argparse.Namespace, tokenizer):
    """The model of --draft-model, a KSA model or one of mlx-lm's, or what --prompt-lookup puts in
    its place; None without the flags."""
    name = args.draft_model
    if name is None:
        return PromptLookup() if args.prompt_lookup else None
    try:
        if is_ksa(fetch_config(name)):
            draft, other = load(name, trust_remote_code=args.trust_remote_code)
        else:
            draft, other = mlx_lm.load(name)[:2]
    except Exception as e:  # the many ways in which no model loads
        raise SessionError(f"--draft-model: {name}: {one_line(e)}") from None
    if other.vocab_size != tokenizer.vocab_size:
        raise SessionError(
            f"--draft-model: found a vocabulary of {other.vocab_size:,}, expected the model's, "
            f"of {tokenizer.vocab_size:,}"
        )
    return draft


def load_model(args: argparse.Namespace, name: str):
    """The model and its tokenizer, as the flags ask for them."""
    adapter = args.adapter_path
    if adapter is not None and not (Path(adapter) / "adapter_config.json").is_file():
        raise SessionError(f"--adapter-path: {adapter}: found no adapter_config.json in it")
    try:
        model, tokenizer = load(
            name,
            model_config={"quantize_activations": True} if args.quantize_activations else None,
            adapter_path=adapter,
            trust_remote_code=args.trust_remote_code,
        )
    except KSAError:
        raise
    except Exception as e:
        raise SessionError(f"--adapter-path: {adapter}: {one_line(e)}") from None
    if args.quantize_activations and not any(isinstance(m, nn.QQLinear) for m in model.modules()):
        raise SessionError("--quantize-activations: expected weights in nvfp4 or mxfp8")
    if args.top_k >= model.args.num_predicted:
        raise SessionError(
            f"--top-k: found {args.top_k}, expected less than the model's "
            f"{model.args.num_predicted} ids"
        )
    if not tokenizer.encode("a", add_special_tokens=False):
        # transformers makes an empty tokenizer where the files of one are missing.
        raise SessionError(f"{name}: found no tokenizer (tokenizer.json or tokenizer.model)")
    for token in args.extra_eos_token:
        # As in mlx-lm, the token or its id. An unknown one would become the unknown token.
        number = int(token) if token.isdecimal() else tokenizer.convert_tokens_to_ids(token)
        text_ids = range(model.args.summary_token_begin)
        if number not in text_ids or not (
            token.isdecimal() or tokenizer.convert_ids_to_tokens([number]) == [token]
        ):
            raise SessionError(f"--extra-eos-token: found {token!r}, expected a token of {name}")
        tokenizer.add_eos_token(str(number))
    model.value_bits = args.kv_value_bits
    return model, tokenizer


def open_session(
    args: argparse.Namespace, name: str, system: str | None, rollback: int = 0
) -> Session:
    """The model of that name and a conversation with it, as the flags ask for them."""
    template = template_options(args)
    model, tokenizer = load_model(args, name)
    session = Session(
        model,
        tokenizer,
        name,
        system_prompt=system,
        use_template=not args.ignore_chat_template,
        template_options=template,
        max_tokens=args.max_tokens,
        options=options(args, tokenizer, model.args.head_dim),
        draft_model=load_draft(args, tokenizer),
        text_bits=args.kv_text_bits,
        memory_limit=args.memory_limit,
        rollback=rollback,
    )
    session.on_references = on_references(args, tokenizer, name)
    if args.prefill_response is not None and not session.conversation.has_template:
        raise SessionError(
            f"--prefill-response: {name} has no chat template; write it behind the prompt"
        )
    return session


def run(args: argparse.Namespace) -> int:
    """What the arguments ask for. Returns the exit status."""
    if args.seed is not None:
        mx.random.seed(args.seed)
    prompt, system = args.prompt, args.system_prompt
    if prompt is not None:
        # As mlx_lm.generate does, which gets its prompt from a shell too.
        literal = prompt != "-" and not prompt.startswith("@")
        prompt = text_of("--prompt", prompt)
        prompt = prompt.replace("\\n", "\n").replace("\\t", "\t") if literal else prompt
    if system is not None:
        system = text_of("--system-prompt", system)

    name, file = args.model, args.prompt_cache_file
    if name is None and file is not None:
        name = cache_owner(file)
    if name == smollm2.NAME:
        name = str(smollm2.smollm2(say if args.verbose else lambda line: None))
    chatting = prompt is None and file is None and not args.demo
    if chatting and sys.stdin is None:
        raise SessionError("standard input is closed: give --prompt or --demo")
    # The embedded model knows its notebook and nothing else.
    embedded = name is None
    alone = embedded and file is None and system is None
    notebook = args.demo or (alone and not args.ignore_chat_template)
    demo = args.demo or (chatting and notebook and not sys.stdin.isatty() and not asked())
    # What is downloaded has bars of its own.
    here = all(Path(n or CHECKPOINT).is_dir() for n in (name, args.draft_model))
    with Waiting("Loading the model", args.verbose and here):
        session = open_session(
            args,
            name or str(CHECKPOINT),
            notes() if notebook else system,
            rollback=ROLLBACK if prompt is None else 0,
        )
    # Without a template an answer goes on where the prompt ends, with a blank if it needs one.
    strip = session.conversation.has_template and args.prefill_response is None
    if file is not None and not is_conversation(file):
        if prompt is None:
            raise SessionError("a cache of mlx_lm.cache_prompt answers one question: give --prompt")
        return one_answer(session, answer_behind(session, file, prompt), args.verbose, strip)
    if file is not None:
        session.load(file)
    if demo:
        return run_demo(session, args.verbose)
    if prompt is not None:
        answer = session.answer(prompt, args.prefill_response or "")
        return one_answer(session, answer, args.verbose, strip)
    return terminal_chat(session, name or "the embedded notebook model", notebook, args.verbose)


def asked() -> bool:
    """Whether standard input, which is no terminal, holds a question."""
    stdin: Any = sys.stdin
    try:
        if not select.select([stdin], [], [], PATIENCE)[0]:
            print(f"(no question on standard input within {PATIENCE} s)", file=sys.stderr)
            return False
        return bool(stdin.buffer.peek(1))
    except (OSError, ValueError, AttributeError):  # no file of the system's
        return True


def one_answer(session: Session, answer: Iterator[str], verbose: bool, strip: bool) -> int:
    """Stream one answer to standard output; the report goes to standard error."""
    done = turn(session, answer, verbose, about=False, strip=strip)
    if verbose:
        say(report(session))
    return 0 if done else 130


def terminal_chat(session: Session, name: str, notebook: bool, verbose: bool) -> int:
    """Greet and chat until standard input ends. Returns the exit status."""
    terminal = sys.stdin.isatty()
    greeting = []
    if terminal and verbose:
        size = tree_reduce(lambda n, w: n + w.size, session.model.parameters(), 0)
        where = "GPU" if mx.default_device() == mx.gpu else "CPU"
        rows = [("model", name), ("size", f"{size / 1e6:,.1f} M parameters, on the {where}")]
        header(f"ksa-mlx {__version__}", [*rows, ("context", f"{session.context:,} tokens")])
        if not session.conversation.has_template:
            greeting.append("No chat template: what you type is text that the model continues.")
        greeting.append("/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.")
    if not session.tokens:
        read_ahead(session, verbose)
    if greeting and notebook:
        greeting.insert(0, welcome(session))
    if greeting:
        show("\n".join(greeting))
    failed = chat(session, verbose)
    if session.offset and verbose:
        say(report(session))
    return 1 if failed and not terminal else 0


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status; every error is one line on standard error."""
    # MLX takes no file with the number of a closed standard stream.
    while (spare := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(spare)
    transformers.logging.set_verbosity_error()  # it warns of long texts, which we refuse
    try:
        return run(parse(argv))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KSAError as e:
        print(f"error: {e}", file=sys.stderr)
    except (OSError, RuntimeError, ValueError, MemoryError) as e:  # MLX's own errors, too
        print(f"error: {one_line(e)}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
