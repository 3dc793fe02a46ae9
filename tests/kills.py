"""Kill processes that write prompt caches to a disk, at random moments; look at what they leave.

    python -m tests.kills --kills 200

Each process first reads every file that the ones before it have left, and answers prompts from
them: no file may be damaged, and no answer may be another one than without a cache. Then it writes
caches of two models, in a folder too small for all, until it is killed (-9). Prints one line of
figures; exits with 1 if a file was damaged or an answer wrong.
"""

import argparse
import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import make_prompt_cache

from ksa_mlx.stock.disk import Disk
from ksa_mlx.stock.prompt_cache import PromptCache

from ._models import build
from .test_disk_cache import named
from .test_memory import qwen

SIZE = 20 * 10**6  # of the folder: about ten caches
SHAPE = {"num_key_value_heads": 4, "head_dim": 64, "summary_sliding_chunk_num": [4, 2000, 2]}
PROMPTS = 24


def make_prompts() -> list[list[int]]:
    """Prompts of which some begin like others."""
    pick, found = random.Random(0), []
    for _ in range(PROMPTS):
        before = pick.choice(found) if found and pick.random() < 0.5 else []
        before = before[: pick.randint(0, len(before))]
        new = [pick.randrange(64) for _ in range(pick.randint(100, 700))]
        found.append((before + new)[:900])
    return found


def answer(model, prompt, cache=None):
    steps = generate_step(mx.array(prompt), model, max_tokens=4, prompt_cache=cache)
    return [int(t) for t, _ in steps]


def work(folder: Path, seed: int, report: int):
    """One process: check, report as a line of JSON, write on for ever."""
    damaged: list[str] = []
    logging.getLogger().handlers = [_Listed(damaged)]
    mx.random.seed(0)
    models = {"ksa": build(**SHAPE), "qwen": qwen(**SHAPE)}
    pick, prompts = random.Random(seed), make_prompts()
    disk = Disk(folder, SIZE)
    for name in models:
        for entry in disk._of(named(name)):
            disk.read(entry)
    kept = PromptCache(3, disk=disk, identity=named)
    checked = hits = wrong = 0
    for prompt in pick.sample(prompts, 6):
        for name, model in models.items():
            cache, rest = kept.fetch_nearest_cache(name, prompt)
            checked, hits = checked + 1, hits + (cache is not None)
            if cache is not None:
                wrong += answer(model, rest, cache) != answer(model, prompt)
    left = [p.name for p in folder.iterdir() if p.name.startswith(".")]
    found = {"checked": checked, "hits": hits, "wrong": wrong, "damaged": damaged, "left": left}
    os.write(report, json.dumps(found).encode() + b"\n")
    while True:
        prompt = pick.choice(prompts)
        prompt = prompt[: pick.randint(len(prompt) // 2, len(prompt) - 1)]
        for name, model in models.items():
            cache = make_prompt_cache(model)
            model(mx.array([prompt]), cache=cache)
            kept.insert_cache(name, prompt, cache)
        kept.writer.wait()
        os.write(report, b"{}\n")


class _Listed(logging.Handler):
    def __init__(self, found):
        super().__init__()
        self.found = found

    def emit(self, record):
        self.found.append(record.getMessage())


def one(folder: Path, seed: int, seconds: float) -> dict:
    """Start a process, let it check and then write for so long, and kill it.

    Every other one is killed after its first files at the earliest, however slow the machine.
    """
    reader, writer = os.pipe()
    child = os.fork()  # nothing has been computed in this process
    if not child:
        try:
            work(folder, seed, writer)
        except BaseException as e:
            os.write(writer, json.dumps({"fault": f"{type(e).__name__}: {e}"}).encode() + b"\n")
        os._exit(1)
    os.close(writer)
    with open(reader) as lines:
        found = json.loads(lines.readline() or '{"fault": "it ended"}')
        rest = lines.readline() if seed % 2 and "fault" not in found else ""
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        rest += lines.read()
    return next((json.loads(line) for line in rest.splitlines() if "fault" in line), found)


def kills(count: int, seed: int = 0) -> dict:
    """Run it. Returns the figures, summed."""
    pick, total = random.Random(seed), {"checked": 0, "hits": 0, "wrong": 0, "half": 0}
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in range(count + 1):  # the last one only looks
            found = one(folder, 1000 * seed + n, pick.uniform(0, 0.4) if n < count else 0)
            if "fault" in found:
                faults.append(found["fault"])
                continue
            for key in ("checked", "hits", "wrong"):
                total[key] += found[key]
            faults += found["damaged"] + [f"left over: {x}" for x in found["left"]]
            total["half"] += sum(p.name.startswith(".") for p in folder.iterdir())
            size = sum(p.stat().st_size for p in folder.iterdir())
            if size > 1.5 * SIZE:
                faults.append(f"{size:,} bytes in a folder of {SIZE:,}")
    return {"kills": count, **total, "faults": faults}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.kills", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    r = kills(args.kills, args.seed)
    print(
        f"{r['kills']} kills, {r['half']} of them in the middle of a file: {r['checked']:,} answers, "
        f"{r['hits']:,} from files, {r['wrong']} wrong; faults: {len(r['faults'])}"
    )
    for fault in r["faults"]:
        print(fault, file=sys.stderr)
    return 1 if r["faults"] or r["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
