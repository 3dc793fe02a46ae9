"""What the released 4B says, case by case, against what the official implementation said.

`greedy.json` has the first greedy ids of OpenOneRec/KSA-4B-base (revision 6b60859) by the official
implementation in bfloat16 on an A100, as a public vLLM port recorded them (XuTianle0101/vllm,
benchmarks/ksa/fixtures/hf_reference at df0524fb, Apache-2.0).
"""

import functools
import json
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten

from ..cache.make import make_cache
from ..checkpoint.load import load
from ..errors import KSAError
from ..memory.caches import Sizes
from .stage import Cases, Found, Options, Stage

FILE = Path(__file__).with_name("greedy.json")
# What tells the released model from others in config.json.
RELEASED = {"hidden_size": 2560, "num_hidden_layers": 36, "head_dim": 128}

ARCHIVE = "The archive records that the secret code is 73921. Remember this fact. "
FILLER = "An ordinary archive entry. "
NEEDLE = "\nThe secret code is 73921.\n"
QUESTION = "\nWhat is the secret code? Answer:"
TEXTS = {"english": "The capital of France is", "chinese": "请简要介绍长上下文模型。"}

STEP = 2048  # tokens of a prefill step
# A first difference counts where the top two logits are further apart: the official prefill and
# decode differ from each other.
MARGIN = 0.5
SECONDS = 60  # that a case may take, by the speed of those before it


def check(config: dict[str, Any], model: str):
    """Raises KSAError for a model that is not the released one."""
    found = {k: config.get(k) for k in RELEASED}
    if found != RELEASED:
        raise KSAError(
            f"--model: {model}: found {found}, expected the released KSA-4B's {RELEASED}"
        )


def expected() -> dict[str, list[int]]:
    """The ids of each case, by name; names say how many ids the prompt has."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def tokens(name: str) -> int:
    """How many ids a prompt has, about, where its name does not say."""
    return int(name.partition("-")[2]) if name[-1].isdigit() else 8


def prompt(name: str, encode: Any) -> list[int]:
    """The ids of a case. encode: text to ids, without special ones."""
    if name in TEXTS:
        return encode(TEXTS[name])

    def repeated(text: str, n: int) -> list[int]:
        ids = encode(text)
        return (ids * (n // len(ids) + 1))[:n]

    kind, n = name.split("-")[0], tokens(name)
    if kind == "length":
        return repeated(ARCHIVE, n)
    if kind == "ids":
        return list(range(100, 100 + n))
    needle, question = encode(NEEDLE), encode(QUESTION)
    filler = repeated(FILLER, n - len(needle) - len(question))
    quarter = len(filler) // 4
    return [*filler[:quarter], *needle, *filler[quarter:], *question]


def compare(model: Any, ids: list[int], expected: list[int]) -> Found:
    """Continue a prompt greedily as long as that gives what is expected.

    Returns how many ids agree, of how many; at the first that does not, both and how far the top
    two logits are apart.
    """
    cache, text = make_cache(model), mx.array([ids])
    logits = mx.zeros(0)
    for at in range(0, len(ids), STEP):
        logits = model(text[:, at : at + STEP], cache=cache)[0, -1].astype(mx.float32)
        mx.eval(logits, [c.state for c in cache])
    for i, wanted in enumerate(expected):
        got = mx.argmax(logits).item()
        if got != wanted:
            first, second = mx.topk(logits, 2).tolist()[::-1]
            margin = first - second
            return {"agree": i, "of": len(expected), "got": got, "wanted": wanted,
                    "margin": margin, "counts": margin > MARGIN}  # fmt: skip
        logits = model(mx.array([[got]]), cache=cache)[0, -1].astype(mx.float32)
    return {"agree": len(expected), "of": len(expected), "counts": False}


class _Loaded(NamedTuple):
    model: Any
    encode: Any
    nbytes: int


@functools.lru_cache(1)
def _loaded(folder: str) -> _Loaded:
    model, tokenizer = load(folder)
    encode = partial(tokenizer.encode, add_special_tokens=False)
    nbytes = sum(w.nbytes for w in dict(tree_flatten(model.parameters())).values())
    return _Loaded(model, encode, nbytes)


_speed: list[float] = []  # tokens a second of the longest case so far


def run(options: Options, name: str, wanted: list[int]) -> Found:
    """One case, if memory and time allow it."""
    assert options.model is not None
    (model, encode, nbytes), n = _loaded(options.model), tokens(name)
    if (need := nbytes + Sizes(model).held(n, len(wanted)).most) > 0.9 * options.memory:
        return {"skipped": f"needs {need / 1e9:.0f} GB"}
    if _speed and n / _speed[-1] > SECONDS:
        return {"skipped": f"would take {n / _speed[-1]:.0f} s"}
    ids, start = prompt(name, encode), time.perf_counter()
    found = compare(model, ids, wanted)
    found["seconds"] = time.perf_counter() - start
    if n >= 1000:
        _speed.append(n / found["seconds"])
    return found


def cases(options: Options) -> Cases:
    if options.model is None:
        return {}
    by_length = sorted(expected().items(), key=lambda case: tokens(case[0]))
    return {name: partial(run, options, name, ids) for name, ids in by_length}


def line(name: str, found: Found) -> str | None:
    """Of a case that does not agree; the others are counted at the end."""
    if "agree" not in found:
        return f"{name}: {found.get('skipped') or found['error']}"
    if found["agree"] == found["of"]:
        return None
    counts = "" if found["counts"] else ", too close to count"
    return (
        f"{name}: {found['agree']} of {found['of']} agree, then {found['got']} for "
        f"{found['wanted']}; top two {found['margin']:.2f} apart{counts}"
    )


def lines(found: dict[str, Found]) -> list[str]:
    ran = [x for x in found.values() if "agree" in x]
    if not ran:
        return []
    whole = sum(x["agree"] == x["of"] for x in ran)
    close = sum(x["agree"] < x["of"] and not x["counts"] for x in ran)
    return [
        f"{whole} of {len(ran)} cases agree in all ids, {close} differ where it is too close to "
        f"count, {len(ran) - whole - close} differ; {len(found) - len(ran)} were not run"
    ]


REFERENCE = Stage("reference", "The released 4B against the official implementation, greedy ids",
                  cases, line, lines, seconds=170, case_seconds=100, most=12)  # fmt: skip
