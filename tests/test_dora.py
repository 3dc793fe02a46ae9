"""DoRA on quantised weights of every width."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from ksa_mlx.stock import dora


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_dora_starts_as_the_layer_that_it_adapts(bits):
    linear = nn.Linear(64, 32, bias=False).to_quantized(group_size=32, bits=bits)
    x = mx.random.normal((3, 64), key=mx.random.key(0))
    layer = dora.from_base(linear, r=2)
    assert mx.allclose(layer(x), linear(x), atol=1e-4)
    assert layer.lora_a.shape == (64, 2)
    layer.lora_b = mx.ones_like(layer.lora_b)
    assert mx.abs(layer(x) - linear(x)).max() > 1e-2


def test_mlx_lm_still_needs_it():
    """When this fails, mlx-lm counts the columns right: remove stock/dora.py."""
    linear = nn.Linear(64, 32, bias=False).to_quantized(group_size=32, bits=3)
    with pytest.raises(ValueError):
        dora._from_base(linear, r=2)(mx.zeros((1, 64)))
