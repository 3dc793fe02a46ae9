"""DoRA on weights of 3, 5 and 6 bits: to train, and wherever such an adapter is loaded."""

from typing import Any

import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear

_from_base = DoRALinear.from_base


def from_base(linear: Any, r: int = 8, dropout: float = 0.0, scale: float = 20.0):
    """mlx-lm's, which counts `32 // bits` columns a word: too few where bits do not divide 32."""
    if not isinstance(linear, nn.QuantizedLinear):
        return _from_base(linear, r, dropout, scale)
    outputs, words = linear.weight.shape
    layer = DoRALinear(words * 32 // linear.bits, outputs, r=r, dropout=dropout, scale=scale)
    layer.set_linear(linear)
    return layer


def install():
    """Make mlx-lm, in this process, use the function above. Idempotent."""
    layers: Any = DoRALinear
    layers.from_base = staticmethod(from_base)
