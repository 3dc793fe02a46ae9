"""Training of the notebook assistant: optimisers, losses, levels of length.

What moves a small KSA model from its window to its summaries, and where it is below:

* weights that already route attention at the start (``NotebookModel.reset_parameters``);
* Muon for the matrices, AdamW for embeddings and norms;
* loss on the values of answers, above all on their first token, the one that needs addressing;
  logits are computed only where there is a loss;
* supervised attention: in one layer two heads are told which summary holds the token that comes
  next. This is a contrast of one chunk with all others, so it has a gradient long before any
  answer is right;
* summaries that must hold the values: in that layer, what a text token reads of a summary has to
  tell every token of a value (eight matrices that only training has, one for each place in the
  chunk). It does not wait for the addressing;
* short documents first, longer ones when the recall passes a threshold;
* jumps of the positions, so that far distances are seen in short documents, and summaries that
  count several times, so that the share of all summaries is the one of a longer text;
* at the end, as for any long context, a short training on documents four times as long.
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F

from .data import Style
from .documents import (
    ENDING,
    FIRST,
    FIXED,
    MARKER,
    PLAIN,
    REST,
    STOP,
    Composer,
    spread_positions,
)
from .model import NotebookConfig, NotebookModel

# Of every kind of token, the weight of its loss. Plain text is sampled: 8 % of its tokens.
LOSS_WEIGHT = {PLAIN: 0.05, ENDING: 0.05, MARKER: 0.7, REST: 0.7, STOP: 0.5, FIRST: 1.0,
               FIXED: 1.0}  # fmt: skip
PLAIN_SHARE = 0.08
ADDRESS_WEIGHT = 0.3
READING_WEIGHT = 0.2
# Lengths of the documents that the recall is followed on.
TESTED = (128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class Level:
    """Documents of ``length`` tokens; ``passed`` is the recall (moving average) at which the next
    level begins. For longer texts than training shows, ``margin``: a wrong chunk counts as so many
    in the supervised attention, and ``copies``: the summaries count up to so many times each."""

    length: int
    batch: int
    style: Style
    passed: float
    margin: float = 4.0
    copies: float = 1.0


PIECED = 0.75  # of the words among free values
FIRST_STYLE = Style(
    things=0.1, filler=0.03, shared=0.3, plain=0.8, polite=0.1, lower=0.1, follow=0.1, absent=0.05,
    updates=0.02, talk=0.03,
)  # fmt: skip
LONG_STYLE = Style(
    filler=0.2, free=0.5, pieced=PIECED, numbers=0.25, updates=0.1, lower=0.3, follow=0.4
)
WORDS_STYLE = replace(LONG_STYLE, free=0.65, numbers=0.15, words=15)
LEVELS = [
    Level(128, 24, FIRST_STYLE, 0.75),
    Level(192, 16, Style(filler=0.06, shared=0.4, plain=0.6, absent=0.08), 0.80),
    Level(256, 12, Style(filler=0.1, pieced=PIECED / 2), 0.80),
    Level(384, 8, replace(LONG_STYLE, filler=0.15), 0.82),
    Level(512, 6, LONG_STYLE, 0.80, margin=8.0, copies=12.0),
    Level(1024, 3, LONG_STYLE, 0.91, margin=8.0, copies=12.0),
    # The pieces of rare words take longest: half of the free values are words now.
    Level(1024, 3, WORDS_STYLE, 1.0, margin=8.0, copies=12.0),
]
# For a model that has been through LEVELS; it begins at the last.
LONGER_LEVELS = [
    LEVELS[-1],
    replace(LEVELS[-1], length=2048, batch=2),
    replace(LEVELS[-1], length=4096, batch=1),
]


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by a Newton-Schulz iteration (Jordan et al., 2024).

    Matrices of one shape are iterated as one batch. The update is scaled to the size of an AdamW
    step.
    """

    COEFFICIENTS = (3.4445, -4.7750, 2.0315)

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.01, steps=4):
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "steps": steps}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(state["momentum"], group["momentum"])
                wide = p.shape[0] <= p.shape[1]
                by_shape.setdefault(tuple(sorted(p.shape)), []).append(
                    (p, wide, update if wide else update.T)
                )
            a, b, c = self.COEFFICIENTS
            for same in by_shape.values():
                x = torch.stack([u for _, _, u in same])
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(group["steps"]):
                    gram = x @ x.transpose(1, 2)
                    x = a * x + (b * gram + c * gram @ gram) @ x
                for (p, wide, _), u in zip(same, x, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u if wide else u.T, alpha=-0.2 * group["lr"] * max(p.shape) ** 0.5)


def optimizers(model: NotebookModel, lr: float, others=()) -> list[torch.optim.Optimizer]:
    named = list(model.named_parameters())
    matrices = [p for n, p in named if p.dim() == 2 and "embed" not in n]
    rest = [*(p for n, p in named if p.dim() < 2 or "embed" in n), *others]
    return [Muon(matrices, lr), torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)]


def learning_rate(
    step: int, steps: int, peak: float, warmup: int = 100, decay: float = 0.35
) -> float:
    """Linear warm-up, constant, and a linear descent to zero over the last ``decay`` of the
    steps."""
    return peak * min(1.0, (step + 1) / warmup, (steps - step) / (decay * steps))


def make_batch(tokenizer, level: Level, rng: random.Random):
    """ids, roles and sources (batch, length + 1), positions (batch, length)."""
    composer = Composer(tokenizer, rng, level.style)
    documents = [
        composer.document(level.length, rng.uniform(0.4, 0.7) * level.length)
        for _ in range(level.batch)
    ]
    plain = list(range(level.length))
    positions = [
        spread_positions(rng, d, level.length) if rng.random() < 0.6 else plain for d in documents
    ]
    fields = (torch.tensor([getattr(d, f) for d in documents]) for f in ("ids", "role", "source"))
    return *fields, torch.tensor(positions)


def reading_matrices(config: NotebookConfig) -> torch.nn.Parameter:
    """(chunk, kv_heads * head_dim, hidden): from a summary's value to the token at each place."""
    width = config.num_kv_heads * config.head_dim
    return torch.nn.Parameter(torch.randn(config.chunk, width, config.hidden_size) * width**-0.5)


def losses(
    model: NotebookModel, reader, batch, address_layer: int, margin: float, copies: float,
    reading_weight: float,
):  # fmt: skip
    """(loss, that of answers, recall of first tokens, share of attention on the right summary, loss
    of reading)."""
    ids, role, source, positions = batch
    c = model.config
    target, role, source = ids[:, 1:], role[:, 1:], source[:, 1:]
    keep = (role != PLAIN) | (torch.rand(role.shape) < PLAIN_SHARE)
    # The token before the one to predict does the addressing; its source must have left the window.
    at = torch.arange(target.shape[1])
    outside = (source >= 0) & (source // c.chunk < at // c.chunk - c.window)
    row, position = outside.nonzero(as_tuple=True)
    logits, attended, held = model(
        ids[:, :-1],
        positions,
        keep,
        select=(row, position),
        select_layer=address_layer,
        copies=copies,
    )
    # Every value is read off its summary, whether or not it is found.
    told = source >= 0
    place = source[told]
    read = held[told.nonzero(as_tuple=True)[0], place // c.chunk] @ reader
    read = model.model.norm(read[place % c.chunk, torch.arange(len(place))])
    embedding = model.model.embed_tokens.weight[: c.vocab_size]
    reading = F.cross_entropy((read @ embedding.T).float(), target[told])
    role, target = role[keep], target[keep]
    weight = torch.tensor([LOSS_WEIGHT[r] for r in range(len(LOSS_WEIGHT))])[role]
    nll = F.cross_entropy(logits.float(), target, reduction="none")
    answer = role >= MARKER
    loss = (nll * weight)[answer].sum() / weight[answer].sum() + 0.05 * nll[~answer].mean()
    # One head of each key head is supervised; the others are free.
    heads = attended[:, :: c.num_heads // c.num_kv_heads].float()
    chunk = (source[row, position] // c.chunk)[:, None, None].expand(-1, heads.shape[1], 1)
    log_share = heads.gather(-1, chunk).clamp(max=-1e-6)
    share = log_share.exp()
    address = -(log_share - torch.log(share + margin * (1 - share))).mean()
    first = role == FIRST
    recall = (logits.argmax(-1) == target)[first].float().mean().item()
    total = loss + ADDRESS_WEIGHT * address + reading_weight * reading
    return total, loss.item(), recall, share.mean().item(), reading.item()


@torch.no_grad()
def quick_recall(
    model, tokenizer, length: int, documents: int = 8, hide_summaries=False, seed: int = 1
) -> float:
    """Share of whole values predicted right, on held-out names and values, where the source has
    left the window."""
    rng = random.Random(seed)
    c = model.config
    composer = Composer(tokenizer, rng, Style(filler=0.2, held_out=True))
    right = total = 0
    for _ in range(documents):
        d = composer.document(length, 0.6 * length)
        logits = model(torch.tensor([d.ids[:-1]]), hide_summaries=hide_summaries)[0]
        hit = (logits.argmax(-1) == torch.tensor(d.ids[1:])).tolist()
        t = 1
        while t < length:
            end = t
            while end < length and d.role[end] >= MARKER:
                end += 1
            if end > t and end < length:
                far = -1 < max(d.source[t:end]) < (t // c.chunk - c.window - 1) * c.chunk
                if far:
                    total += 1
                    right += all(hit[t - 1 : end - 1])
            t = end + 1
    return right / max(1, total)


def train(
    tokenizer,
    out: Path,
    *,
    steps: int,
    lr: float,
    seed: int,
    config: NotebookConfig | None = None,
    levels: list[Level] = LEVELS,
    begin: NotebookModel | None = None,
    bfloat16: bool = False,
    resume: bool = False,
    say=print,
    report_every: int = 50,
    evaluate_every: int = 500,
) -> NotebookModel:
    """Train a model of ``config`` from random weights, or go on from ``out``/state.pt with
    ``resume``, and return the model. ``begin``: a trained model instead, which begins at the last
    level; it reads its summaries already, so that the loss of reading is left out.

    The state (weights, optimisers, generators, level) is written every few minutes, to a new file
    that then takes the place of the old one.
    """
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = NotebookModel(config or NotebookConfig()) if begin is None else begin.train()
    decay, reading_weight = (0.35, READING_WEIGHT) if begin is None else (0.8, 0.0)
    config = model.config
    reader = reading_matrices(config)
    opts = optimizers(model, lr, [reader])
    address_layer = config.num_layers - 2
    state_file = out / "state.pt"
    step = since = tokens = 0
    level = 0 if begin is None else len(levels) - 1
    recall_average, seconds = 0.0, 0.0
    if resume:
        # weights_only: the file holds tensors and plain values, nothing that runs.
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        reader.data.copy_(state["reader"])
        for o, s in zip(opts, state["optimizers"], strict=True):
            o.load_state_dict(s)
        step, level, since, tokens, recall_average, seconds = state["progress"]
        version, internal, gauss = state["rng"]
        rng.setstate((version, tuple(internal), gauss))
        torch.set_rng_state(state["torch_rng"])
    size = sum(p.numel() for p in model.parameters())
    say(f"{size / 1e6:.2f} M parameters, {json.dumps(config.to_dict())}")
    # Processor time, not wall-clock: a paused or a shared machine does not count.
    started, saved = time.process_time() - seconds, time.monotonic()

    def save():
        s = {
            "model": model.state_dict(), "reader": reader.data,
            "optimizers": [o.state_dict() for o in opts],
            "rng": list(rng.getstate()),
            "torch_rng": torch.get_rng_state(), "config": config.to_dict(),
            "progress": [step, level, since, tokens, recall_average, time.process_time() - started],
        }  # fmt: skip
        temporary = state_file.with_suffix(".tmp")
        torch.save(s, temporary)
        temporary.replace(state_file)

    while step < steps:
        now = learning_rate(step, steps, lr, decay=decay)
        for o in opts:
            for group in o.param_groups:
                group["lr"] = now
        current = (
            level if level == 0 or rng.random() < 0.8 else rng.randrange(max(0, level - 2), level)
        )
        batch = make_batch(tokenizer, levels[current], rng)
        copies = 1.0
        if levels[current].copies > 1 and rng.random() < 0.6:
            copies = math.exp(rng.uniform(0, math.log(levels[current].copies)))
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss, answer_loss, recall, share, reading = losses(
                model, reader, batch, address_layer, levels[current].margin, copies, reading_weight
            )
        for o in opts:
            o.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for o in opts:
            o.step()
        step, since, tokens = step + 1, since + 1, tokens + batch[3].numel()
        if current == level:
            recall_average += 0.03 * (recall - recall_average)
        if step % report_every == 0:
            used = time.process_time() - started
            say(
                f"step {step} length {levels[level].length} recall {recall_average:.3f} "
                f"answers {answer_loss:.3f} address {share:.3f} reading {reading:.3f} lr {now:.1e} "
                f"tokens {tokens / 1e6:.2f}M cpu {used:.0f}s {tokens / used:.0f} tok/cpu-s"
            )
        if since >= 60 and recall_average > levels[level].passed and level + 1 < len(levels):
            level, since, recall_average = level + 1, 0, 0.8 * recall_average
            say(f"step {step}: now documents of {levels[level].length} tokens")
        if step % evaluate_every == 0:
            scores = {n: round(quick_recall(model, tokenizer, n), 3) for n in TESTED}
            hidden = quick_recall(model, tokenizer, 256, hide_summaries=True)
            say(f"step {step}: held out {scores}, summaries hidden {hidden:.3f}")
        if time.monotonic() - saved > 120:
            saved = time.monotonic()
            save()
    save()
    return model
