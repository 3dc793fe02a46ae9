"""What the tests of the terminal program share."""

import subprocess
import sys
from pathlib import Path

from mlx_lm import generate as mlx_generate

from ksa_mlx.chat import notebook
from ksa_mlx.chat.session import Session
from ksa_mlx.chat.turns import show_references
from ksa_mlx.generate import main

ROOT = Path(__file__).parent.parent
SYSTEM = "The locker of Maria is 4821.\nOmar's bike is red.\nThe code of Klara is 775."


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


def program(*argv, **kwargs):
    command = [sys.executable, str(ROOT / "generate.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **kwargs)


def ask_once(loaded):
    """A session of a loaded model that has answered one question about the sample notebook, the
    answer, and its trace."""
    traces = []
    text = "\n".join(notebook.notes().splitlines()[:60])
    session = Session(*loaded, "notebook", system_prompt=text)
    session.on_references = traces.append
    session.read_ahead()
    answer = "".join(session.answer(notebook.QUESTIONS[0][0])).strip()
    show_references(session)
    return session, answer, traces[0]
