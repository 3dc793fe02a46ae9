"""The second lesson: the whole KSA model against its base, end to end on its own text stream."""

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..attention.plan import Call
from .streams import attend_all, text_stream


@dataclass
class Goal:
    """What the base says of a batch. ids (B, n); positions (B, P): where its next tokens are
    compared, of which those that recall something weigh double by `weights` (B, P);
    log_probs (B, P, text ids) there; states: hidden states (B, n - first, hidden) of some layers,
    from `first` on.
    """

    ids: mx.array
    positions: mx.array
    weights: mx.array
    log_probs: mx.array
    states: dict[int, mx.array]
    first: int


def goal(teacher, ids: mx.array, positions: np.ndarray, weights: np.ndarray, first: int) -> Goal:
    """Run the base. Args as in `Goal`; every third layer's states are kept."""
    states: dict[int, mx.array] = {}

    def keep(i: int, h: mx.array):
        if i % 3 == 2:
            states[i] = h[:, first:]
        mx.async_eval(h)

    at = mx.array(positions)
    h = text_stream(teacher, ids, attend_all, keep)
    found = Goal(ids, at, mx.array(weights), log_probs(teacher, h, at), states, first)
    mx.eval(found.log_probs, list(states.values()))
    return found


def log_probs(model, h: mx.array, positions: mx.array) -> mx.array:
    """Log-probabilities (B, P, text ids), float32, of the token after each position (B, P)."""
    h = mx.take_along_axis(h, positions[..., None], axis=1)
    logits = model.head(h)[..., : model.args.num_predicted].astype(mx.float32)
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)


def states_of(model, ids: mx.array, keep, checkpointed: bool) -> tuple[mx.array, dict]:
    """A KSA model's own forward, differentiable: the last hidden states (B, n, hidden), normed,
    and the text's states behind the layers in `keep`.

    checkpointed: layers are computed again in the backward, and hold nothing until then.
    """
    text, n = model.model, ids.shape[1]
    call = Call(model.args, n, None, text.windowed is not None, training=True)
    h, states = text.embed_tokens(ids), {}
    if call.rows:
        h = text.with_summaries(h, call)
    for i, layer in enumerate(text.layers):
        run = nn.utils.checkpoint(layer) if checkpointed else layer
        h = run(h, call, "causal")
        if i in keep:
            states[i] = h[:, :n]
    return text.norm(h[:, :n]), states


def loss(model, wanted: Goal, checkpointed: bool = False) -> tuple[mx.array, dict[str, mx.array]]:
    """KL to the base at the goal's positions, nats a token, plus the relative square error of
    hidden states; means over texts."""
    h, states = states_of(model, wanted.ids, wanted.states, checkpointed)
    said = log_probs(model, h, wanted.positions)
    each = (mx.exp(wanted.log_probs) * (wanted.log_probs - said)).sum(axis=-1)
    kl = ((each * wanted.weights).sum(axis=1) / wanted.weights.sum(axis=1)).mean()
    errors = [
        (states[i][:, wanted.first :] - x).square().sum(-1) / x.square().sum(-1)
        for i, x in wanted.states.items()
    ]
    # A base of one or two layers has none.
    hidden = mx.stack([e.mean() for e in errors]).mean() if errors else mx.array(0.0)
    return kl + hidden, {"kl": kl, "hidden": hidden}
