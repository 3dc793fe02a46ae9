"""What a chat shows: Markdown as it is written, spinner and bar, and plain text in a pipe."""

import io
import time

import pyte
import pytest
from rich.console import Console

from ksa_mlx.chat import screen, waiting
from ksa_mlx.chat.screen import say, show, stream_markdown, stream_plain
from ksa_mlx.chat.waiting import Waiting


class Screen:
    """What pytest has captured, as on a terminal of 40 columns."""

    def __init__(self, capsys):
        self.capsys, self.written = capsys, ""

    @property
    def raw(self) -> str:
        self.written += "".join(self.capsys.readouterr())
        return self.written

    @property
    def text(self) -> str:
        shown = pyte.HistoryScreen(40, 24, history=10_000)
        pyte.Stream(shown).feed(self.raw.replace("\n", "\r\n"))
        above = ["".join(line[i].data for i in range(40)) for line in shown.history.top]
        return "\n".join(x.rstrip() for x in [*above, *shown.display]).rstrip()


@pytest.fixture
def terminal(capsys, monkeypatch):
    for name, value in {"COLUMNS": "40", "LINES": "24", "TERM": "xterm-256color"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("NO_COLOR", raising=False)
    for module in (screen, waiting):
        monkeypatch.setattr(module, "is_terminal", lambda stream: True)
    return Screen(capsys)


TEXT = """\
Some **bold** words & <think>tags</think>
in two lines.

- one

  more of one
- two

```python
def f(x):
    # 4821.

    return x
```

1. first
2. second

[a]: http://example.com/x"""

SHOWN = """\
Some bold words & <think>tags</think>
in two lines.

 • one
   more of one
 • two

 def f(x):
     # 4821.

     return x

 1 first
 2 second

[a]: http://example.com/x"""


@pytest.mark.parametrize("size, pause", [(1000, 0), (3, 0), (3, 0.02), (30, 0.1)])
def test_markdown_does_not_depend_on_its_pieces(terminal, monkeypatch, size, pause):
    clock = [0.0]

    def pieces():
        for i in range(0, len(TEXT), size):
            clock[0] += pause
            yield TEXT[i : i + size]

    monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
    stream_markdown(pieces())
    assert terminal.text == SHOWN
    assert "\x1b[1m" in terminal.raw


@pytest.mark.parametrize("text", ["4821.", "7)", "-", "Yes.\n\n12.", "*"])
def test_no_answer_is_lost(terminal, text):
    stream_markdown([text])
    assert terminal.text.split() == text.split()


def test_an_answer_longer_than_the_screen(terminal):
    text = "\n".join(f"line {i}" for i in range(100))
    stream_markdown(piece + "\n" for piece in text.split("\n"))
    assert terminal.text == text


def test_an_answer_that_is_interrupted_stays(terminal):
    def pieces():
        yield "What was "
        yield "said"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stream_markdown(pieces())
    assert terminal.text == "What was said"


def test_a_terminal_gets_no_codes_of_the_models(terminal):
    stream_plain(["\x1b[31mred\x07", " text"])
    stream_markdown(["\x1b]0;title\x07"])
    assert "\x1b[31m" not in terminal.raw and "\x07" not in terminal.raw


def test_a_pipe_gets_text_as_it_is(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    say("(aside)")
    say("x" * 300, whole=False)
    show("a [b]c[/b]")
    stream_plain(["\x1b[1m*as* ", "it is"])
    with Waiting("Reading") as w:
        w.progress(1, 2)
        time.sleep(0.3)
    assert capsys.readouterr() == ("a [b]c[/b]\n\x1b[1m*as* it is", f"(aside)\n{'x' * 300}\n")


def test_no_color(terminal, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    say("error: no", "red")
    stream_markdown(["# A\n\n```python\nx = 1\n```"])
    assert not {f"\x1b[{n}m" for n in range(30, 50)} & set(terminal.raw.split("m"))
    assert "38;" not in terminal.raw and "48;" not in terminal.raw


def frame(seconds: float, width: int, done: int = 0, total: int = 0) -> str:
    """What is shown so many seconds after the beginning, in one line."""
    w = Waiting("Reading")
    w.progress(done, total)
    w.seconds, w.begin = seconds, time.monotonic() - seconds
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(w, end="")
    return console.file.getvalue().strip("\n")


def test_signs_of_life():
    """A spinner within 0.3 s, a bar from the first token on if it takes more than a second."""
    assert frame(0.04, 80) == ""
    assert waiting.SPINNER + 2 / waiting.FRAMES < 0.3
    assert frame(0.3, 80, 0, 9000).split()[1:] == ["Reading"]
    first = frame(1.01, 80, 0, 9000)
    assert "0 of 9,000" in first and "a second" not in first
    bar = frame(2.0, 80, 3000, 9000)
    assert "━" in bar and bar.rstrip().endswith("3,000 of 9,000, 1,500 a second, 4 s left")
    for width in (60, 40, 30, 26):
        line = frame(2.0, width, 3000, 9000)
        assert "3,000 of 9,000" in line and len(line.rstrip()) <= width and "\n" not in line


def test_ctrl_c_is_answered_in_the_line(terminal):
    with Waiting("Reading") as w:
        w.stopping()
        time.sleep(0.5)
        assert waiting.STOPPING in terminal.text
    assert terminal.text == ""
    w.stopping()
    assert terminal.text.strip() == f"({waiting.STOPPING})"
