"""Names and shapes of weights: what a checkpoint holds and what the model keeps of it.

Three layouts: the Hub's (PyTorch), that of Kuaishou's Muse (training, see `muse.py`) and ours
(MLX). Ours is the Hub's, except that `model.embed_tokens.weight` and `lm_head.weight` hold text
rows only, that `model.summary_embedding` is a parameter of its own, and that dead parameters are
gone.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import ModelArgs
from .errors import CheckpointError

Shape = tuple[int, ...]

EMBED = "model.embed_tokens.weight"
SUMMARY = "model.summary_embedding"
HEAD = "lm_head.weight"
# Why a checkpoint's head may be left out.
TIED = "a head that is tied to the embedding"


@dataclass(frozen=True)
class Part:
    """The tensor of a checkpoint that a weight is made of, or some of its rows."""

    source: str
    rows: tuple[int, int] | None = None

    def of(self, tensor):
        return tensor if self.rows is None else tensor[self.rows[0] : self.rows[1]]


@dataclass
class Plan:
    """How a checkpoint becomes the weights of a model.

    `source`: shapes of the tensors that the checkpoint must hold. `parts`: what each of our
    weights is made of. `dead`: tensors that it may hold and the model can never use, each with
    its shape (None: any) and the reason. `zeros`: weights that the checkpoint's own model lacks
    and ours has, with their shapes.
    """

    source: dict[str, Shape] = field(default_factory=dict)
    parts: dict[str, Part] = field(default_factory=dict)
    dead: dict[str, tuple[Shape | None, str]] = field(default_factory=dict)
    zeros: dict[str, Shape] = field(default_factory=dict)

    def take(self, name: str, source: str, shape: Shape, rows: tuple[int, int] | None = None):
        self.source[source] = shape
        self.parts[name] = Part(source, rows)

    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of our weights."""
        shapes = dict(self.zeros)
        for name, part in self.parts.items():
            shape = self.source[part.source]
            rows = part.rows or (0, shape[0])
            shapes[name] = (rows[1] - rows[0], *shape[1:])
        return shapes

    def check(self, found: Mapping[str, Shape]):
        """Raise `CheckpointError` unless the tensors found are the ones expected."""
        missing = [n for n in self.source if n not in found]
        extra = [n for n in found if n not in self.source and n not in self.dead]
        if why := misnamed(missing, extra):
            raise CheckpointError(why)
        for name, shape in found.items():
            expected = self.source[name] if name in self.source else self.dead[name][0]
            if expected is not None and tuple(shape) != expected:
                raise CheckpointError(
                    f"{name}: found shape {list(shape)}, expected {list(expected)}"
                )


def misnamed(missing: list[str], extra: list[str]) -> str | None:
    """What to say of weights that are not there and of others that are; None if there are none."""
    if missing:
        instead = f"; found {some(extra)} instead" if extra else ""
        return f"missing weights: {some(missing)}{instead}"
    return f"weights that this model does not have: {some(extra)}" if extra else None


def some(names: Iterable[str]) -> str:
    """Up to three names, and how many more."""
    names = list(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def layer_shapes(args: ModelArgs) -> dict[str, Shape]:
    """Shapes of one layer's tensors, Hub names, as far as the config announces them."""
    hidden, dim, mlp = args.hidden_size, args.head_dim, args.intermediate_size
    heads, kv_heads = args.num_attention_heads * dim, args.num_key_value_heads * dim
    shapes: dict[str, Shape] = {"input_layernorm.weight": (hidden,)}
    if args.summary_independent_attention_layernorm:
        shapes["input_layernorm_summary.weight"] = (hidden,)

    linears = {
        "q_proj": (heads, hidden),
        "k_proj": (kv_heads, hidden),
        "v_proj": (kv_heads, hidden),
    }
    if args.summary_independent_parameters:
        linears.update({f"{name}_summary": shape for name, shape in linears.items()})
    linears["o_proj"] = (hidden, heads)
    for name, shape in linears.items():
        shapes[f"self_attn.{name}.weight"] = shape
        if args.attention_output_bias if name == "o_proj" else args.attention_bias:
            shapes[f"self_attn.{name}.bias"] = shape[:1]

    norms = ["q_norm", "k_norm"] if args.use_qk_norm else []
    if args.summary_independent_parameters and args.summary_independent_qk_norm:
        norms += ["q_norm_summary", "k_norm_summary"]
    shapes.update({f"self_attn.{name}.weight": (dim,) for name in norms})

    shapes["post_attention_layernorm.weight"] = (hidden,)
    shapes["mlp.gate_proj.weight"] = shapes["mlp.up_proj.weight"] = (mlp, hidden)
    shapes["mlp.down_proj.weight"] = (hidden, mlp)
    return shapes


def why_dead(args: ModelArgs, layer: int, name: str) -> str | None:
    """Why the model can never use this tensor of a layer; None if it does."""
    if "_summary" not in name:
        return None
    if name.startswith("input_layernorm"):
        used = args.own_norm(layer)
    else:
        used = args.own_q(layer) if ".q_" in name else args.own_kv(layer)
        if not used and not args.own_projections:
            return "summary projections, unused at mix_coeff 0"
    if used:
        return None
    if args.bypass[layer]:
        return "summary parameters of layers that summary tokens skip"
    return "summary parameters after the last layer that reads summaries"


def hub_plan(args: ModelArgs) -> Plan:
    """From the Hub's layout to ours."""
    plan = Plan()
    begin, end = args.summary_token_begin, args.summary_token_begin + args.summary_token_num
    table = (args.vocab_size, args.hidden_size)
    plan.take(EMBED, EMBED, table, (0, begin))
    plan.take(SUMMARY, EMBED, table, (begin, end))
    tensors = layer_shapes(args)
    for layer in range(args.num_hidden_layers):
        for name, shape in tensors.items():
            full = f"model.layers.{layer}.{name}"
            dead = why_dead(args, layer, name)
            if dead:
                plan.dead[full] = shape, dead
            else:
                plan.take(full, full, shape)
        plan.dead[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = None, "RoPE tables"
    plan.dead["model.rotary_emb.inv_freq"] = None, "RoPE tables"
    plan.take("model.norm.weight", "model.norm.weight", (args.hidden_size,))
    if args.tie_word_embeddings:
        plan.dead[HEAD] = None, TIED
    else:
        plan.take(HEAD, HEAD, table, (0, begin))
    return plan


def expected_shapes(args: ModelArgs) -> dict[str, Shape]:
    """Names and shapes of the model's weights, in our layout and unquantised."""
    return hub_plan(args).shapes()


def mlx_plan(args: ModelArgs) -> Plan:
    """From our layout to ours: what a converted folder must hold."""
    plan = Plan()
    for name, shape in expected_shapes(args).items():
        plan.take(name, name, shape)
    return plan


def announced(config: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The config with the fields that only the weights tell, where it leaves them out.

    Upstream's Hub config knows no `summary_independent_qk_norm`, yet its converter carries a
    Muse checkpoint's `q_norm_summary` over (examples/pretrain/convert/checkpoint.py).
    """
    config = dict(config)
    for key, end in (
        ("summary_independent_qk_norm", ".q_norm_summary.weight"),
        ("summary_independent_attention_layernorm", ".input_layernorm_summary.weight"),
    ):
        if key not in config and any(n.endswith(end) for n in names):
            config[key] = True
    return config


def sanitize(args: ModelArgs, weights: dict[str, Any]) -> dict[str, Any]:
    """Weights in the Hub's layout or in ours, as the model holds them (lazy, idempotent).

    Names that no layout knows stay, for a strict load to refuse; quantised weights pass.
    """
    plan = hub_plan(args)
    kept = {n: w for n, w in weights.items() if n not in plan.dead}
    if SUMMARY in kept:
        return kept
    for name, part in plan.parts.items():
        tensor = weights.get(part.source)
        # A shard of a converted folder may come alone: its tables have no rows to cut.
        if part.rows is None or tensor is None or tensor.shape[0] < plan.source[part.source][0]:
            continue
        kept[name] = part.of(tensor)
    return kept
