"""Soak the real server: clients with mixed lengths, some of which hang up, against solo answers.

    python -m tests.soak --minutes 5                 # stock mlx_lm.server
    python -m tests.soak --minutes 5 --ours          # python -m ksa_mlx server
    python -m tests.soak --minutes 5 --ours --draft  # with a draft model
    python -m tests.soak --minutes 5 --ours --kv-bits 4  # quantised keys and values, in batches
    python -m tests.soak --minutes 5 --ours --disk 5MB   # prompt caches on disk, which must leave

Uses the embedded notebook model in float32, on loopback only. Every finished answer must be the
greedy answer of mlx_lm.stream_generate, running alone. Prints one line of figures; exits with 1 if
an answer differs, a request fails or the server's resident memory grows.
"""

import argparse
import contextlib
import random
import sys
import tempfile
import threading
import time
from pathlib import Path

import mlx.core as mx
from mlx_lm import stream_generate

import ksa_mlx
from ksa_mlx.chat import notebook
from ksa_mlx.convert import convert
from ksa_mlx.memory.room import parse_size

from ._server import OURS, STOCK, serving

KV_GROUP = 32


def make_models(folder: Path) -> tuple[Path, Path]:
    """The notebook model in float32, and a coarse 3-bit copy of it as its draft."""
    model, draft = folder / "model", folder / "draft"
    convert(str(notebook.CHECKPOINT), str(model), dtype="float32")
    convert(str(model), str(draft), quantize=True, q_bits=3, q_group_size=32)
    return model, draft


def make_requests(count: int, seed: int) -> list[dict]:
    """Requests of all lengths, from inside the window to many times it; chats of 1 to 3 turns."""
    pick, notes, requests = random.Random(seed), notebook.notes().splitlines(), []
    questions = ["What is the phone of Hugo?", *(q for q, _ in notebook.QUESTIONS)]
    for i in range(count):
        size = pick.choice([1, 2, 3, 6, 12, 25, 50, 100])
        text = "\n".join(pick.sample(notes, size))
        body = {"max_tokens": pick.choice([1, 4, 12, 30, 60])}
        if i % 2:
            body["prompt"] = text
        else:
            messages = [{"role": "system", "content": "\n".join(notes[:size])}]
            for _ in range(pick.randint(0, 2)):
                messages += [
                    {"role": "user", "content": pick.choice(questions)},
                    {"role": "assistant", "content": f" {pick.randint(10, 9999)}."},
                ]
            body["messages"] = [*messages, {"role": "user", "content": pick.choice(questions)}]
        requests.append(body)
    return requests


def solo_answers(model: Path, requests: list[dict], kv_bits: int | None = None) -> list[str]:
    """Greedy answers, on caches that are quantised from the first token on, if at all."""
    loaded, tokenizer = ksa_mlx.load(model)
    answers = []
    for body in requests:
        if "messages" in body:
            prompt = tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True)
        else:
            prompt = tokenizer.encode(body["prompt"])
        cache = loaded.make_cache()
        if kv_bits:
            cache = [c.to_quantized(KV_GROUP, kv_bits) for c in cache]
        parts = stream_generate(
            loaded, tokenizer, prompt, max_tokens=body["max_tokens"], prompt_cache=cache
        )
        answers.append("".join(r.text for r in parts))
    mx.clear_cache()
    return answers


class Client(threading.Thread):
    """Asks one question after the other until the time is up; one in ten it does not wait for."""

    def __init__(self, server, requests, answers, until, seed):
        super().__init__(daemon=True)
        self.server, self.requests, self.answers = server, requests, answers
        self.until, self.pick = until, random.Random(seed)
        self.finished = self.hung_up = self.tokens = 0
        self.faults: list[str] = []

    def run(self):
        while time.monotonic() < self.until and not self.faults:
            i = self.pick.randrange(len(self.requests))
            body, chat = self.requests[i], "messages" in self.requests[i]
            try:
                if self.pick.random() < 0.1:
                    # At once, so in the middle of the prompt, or after some of the answer.
                    after = self.pick.choice([0, 1, 3, 10])
                    if after:
                        self.server.stream(body, chat, hang_up_after=after)
                    else:
                        self.server.send_only({**body, "stream": True}, chat)
                    self.hung_up += 1
                    continue
                ask = self.pick.choice([self.server.ask, self.server.stream])
                got = ask(body, chat)
                self.tokens += got.get("completion_tokens", got.get("pieces", 0))
            except Exception as e:
                self.faults.append(f"request {i}: {type(e).__name__}: {e}")
                return
            self.finished += 1
            if got["text"] != self.answers[i]:
                self.faults.append(f"request {i}: {got['text']!r}, alone {self.answers[i]!r}")


def sizes(folder: Path) -> dict[Path, int]:
    """Bytes of each prompt cache in a folder, which come and go."""
    found = {}
    for file in folder.glob("prompt-*"):
        with contextlib.suppress(FileNotFoundError):
            found[file] = file.stat().st_size
    return found


def soak(
    seconds: float,
    clients: int = 8,
    requests: int = 60,
    ours: bool = False,
    draft: bool = False,
    seed: int = 0,
    kv_bits: int | None = None,
    disk: int | None = None,
) -> dict:
    """Run it. Returns the figures; "faults" is empty if all went well."""
    with tempfile.TemporaryDirectory() as folder:
        model, draft_model = make_models(Path(folder))
        asked = make_requests(requests, seed)
        answers = solo_answers(model, asked, kv_bits)
        command, argv = (OURS, []) if ours else (STOCK, ["--trust-remote-code"])
        argv += ["--draft-model", str(draft_model)] if draft else []
        if kv_bits:
            argv += ["--kv-bits", str(kv_bits), "--kv-group-size", str(KV_GROUP)]
            argv += ["--quantized-kv-start", "0"]
        caches = Path(folder) / "caches"
        if disk:
            argv += ["--prompt-cache-dir", str(caches), "--prompt-cache-disk-size", str(disk)]
            argv += ["--prompt-cache-size", "2"]  # so that most of what is found is found there
        log = Path(folder) / "server.log"
        with serving(command, model, log, "--log-level", "WARNING", *argv) as server:
            start = time.monotonic()
            threads = [
                Client(server, asked, answers, start + seconds, 1000 * seed + i)
                for i in range(clients)
            ]
            for t in threads:
                t.start()
            memory, files, on_disk = [], set(), 0
            while any(t.is_alive() for t in threads):
                memory.append((time.monotonic() - start, server.resident))
                now = sizes(caches)
                files, on_disk = files | set(now), max(on_disk, sum(now.values()))
                time.sleep(min(1.0, seconds / 20))
            memory.append((time.monotonic() - start, server.resident))
            took = time.monotonic() - start
            status, _ = server.get("/health")
        text = log.read_text()

    # What the first third needs is warming up: buffers, code, the prompt cache's entries.
    middle = [m for t, m in memory if took / 3 <= t < 2 * took / 3] or [memory[-1][1]]
    end = [m for t, m in memory if t >= 2 * took / 3]
    faults = [f for t in threads for f in t.faults]
    if status != 200:
        faults.append(f"/health: {status}")
    if disk and on_disk > disk:
        faults.append(f"{on_disk:,} bytes of prompt caches on a disk of {disk:,}")
    # A client that hangs up is worth a broken pipe in mlx-lm's log, and nothing else is.
    errors = [x for x in text.splitlines() if x.split(":")[0].endswith(("Error", "Exception"))]
    faults += [e for e in errors if not e.startswith(("BrokenPipeError", "ConnectionResetError"))]
    return {
        "seconds": took,
        "clients": clients,
        "finished": sum(t.finished for t in threads),
        "hung_up": sum(t.hung_up for t in threads),
        "tokens": sum(t.tokens for t in threads),
        "resident_start": memory[0][1],
        "resident_middle": max(middle),
        "resident_end": max(end),
        "files": len(files),
        "on_disk": on_disk,
        "faults": faults,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=60, help="different requests")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ours", action="store_true", help="python -m ksa_mlx server")
    parser.add_argument("--draft", action="store_true", help="with a draft model (needs --ours)")
    parser.add_argument("--kv-bits", type=int, help="quantised keys and values (needs --ours)")
    parser.add_argument("--disk", type=parse_size, help="bytes of prompt caches (needs --ours)")
    args = parser.parse_args()
    if args.disk and not args.ours:
        parser.error("--disk: expected --ours too")
    if args.kv_bits and not args.ours:
        parser.error("--kv-bits: expected --ours too; the stock server turns batches off")
    if args.draft and not args.ours:
        parser.error("--draft: expected --ours too; the stock server's prompt cache does not fit")
    r = soak(
        args.minutes * 60,
        args.clients,
        args.requests,
        args.ours,
        args.draft,
        args.seed,
        args.kv_bits,
        args.disk,
    )
    grown = r["resident_end"] / r["resident_middle"] - 1
    print(
        f"{r['seconds']:.0f} s, {r['clients']} clients: {r['finished']:,} answers finished, all as "
        f"alone: {not r['faults']}; {r['tokens']:,} tokens; {r['hung_up']:,} hung up; resident "
        f"memory {r['resident_start'] / 1e6:.0f} MB at the start, {r['resident_middle'] / 1e6:.0f} "
        f"in the middle third, {r['resident_end'] / 1e6:.0f} in the last ({grown:+.1%})"
    )
    if args.disk:
        print(
            f"{r['files']} files of prompt caches seen, at most {r['on_disk'] / 1e6:.2f} MB at once"
        )
    for fault in r["faults"]:
        print(fault, file=sys.stderr)
    return 1 if r["faults"] or grown > 0.05 else 0


if __name__ == "__main__":
    sys.exit(main())
