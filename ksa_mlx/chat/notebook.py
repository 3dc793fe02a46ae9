"""The embedded default: a small KSA checkpoint in PyTorch layout, and a notebook to ask about."""

import atexit
import contextlib
import hashlib
import io
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

from ..convert import convert
from ..errors import CheckpointError
from .session import Session
from .terminal import read_ahead

PACKAGE = Path(__file__).parents[1]
CHECKPOINT = PACKAGE / "notebook"

# Questions about notes.txt, and the notes that answer them.
QUESTIONS = (
    ("What is the badge of Olga?", "The badge of Olga is 6967."),
    ("What is Linh's school?", "Linh's school: Dublin."),
    ("What is the code of the east tower?", "Remember that the code of the east tower is 1252."),
)


def notes() -> str:
    """The sample notebook, a note a line."""
    return (PACKAGE / "notes.txt").read_text(encoding="utf-8").strip()


def cache_folder() -> Path:
    """Where the converted checkpoint is kept; KSA_MLX_CACHE overrides the platform's place."""
    if folder := os.environ.get("KSA_MLX_CACHE"):
        return Path(folder).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library/Caches/ksa-mlx"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ksa-mlx"


def embedded_model() -> Path:
    """The embedded checkpoint as an MLX folder, converted at the first call.

    The folder's name is a digest of the checkpoint and of the converter, so that it is never stale.
    """
    digest = hashlib.sha256()
    code = (PACKAGE / f"{name}.py" for name in ("convert", "weights", "save", "model_file"))
    for file in (*sorted(CHECKPOINT.iterdir()), *code):
        if file.is_file():
            digest.update(file.name.encode())
            digest.update(file.read_bytes())
    name = f"notebook-{digest.hexdigest()[:16]}"
    try:
        return _converted(cache_folder() / name)
    except OSError:  # no home, or one that cannot be written
        folder = Path(tempfile.mkdtemp(prefix="ksa-mlx-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return _converted(folder / name)


def _converted(destination: Path) -> Path:
    for attempt in range(150):
        if destination.is_dir():
            return destination
        try:
            # Its report and its progress bar would be news about a checkpoint nobody named.
            with contextlib.redirect_stdout(io.StringIO()) as log, contextlib.redirect_stderr(log):
                convert(str(CHECKPOINT), str(destination))
            return destination
        except (CheckpointError, OSError):
            # Perhaps another process converts it at this moment.
            busy = destination.is_dir() or any(destination.parent.glob(f".{destination.name}*"))
            if not busy or attempt == 149:
                raise
            time.sleep(0.2)
    return destination


def welcome(session: Session) -> str:
    """What to try in a chat about the notebook."""
    lines = notes().count("\n") + 1
    asks = "\n".join(f"  {question}" for question, _ in QUESTIONS)
    return (
        f"A notebook of {lines} notes is loaded ({session.offset:,} tokens). Ask about one:\n{asks}"
    )


def run_demo(session: Session):
    """Ask the questions over the notebook and print the answers, and what the cache holds."""
    text = notes()
    start = time.perf_counter()
    read_ahead(session)
    seconds, count = time.perf_counter() - start, text.count("\n") + 1
    print(f"Read a notebook of {count} notes, {session.offset:,} tokens, in {seconds:.1f} s.\n")
    for question, note in QUESTIONS:
        before = text.partition(note)[0]
        back = session.offset - len(session.tokenizer.encode(before))
        answer = "".join(session.answer(question)).strip()
        print(f"Question: {question}\nAnswer:   {answer}")
        print(f"The note: {note} ({back:,} tokens back)\n")
        session.show_sources()
    print("\n".join(session.report()))
