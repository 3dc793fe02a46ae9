"""A KSA model on several machines: tensor parallel (`shard`) or layer by layer (`Pipeline`).

Both are what mlx-lm's `sharded_load` asks of a model. Tensor parallel: every machine has every
layer and a share of its heads, KV heads (so also of its KV cache) and MLP. Pipeline: every machine
has some layers and their caches.
"""

from functools import cached_property
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.nn.layers.distributed import shard_linear
from mlx.utils import tree_map
from mlx_lm.models.pipeline import PipelineMixin


def shard(model, group: mx.distributed.Group | None = None):
    """Keep this rank's share of a `Model`'s heads and MLP; the norms and tables stay whole.

    Raises ValueError if heads, MLP or quantisation groups do not split evenly over the group.
    """
    group = group or mx.distributed.init()
    _check_even(model, group.size())
    for layer in model.layers:
        attn, mlp = layer.self_attn, layer.mlp
        inputs = [
            (attn, f"{name}_proj{own}") for own in ("", "_summary") for name in ("q", "k", "v")
        ]
        inputs += [(mlp, "gate_proj"), (mlp, "up_proj")]
        for module, name in inputs:
            if name in module:
                module[name] = shard_linear(module[name], "all-to-sharded", group=group)
        for module, name in ((attn, "o_proj"), (mlp, "down_proj")):
            module[name] = shard_linear(module[name], "sharded-to-all", group=group)
        attn.n_heads //= group.size()
        attn.n_kv_heads //= group.size()


def _check_even(model, size: int):
    args = model.args
    for name in ("num_key_value_heads", "intermediate_size"):
        if getattr(args, name) % size:
            raise ValueError(
                f"{name}: found {getattr(args, name)}, expected a multiple of the {size} machines "
                "that share each layer; --pipeline gives whole layers to each"
            )
    for layer in model.layers:
        for name, linear in (
            ("o_proj", layer.self_attn.o_proj),
            ("down_proj", layer.mlp.down_proj),
        ):
            if isinstance(linear, nn.QuantizedLinear) and linear.scales.shape[-1] % size:
                raise ValueError(
                    f"{name}: found {linear.scales.shape[-1]} quantisation groups of "
                    f"{linear.group_size}, expected a multiple of the {size} machines that share "
                    "each layer; quantise with a smaller group size, or use --pipeline"
                )


class Pipeline(PipelineMixin):
    """mlx-lm's pipeline for `KSAModel`: summary rows cross from rank to rank too.

    The highest rank has the first layers. Every rank plans the same summary rows from its own
    caches, so only hidden states are sent: the text rows, and the summary rows until the last
    windowed layer of the whole model.
    """

    args: Any  # of the model

    def pipeline(self, group: mx.distributed.Group, split: list[int] | None = None):
        """Keep this rank's layers; `split[r]` is how many rank r has (default: even, low ranks
        take what is left over).

        Raises ValueError on every rank if one gets no layer, or could not know how many summary
        rows come.
        """
        size, layers, last = group.size(), len(self.layers), self.args.last_windowed
        if split is None:
            split = [layers // size + (rank < layers % size) for rank in range(size)]
        if len(split) != size or min(split) < 1 or sum(split) != layers:
            raise ValueError(
                f"pipeline: found a split of {split} layers, expected one entry of at least 1 for "
                f"each of {size} machines, {layers} in all"
            )
        starts = [sum(split[rank + 1 :]) for rank in range(size)]
        for rank, (start, count) in enumerate(zip(starts, split, strict=True)):
            windows = self.args.windows[start : start + count]
            if start <= last and all(w is None for w in windows):
                raise ValueError(
                    f"pipeline: found no windowed layer among layers {start} to "
                    f"{start + count - 1} of rank {rank}, expected one, since summary tokens run "
                    f"on to layer {last}; use fewer machines or another split"
                )
        self.group, self.pipeline_rank, self.pipeline_size = group, group.rank(), size
        start = starts[group.rank()]
        self.take_layers(start, start + split[group.rank()])
        # Layers keep their numbers, by which weights are loaded.
        self.layers = [None] * self.start_idx + self.pipeline_layers

    @cached_property
    def windows(self) -> list[int | None]:
        """The windows of this rank's layers."""
        return self.args.windows[self.start_idx : self.end_idx]

    def take_layers(self, start: int, stop: int | None):
        """Note that this rank has the layers start .. stop - 1, and which of them is the first
        full and the first windowed one (None without)."""
        self.start_idx, self.end_idx = start, stop
        self.__dict__.pop("windows", None)
        kinds = [window is None for window in self.windows]
        self.full = kinds.index(True) if True in kinds else None
        self.windowed = kinds.index(False) if False in kinds else None

    def receive(self, h: mx.array, length: int) -> mx.array:
        """This rank's input: h (B, rows, hidden) itself, or what the rank before sends.

        The first `length` rows of h are text; of an h that is not ours only shape and dtype count.
        """
        if self.pipeline_rank == self.pipeline_size - 1:
            return h
        if self.start_idx > self.args.last_windowed:
            h = h[:, :length]
        return mx.distributed.recv_like(h, self.pipeline_rank + 1, group=self.group)

    def send(self, h: mx.array, length: int, shape: tuple, cache: list[Any]) -> mx.array:
        """Send this rank's output on; returns the last layer's text in `shape`, on every rank."""
        if self.pipeline_size == 1:
            return h.reshape(shape)
        if self.pipeline_rank:
            h = mx.distributed.send(h, self.pipeline_rank - 1, group=self.group)
            # In prefill mlx-lm evaluates the caches only: they must take the sending along.
            depend_on(cache[-1], h)
        h = h[:, :length].reshape(shape)
        return mx.distributed.all_gather(h, group=self.group)[: shape[0]]


def depend_on(cache: Any, h: mx.array):
    """Make whoever evaluates a cache, ours or mlx-lm's KVCache, evaluate h too."""
    if hasattr(cache, "depend_on"):
        cache.depend_on(h)
    elif getattr(cache, "keys", None) is not None:
        cache.keys = tree_map(lambda x: mx.depends([x], [h])[0], cache.keys)
