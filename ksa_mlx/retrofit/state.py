"""The place of a run: where it stands, atomically, so that a killed one goes on to the bit."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CheckpointError, one_line
from ..files import replaced
from .trainable import Params

FILE, LOG = "state.safetensors", "log.jsonl"
# At most this much work is lost to a kill, besides the step under way.
SECONDS = 60


class Place:
    """A folder with one state (arrays, and a JSON object that says what they are) and a log.

    settings: of the run, by the names of their flags; a state of other settings is refused. Only
    the first machine writes.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], writes: bool = True):
        self.folder, self.settings, self.writes = folder, settings, writes
        self.saved = time.monotonic()

    def found(self) -> tuple[Params, dict[str, Any]] | None:
        """The arrays and their object, None where the run has not begun. Raises
        `CheckpointError`."""
        file = self.folder / FILE
        if not file.is_file():
            return None
        try:
            arrays, metadata = mx.load(str(file), return_metadata=True)
            said = json.loads(metadata["ksa"])
            before, place = said["settings"], said["place"]
        except (RuntimeError, ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{file}: not a state of a retrofit ({one_line(e)})") from None
        for name in self.settings.keys() & before:
            if before[name] != self.settings[name]:
                raise CheckpointError(
                    f"{file}: {name}: found {self.settings[name]}, expected {before[name]} as the "
                    "run began; another --mlx-path begins another run"
                )
        return arrays, place

    def save(self, arrays: Callable[[], Params], place: dict[str, Any], now: bool = False):
        """Keep a state, unless the last is younger than a minute."""
        if not now and time.monotonic() - self.saved < SECONDS:
            return
        self.saved = time.monotonic()
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        said = json.dumps({"settings": self.settings, "place": place})
        with replaced(self.folder / FILE) as part:
            mx.save_safetensors(str(part), arrays(), metadata={"ksa": said})

    def log(self, **said: Any):
        """Add a line to the log."""
        if not self.writes:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(json.dumps(said) + "\n")

    def lines(self) -> list[dict[str, Any]]:
        """What was logged; of a step that was done twice, around a kill, the last."""
        file, found = self.folder / LOG, {}
        if file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    said = json.loads(line)
                except json.JSONDecodeError:
                    continue  # cut off by a kill
                found[said.get("stage"), said.get("step"), said.get("what")] = said
        return list(found.values())
