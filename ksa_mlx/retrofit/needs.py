"""What a retrofit needs, computed before it starts: bytes of memory, and arithmetic a token."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from ..errors import MemoryLimitError
from ..memory.caches import arrays
from ..memory.room import gb
from .stages import QUERIES, VISITS, Settings
from .trainable import ADAPTED, is_summary, trainable

# A float32 parameter, its gradient, and Adam's two moments.
TRAINED = 4 * 4


class Need(NamedTuple):
    """Bytes: the model's arrays; what training holds for each parameter; the features of a pool
    of texts; one step of the regression; one of the distillation."""

    weights: int
    trained: int
    pool: int
    regression: int
    distillation: int

    @property
    def total(self) -> int:
        """At the worst moment: features are gone when the distillation begins."""
        return self.weights + self.trained + max(self.pool + self.regression, self.distillation)

    def __str__(self) -> str:
        return (
            f"{gb(self.total)} (weights {gb(self.weights)}, what is trained with its optimiser "
            f"{gb(self.trained)}, stage 1 {gb(self.pool + self.regression)}, stage 2 "
            f"{gb(self.distillation)})"
        )


@dataclass
class Shape:
    """Sizes of a student, in parameters and rows."""

    args: Any
    size: int  # bytes of an activation

    def row(self) -> int:
        """Numbers that the backward through a layer needs of each of its rows, about: residuals
        and norms, heads before and after RoPE, what is between the MLP's projections."""
        a = self.args
        heads = (2 * a.num_attention_heads + 2 * a.num_key_value_heads) * a.head_dim
        return 6 * a.hidden_size + 2 * heads + 5 * a.intermediate_size

    def scores(self, n: int, window: int | None) -> int:
        """Attention weights of a text of n tokens in a layer: kept, and what they come from."""
        a = self.args
        seen = n // 2
        if window is not None:
            k = a.summary_chunk_size
            seen = min(n // 2, (window + 32) * k + n // k // 2)
        return 2 * a.num_attention_heads * n * seen


def need(student, settings: Settings, checkpointed: bool, machines: int = 1) -> Need:
    """Of a student before training, without LoRA, on each machine."""
    args, n, B = student.args, settings.length, settings.batch_size
    weights = sum(x.nbytes for x in arrays(student.parameters()))
    norm = student.model.norm.weight.dtype
    shape = Shape(args, norm.size)
    own = sum(x.size for x in trainable(student, is_summary).values())
    layers, chunks = args.num_hidden_layers, n // args.summary_chunk_size
    lora = 0
    for layer in student.model.layers:
        for name in ADAPTED:
            module = layer.self_attn[name]
            rows = module.weight.shape[0]
            columns = (
                args.hidden_size if name != "o_proj" else args.num_attention_heads * args.head_dim
            )
            lora += settings.lora_rank * (rows + columns)
    windowed = [w for w in args.windows if w is not None]
    kv = 2 * args.num_key_value_heads * args.head_dim
    lesson = 4 * QUERIES * args.num_attention_heads * args.head_dim + QUERIES * args.hidden_size * 2
    # Before training each machine holds the texts of all.
    pool = machines * settings.pool * B * (n * kv * layers + lesson * len(windowed)) * shape.size
    # Summaries go through all layers; sampled queries through the windowed ones.
    scores = 4 * QUERIES * chunks * args.num_attention_heads
    queries = 3 * QUERIES * args.num_attention_heads * args.head_dim
    regression = (
        B * shape.size * (layers * chunks * shape.row() + len(windowed) * (scores + queries))
    )
    rows = n + chunks
    each = [B * (rows * shape.row() + shape.scores(n, w)) * shape.size for w in args.windows]
    if checkpointed:
        held = max(each) * 2 + layers * B * rows * args.hidden_size * shape.size
    else:
        held = sum(each)
    # Log-probabilities of base and student, float32: their logits, exponents, gradients.
    vocabulary = 6 * B * settings.compared * args.summary_token_begin * 4
    states = (layers // 3) * B * n * args.hidden_size * shape.size * 2
    return Need(weights, TRAINED * (own + lora), pool, regression, held + vocabulary + states)


def fitting(
    student, settings: Settings, limit: int, source: str, machines: int = 1
) -> tuple[Need, bool]:
    """What a run needs, and whether layers must be computed again in the backward. Raises
    `MemoryLimitError` if it does not fit either way."""
    for checkpointed in (settings.checkpointed, True):
        found = need(student, settings, checkpointed, machines)
        if found.total <= limit:
            return found, checkpointed
    ways = "a shorter --length, --batch-size 1, --lora-rank 4, or a base in 4 bits with --own-rank"
    raise MemoryLimitError(
        f"--model: training needs {found}, and there are {gb(limit)} ({source}); what helps: {ways}"
    )


class Work(NamedTuple):
    """Floating-point operations a token: of the two stages, the base's share included."""

    regression: float
    distillation: float


def work(args: Any, settings: Settings) -> Work:
    """Of matrix products, 2 operations a multiplication and addition; of the regression's tokens
    the base's features are used VISITS times."""
    n, chunk = settings.length, args.summary_chunk_size
    base, own = _forward(args, n, full=True), _forward(args, n, full=False)
    logits = 2 * settings.compared / n * args.hidden_size * args.summary_token_begin
    # Backward: gradients of the inputs, and a little of weights that are trained.
    return Work(base / VISITS + 2.2 * base / chunk, base + 2.2 * own + 4 * logits)


def _forward(args: Any, n: int, full: bool) -> float:
    """A text token's share of one forward: with its summary's share unless the base's."""
    heads, kv, dim = args.num_attention_heads, args.num_key_value_heads, args.head_dim
    layer = (
        args.hidden_size * dim * (2 * heads + 2 * kv)
        + 3 * args.hidden_size * args.intermediate_size
    )
    total = 0.0
    for window in args.windows:
        seen = n / 2
        if not full and window is not None:
            seen = min(n / 2, window * args.summary_chunk_size + n / args.summary_chunk_size / 2)
        rows = 1 if full else 1 + 1 / args.summary_chunk_size
        total += 2 * rows * layer + 4 * heads * dim * seen
    return total
