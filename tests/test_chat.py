"""The chat, in a terminal and in a pipe."""

import io
import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time

import mlx.core as mx
import pytest
from mlx_lm.models.cache import load_prompt_cache
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from ksa_mlx.chat.commands import QUIT
from ksa_mlx.chat.prompt import Names, Turns, history, state_dir
from ksa_mlx.chat.terminal import chat
from ksa_mlx.chat.waiting import ctrl_c_stops

from ._chat import ROOT, SYSTEM
from ._terminal import Terminal

# Terminal sessions, as a person would see them; # stands for figures.


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The environment of a user with a place for a history, in a folder with a document."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text(SYSTEM)
    return {"XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}


PASTED = [f"def f{i}(x):  # line {i}" for i in range(1, 41)]


@pytest.mark.slow
def test_a_session_with_a_document(home, folder, tmp_path):
    """Pasted lines are one turn, a document is put in and taken back, the history outlives it."""
    (tmp_path / "model").symlink_to(folder)
    options = "--model", "model", "-m", "9"
    with Terminal(*options, lines=60, env=home) as t:
        t.prompt()
        t.say("/file notes.txt")
        t.say("What is the locker of Maria?")
        t.say("/again")
        t.say("/undo")
        t.say("/undo")
        t.say("In @notes.txt, what is the locker of Maria?")
        t.say("/file none.txt")
        assert t.record("/help") == RECORDED
        t.type("\x1b[200~" + "\r".join(PASTED) + "\x1b[201~")
        t.until("line 40")
        t.say("")
        # Typed lines: Alt-Enter, and Enter within quotes.
        t.type("one\x1b\rtwo")
        t.say("")
        t.type('"""three\rfour')
        t.until("four")
        t.say('"""')
        t.say("/save talk")
        t.type("/exit\r")
        assert t.end() == 0
    _, metadata = load_prompt_cache(str(tmp_path / "talk.safetensors"), return_metadata=True)
    asked = [m["content"] for m in json.loads(metadata["ksa_mlx"])["messages"]][2::2]
    assert asked == ["\n".join(PASTED), "one\ntwo", "three\nfour"]

    # The next session has the history, and a narrow window.
    with Terminal(*options, columns=40, env=home) as t:
        t.prompt()
        up = "\x1b[A"
        t.type(up * 5)
        t.until(r"> one\n\. two$")
        t.type("\x1b[B" * 9 + "\x03")
        t.until("Ctrl-D or /quit leaves")
        t.prompt()
        t.say("/file notes.txt")
        t.say("What is the locker of Maria?")
        assert t.record("/help") == NARROW
        t.type("\x04")
        assert t.end() == 0
    file = tmp_path / "state/ksa-mlx/history"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


RECORDED = """\
/help lists the commands; Ctrl-C stops an answer, Ctrl-D leaves.

> /file notes.txt
(notes.txt: # tokens are read; ask about it)

> What is the locker of Maria?
4821.
[# tokens read at # a second, # written at #; # of # tokens held]

> /again
4821.
[# tokens read at # a second, # written at #; # of # tokens held]
(as before; with --temp #, say, answers differ)

> /undo
(taken back: What is the locker of Maria?)

> /undo
error: found no turn to take back

> In @notes.txt, what is the locker of Maria?
4821.
[# tokens read at # a second, # written at #; # of # tokens held]

> /file none.txt
error: none.txt: No such file or directory

> /? for help"""

NARROW = """\
/help lists the commands; Ctrl-C stops
an answer, Ctrl-D leaves.

> /? for help
(Ctrl-D or /quit leaves)

> /file notes.txt
(notes.txt: # tokens are read; ask
about it)

> What is the locker of Maria?
4821.
[...

> /? for help"""


@pytest.mark.slow
def test_ctrl_c_while_it_reads_and_while_it_answers(home, folder, tmp_path):
    """What was read stays read, what was said stays said, and the chat goes on."""
    (tmp_path / "long.txt").write_text(SYSTEM * 400)
    # Plain completion, sampled so that it does not stop by itself.
    endless = "--ignore-chat-template", "--max-tokens", "20000", "--temp", "30", "--seed", "3"
    with Terminal("--model", str(folder), *endless, env={**home, "NO_COLOR": "1"}) as t:
        t.prompt()
        t.type("/file long.txt\r")
        t.until("Reading")
        t.until(r"Reading \S+ +[\d,]+ of [\d,]+, [\d,]+ a second, [\d,]+ s left")
        t.type("typed ahead")  # not seen, and dropped by the terminal with the next key
        t.type("\x03")
        assert t.until("tokens are read, the rest when needed") < 10
        t.prompt()
        assert t.record("> /file") == STOPPED_READING
        t.say("/undo")
        t.type("The locker\r")
        t.until(r"locker\n(?s:.{400})")  # more than signs of life
        t.type("\x03")
        t.until(r"\[stopped; ", 20)
        t.prompt()
        assert "a second" in t.text.rpartition("[stopped; ")[2]
        t.say("/stats")
        t.type("/quit\r")
        assert t.end() == 0
        assert not re.search(rb"\x1b\[[\d;]*3[0-8]", t.raw)  # no colour


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux does MLX compile for a CPU here")
def test_ctrl_c_while_mlx_compiles(home, folder, tmp_path):
    """It kills MLX's compiler as well; the turn is stopped, and the next one compiles again."""

    def compiling():
        sources = tmp_path.glob("mlx/*/cpu/*.cpp")
        return any(not f.with_name(f"lib{f.stem}.so").exists() for f in sources)

    env = {**home, "NO_COLOR": "1", "TMPDIR": str(tmp_path)}
    sampled = "--ignore-chat-template", "--max-tokens", "200", "--temp", "30", "--top-p", "0.9"
    with Terminal("--model", str(folder), *sampled, env=env) as t:
        t.prompt()
        t.type("The locker\r")
        t.until(compiling)
        t.type("\x03")
        t.until(r"[(\[]stopped")
        t.prompt()
        t.type("The badge\r")
        t.until(r"badge\n(?s:.*) tokens read at ")
        t.prompt()
        assert "error" not in t.text
        t.type("/quit\r")
        assert t.end() == 0


STOPPED_READING = """\
> /file long.txt
(stopped: # of # tokens are read, the rest when needed)

> /? for help"""


def test_a_history_of_turns(tmp_path, monkeypatch):
    """Where the system wants it, for the user only, without documents; none where it cannot be."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert state_dir() == tmp_path / "ksa-mlx"
    for text in ("one", "two\nlines", "x" * 10_001):
        history().append_string(text)
    assert list(history().load_history_strings()) == ["two\nlines", "one"]
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    for platform, place in {
        "linux": ".local/state",
        "darwin": "Library/Application Support",
    }.items():
        monkeypatch.setattr(sys, "platform", platform)
        assert state_dir() == tmp_path / place / "ksa-mlx"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    assert not isinstance(history(), Turns)


def test_names_are_completed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").touch()
    names = Names(["/file ", "/stats"])

    def completed(text):
        document = Document(text)
        found = [*names.get_completions(document, CompleteEvent(completion_requested=True))]
        return [text[: len(text) + c.start_position] + c.text for c in found]

    assert completed("/f") == ["/file "] and completed("/") == ["/file ", "/stats"]
    assert completed("/file no") == ["/file notes.txt"]
    assert completed("Look at @no") == ["Look at @notes.txt"]
    assert completed("Look at no") == completed("") == []


def test_text_of_several_lines_in_a_pipe(session, monkeypatch, capsys):
    """Lines of a pipe are turns, but for those between quotes; words that end a chat end it."""
    asked = []
    monkeypatch.setattr(session, "answer", lambda text: asked.append(text) or iter(()))
    lines = '"""one\ntwo\n\n"""\n """x\n"""three"""\n/?\n /quit\nEXIT\nnever\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert chat(session) == 0
    assert asked == ["one\ntwo", ' """x', "three", " /quit"]
    out, err = capsys.readouterr()
    assert "/file PATH" in out and "\x1b" not in out + err
    for word in QUIT:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{word}\nnever\n"))
        assert chat(session) == 0 and asked[-1] != "never"


def test_a_document_of_a_turn_that_was_not_answered_is_dropped(session, monkeypatch, tmp_path):
    """One of /file stays for the next turn."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("Alpha.")
    (tmp_path / "b.txt").write_text("Beta.")
    session.progress = lambda done, total: None

    def stopped(text):
        session.usage = None
        return iter(())

    monkeypatch.setattr(session, "answer", stopped)
    monkeypatch.setattr(sys, "stdin", io.StringIO("/file a.txt\n@b.txt what is it?\n@none.txt\n"))
    assert chat(session) == 1
    assert [d.name for d in session.conversation.documents] == ["a.txt"]


def test_a_full_context_says_what_to_do(session, monkeypatch, capsys):
    monkeypatch.setattr(session.model.args, "max_position_embeddings", 40)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is the locker of Maria?\n"))
    assert chat(session) == 1
    err = capsys.readouterr().err
    assert "expected fewer than the context of 40" in err and "; shorten it" in err


@pytest.mark.slow
def test_ctrl_c_is_answered_at_once(session, capsys):
    """Python's own handlers run only when MLX gives control back, after the step."""
    a = mx.random.normal((700, 700))
    mx.eval(a @ a)
    begin, seen = time.monotonic(), []
    mx.eval(a @ a)
    products = 1 + int(1.5 / (time.monotonic() - begin))  # a step of about 1.5 s
    begin = time.monotonic()

    def press():
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        while not session.stop and time.monotonic() < begin + 20:
            time.sleep(0.01)
        seen.append(time.monotonic())

    thread = threading.Thread(target=press)
    with ctrl_c_stops(session):
        thread.start()
        for _ in range(products):
            a = (a @ a) * 1e-2
        mx.eval(a)
        ended = time.monotonic()
    thread.join()
    assert session.stop and seen[0] < ended
    assert "(stopping after this step)" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), ctrl_c_stops(session):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)


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
