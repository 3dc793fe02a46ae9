"""The first lesson: each windowed layer's attention, with summaries, against the base's.

The text is the base's own, so layers learn side by side; gradients run through all layers of the
summary rows, an eighth of the text.
"""

import mlx.core as mx

from .features import Features, Lesson, grouped, weighed
from .streams import Pair, merged, summary_stream

# Gaps that are none.
TINY = 1e-30


def with_summaries(lesson: Lesson, summaries: Pair, visible: mx.array) -> mx.array:
    """A layer's attention at the sampled positions when it also reads summaries.

    Args: summaries: keys, after RoPE, and values, (B, KV heads, chunks, head_dim). visible (B, P,
    chunks). Returns (B, heads, P, head_dim).
    """
    keys, values = summaries
    # Not infinity, of which a row without summaries would have no gradient.
    scores = mx.where(visible[:, None], grouped(lesson.queries, keys), -1e9)
    mass = mx.logaddexp(lesson.log_mass, mx.logsumexp(scores, axis=-1))
    far = weighed(mx.exp(scores - mass[..., None]), values)
    return mx.exp(lesson.log_mass - mass)[..., None].astype(far.dtype) * lesson.near + far


def errors(model, features: Features) -> dict[int, tuple[mx.array, mx.array]]:
    """What each windowed layer's output lacks with its summaries, and without them: mean squares
    (B,) after projection, by layer."""
    found = {}
    for i, rows in summary_stream(model, features.texts.__getitem__, features.chunks):
        if i in features.lessons:
            lesson = features.lessons[i]
            out = with_summaries(lesson, rows.pair(), features.visible)
            out = model.model.layers[i].self_attn.o_proj(merged(out)).astype(mx.float32)
            found[i] = (out - lesson.target).square().mean(axis=(1, 2)), lesson.gap
    return found


def relative(found: dict[int, tuple[mx.array, mx.array]], usual: dict[int, float]) -> mx.array:
    """The loss (B,): the mean over layers of the error, relative to half the text's own gap and
    half the usual one, so that texts with little to learn weigh little."""
    each = []
    for i, (error, gap) in found.items():
        whole = 0.5 * gap + 0.5 * (usual.get(i) or gap)
        # A layer whose attention gives nothing has no gap, and nothing to learn.
        each.append(mx.where(whole > TINY, error / mx.maximum(whole, TINY), 0.0))
    return mx.stack(each).mean(axis=0)
