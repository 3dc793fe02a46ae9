"""python -m ksa_mlx retrofit: a pretrained model becomes a KSA model."""

import sys
from argparse import Namespace
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from ..benchmark.results import Results
from ..checkpoint.source import read_json
from ..errors import CheckpointError, DataError, KSAError, exit_status
from ..memory.room import device_limit
from . import evaluate, options, probe
from .base import Base, open_base
from .build import build, teacher
from .data import Data, open_data
from .documents import encoded, files_of, read
from .needs import fitting, work
from .plot import plot
from .progress import Bars, interruptible, say
from .stages import BEGINNING, Retrofit, Settings
from .state import Place
from .texts import check_room, recall_maker
from .write import choose_prefix, write

# Texts that the probe reads, of each kind; held-out texts that are evaluated without --eval-data.
PROBED, HELD_OUT = 4, 8


def settings_of(o: Namespace, base: Base) -> Settings:
    """The run's, with what the base decides."""
    packed = "quantization" in base.config
    return Settings(
        window=o.window, length=o.length, batch_size=o.batch_size,
        regression_tokens=o.stage1_tokens, distillation_tokens=o.stage2_tokens,
        lora_rank=o.lora_rank, own_rank=(64 if packed else 0) if o.own_rank is None else o.own_rank,
        rate=o.learning_rate, distillation_rate=o.stage2_learning_rate,
        lora_rate=o.lora_learning_rate, checkpointed=o.grad_checkpoint, seed=o.seed,
    )  # fmt: skip


def windows_of(o: Namespace, base: Base, data: Data, results: Results) -> list[int | None]:
    """Of all layers: given, or measured (once a run)."""
    layers = base.config["num_hidden_layers"]
    full = options.full_layers(o.full_layers, layers)
    if isinstance(full, int):
        found = results.found.get("probe")
        if not found:
            say(f"Measuring which {full} of {layers} layers stay full")
            results.add("probe", _probe(base, o.window, data, full))
            found = results.found["probe"]
        measured = probe.Probe(**found[0])
        say(measured.table())
        full = measured.full
    return [None if i in full else o.window for i in range(layers)]


def _probe(base: Base, window: int, data: Data, count: int) -> dict[str, Any]:
    model = build(base, [None] * base.config["num_hidden_layers"])
    first = (window + 1) * model.args.summary_chunk_size
    lost = {}
    for kind in ("text", "recall"):
        every = (data.sequence(i) for i in range(data.epoch))
        some = (t for t in every if (len(t.answers) > 0) == (kind == "recall"))
        pairs = []
        for text in islice(some, PROBED):
            at = text.answers - 1 if kind == "recall" else np.arange(first, len(text.ids))
            pairs.append((mx.array(text.ids)[None], at[None]))
        if pairs:
            lost[kind] = probe.lost(model, window, tqdm(pairs, f"probe, {kind}")).tolist()
    return {"lost": lost, "full": probe.choose(lost, count)}


def texts_of(o: Namespace, base: Base, data: Data, prefix: list[int]) -> evaluate.Texts:
    """What is evaluated: held out, and long enough."""
    longest = min(evaluate.BUCKETS[-1][1], base.config["max_position_embeddings"])
    if o.eval_data:
        texts = {}
        for f in files_of(Path(o.eval_data).expanduser())[0]:
            if f.stem in texts:
                raise DataError(f"{f}: a second text {f.stem}, expected names that differ")
            ids = [i for part in encoded(read([f]), base.tokenizer, prefix) for i in part.tolist()]
            texts[f.stem] = [*prefix, *ids][:longest]
            if len(texts[f.stem]) < evaluate.LEAST:
                raise DataError(
                    f"{f}: found {len(ids)} tokens, expected at least "
                    f"{evaluate.LEAST - len(prefix)} to measure with"
                )
    else:
        count = min(HELD_OUT, data.held_out_count)
        texts = {f"text-{i}": data.held_out(i).ids.tolist() for i in range(count)}
    lengths = [n for n in (1024, 2048, 4096) if n <= longest] if o.questions else []
    asked = evaluate.recall_questions(lengths, o.questions, base.tokenizer, prefix)
    return evaluate.Texts(texts, asked)


def run(o: Namespace):
    """Raises KSAError; KeyboardInterrupt after the step under way was kept."""
    options.check(o)
    destination = Path(o.mlx_path).expanduser()
    folder = destination.with_name(destination.name + ".training")
    if folder.exists() and not o.resume:
        raise KSAError(f"{folder}: a run has begun there; --resume goes on with it")
    group = mx.distributed.init()
    on_cpu = mx.default_device() == mx.cpu
    base = open_base(o.model, o.revision, dtype=mx.float32 if on_cpu else None)
    prefix = choose_prefix(base.tokenizer)
    if o.length > (context := base.config["max_position_embeddings"]):
        raise KSAError(
            f"--length: found {o.length}, expected at most {context}, all that {o.model} can read"
        )
    settings = settings_of(o, base)
    maker = recall_maker(base.tokenizer, prefix, o.seed)
    least = (o.stage1_tokens + o.stage2_tokens) // 20
    data = open_data(
        o.data, base.tokenizer, o.length, prefix, o.seed, least=least, recall=o.recall, maker=maker,
        verbose=group.rank() == 0,
    )  # fmt: skip
    begin = base.tokenizer.decode(prefix)
    say(f"{data.tokens:,} tokens of text, {data.held_out_tokens:,} held out; all begin {begin!r}")
    if o.recall:
        check_room(maker, o.length, data.held_out(0).ids)
    texts = texts_of(o, base, data, prefix)
    limit = (o.memory_limit, "--memory-limit") if o.memory_limit else device_limit()
    limits = (*limit, group.size())
    layers = base.config["num_hidden_layers"]
    full = options.full_layers(o.full_layers, layers)
    count = full if isinstance(full, int) else len(full)
    about = build(base, [None] * count + [o.window] * (layers - count), own_rank=settings.own_rank)
    fitting(about, settings, *limits)
    kept = options.kept(o) | {"tokens of --data": data.tokens, "machines": group.size()}
    place = Place(folder, kept, writes=group.rank() == 0)
    if place.found() is None:
        place.save(dict, BEGINNING, now=True)
    found = folder / "found.json"
    results = Results(str(found) if group.rank() == 0 else None)
    if found.is_file():
        try:
            results.found = read_json(found)
        except CheckpointError as e:
            raise CheckpointError(f"{e}; remove it to measure again") from None
    windows = windows_of(o, base, data, results)
    student = build(base, windows, own_rank=settings.own_rank)
    need, checkpointed = fitting(student, settings, *limits)
    settings = replace(settings, checkpointed=checkpointed)
    each = [f"{x / 1e9:.2f}" for x in work(student.args, settings)]
    say(f"Needs {need}" + (", layers computed again in the backward" if checkpointed else ""))
    say(f"Arithmetic a token: stage 1 {each[0]} GFLOP, stage 2 {each[1]} GFLOP")
    bars = Bars()
    with interruptible() as pressed:
        work_on = Retrofit(
            student, teacher(student), settings, data, place,
            group if group.size() > 1 else None, bars, lambda: bool(pressed),
        )  # fmt: skip
        try:
            work_on.run()
        finally:
            bars.close()
        if pressed:
            raise KeyboardInterrupt
    if group.rank():
        return
    _finish(o, base, prefix, texts, work_on, results, place, destination)


def _finish(o, base, prefix, texts, done: Retrofit, results, place: Place, destination: Path):
    """Evaluate and write."""
    total = len(evaluate.READERS) * (len(texts.texts) + len(texts.recall))
    for _ in tqdm(
        evaluate.measure(done.teacher, done.student, texts, results), "evaluation", total
    ):
        pass
    say(evaluate.table(results.found))
    say(verdict(results.found))
    for line in write(done.student, base, destination, prefix, o.hf_path):
        say(line)
    if find_spec("matplotlib"):
        file = Path(o.plot) if o.plot else place.folder / "training.png"
        plot(place.lines(), results.found, file)
        say(f"Drew {file}")


def verdict(found: dict[str, Any]) -> str:
    """Whether the summaries recall: the student against the base that forgets."""
    exact = {(r["reader"], r["of"]): np.mean(r["exact"]) for r in found.get("recall", [])}
    better = [exact["student", n] - exact["near", n] for who, n in exact if who == "teacher"]
    if not better:
        return "Recall was not measured"
    if np.mean(better) < 0.05:
        return (
            "The summaries recall no more than the window does: not a success. More layers that "
            "stay full, or more training, is what helps"
        )
    return "Recall: answers that are right in every token, as greedy decoding gives them"


def main(argv: list[str] | None = None) -> int:
    """The command line. Returns the exit status."""
    o = options.parser().parse_args(argv)
    stopped = f"error: interrupted; --resume goes on with {o.mlx_path}"
    return exit_status(lambda: run(o), stopped, where=o.mlx_path)


if __name__ == "__main__":
    sys.exit(main())
