"""Kernels that nobody here wrote give their authors' results in the instrument: mlx-lm's, against operations."""

import importlib

import mlx.core as mx
import numpy as np
import pytest
from mlx import nn
from mlx_lm.models import gated_delta

from . import metal_cpu

try:
    # Newer than some supported versions of mlx-lm.
    fused = importlib.import_module("mlx_lm.kernels")
except ImportError:
    fused = None

pytestmark = pytest.mark.skipif(not metal_cpu.available(), reason=str(metal_cpu.unavailable()))
needs_fused = pytest.mark.skipif(fused is None, reason="this mlx-lm has no mlx_lm.kernels")

rng = np.random.default_rng(0)
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
TOLERANCE = {
    mx.float32: 1e-5,
    mx.float16: 2e-3,
    mx.bfloat16: 1.2e-2,
}  # relative to the largest value


def normal(*shape, dtype=mx.float32, scale=1.0):
    return mx.array(rng.standard_normal(shape).astype(np.float32) * scale).astype(dtype)


def f32(x):
    return x.astype(mx.float32)


def close(got, expected, tolerance):
    got, expected = np.array(f32(got)), np.array(f32(expected))
    np.testing.assert_allclose(
        got.ravel(), expected.ravel(), rtol=0, atol=tolerance * np.abs(expected).max()
    )


@pytest.fixture(scope="module")
def log():
    names = (
        "qk_norm",
        "expert_routing",
        "qk_norm_rope",
        "post_expert_norm_combine",
        "rms_norm_sigmoid_gate",
        "norm_add_norm",
    )
    kernels = [importlib.import_module(f"mlx_lm.kernels.{name}") for name in names] if fused else []
    with metal_cpu.running(reload=[gated_delta, *kernels], orders=3, lint=True) as log:
        yield log


# ---- models/gated_delta.py

VARIANTS = {  # kernel, gates by channel, mask
    "unpacked": ("gated_delta_kernel_unpacked", False, False),
    "packed": ("gated_delta_kernel", False, False),
    "tree": ("gated_delta_kernel_xtree", False, False),
    "vector": ("gated_delta_kernel", True, False),
    "mask": ("gated_delta_kernel", False, True),
    "vector, mask": ("gated_delta_kernel", True, True),
}


@pytest.mark.quick(1)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_gated_delta(variant, dtype, log):
    kernel, by_channel, masked = VARIANTS[variant]
    if not hasattr(gated_delta, kernel):
        pytest.skip(f"this mlx-lm has no {kernel}")
    B, T, Hk, Hv, Dk, Dv = 2, 5, 2, 4, 128, 16
    q, k = (
        normal(B, T, Hk, Dk, dtype=dtype, scale=0.1),
        normal(B, T, Hk, Dk, dtype=dtype, scale=0.1),
    )
    v, beta = normal(B, T, Hv, Dv, dtype=dtype), mx.sigmoid(normal(B, T, Hv, dtype=dtype))
    g = mx.sigmoid(normal(B, T, Hv, Dk) if by_channel else normal(B, T, Hv))
    state = normal(B, Hv, Dv, Dk, scale=0.3)
    mask = mx.array(rng.random((B, T)) > 0.3) if masked else None
    # Where the mask is off, all lanes write the same zero.
    with metal_cpu.settings(allow_equal_writes=masked):
        y, new_state = getattr(gated_delta, kernel)(q, k, v, g, beta, state, mask)
    expected, expected_state = gated_delta.gated_delta_ops(
        f32(q), f32(k), f32(v), g, f32(beta), state, mask
    )
    if masked:
        expected = mx.where(mask[:, :, None, None], expected, 0)
    close(y, expected, TOLERANCE[dtype])
    close(new_state, expected_state, 1e-5)
    assert log.last.buffers["state_in"].loaded_elements == state.size
    assert log.last.buffers["state_out"].stored_elements == state.size


# ---- kernels/*.py; the expected values are what their docstrings say


def rms(x, eps):
    return x * mx.rsqrt((x * x).mean(-1, keepdims=True) + eps)


@pytest.mark.quick(1)
@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_add_norm(dtype, log):
    D = 1536
    branch, stream, alpha, beta, weight = (
        normal(3, D, dtype=dtype),
        normal(3, D),
        normal(D),
        normal(D),
        normal(D, dtype=dtype),
    )
    norm = nn.RMSNorm(D, eps=1e-5)
    norm.weight = normal(D)
    new_stream, normed = fused.norm_add_norm(
        branch, stream, alpha=alpha, beta=beta, post_weight=weight, post_eps=1e-6, next_norm=norm
    )
    post = rms(f32((f32(weight) * f32(branch)).astype(dtype)), 1e-6).astype(dtype)
    expected = alpha * stream + beta * f32(post)
    close(new_stream, expected, TOLERANCE[dtype])
    close(normed, rms(expected, 1e-5) * norm.weight, TOLERANCE[dtype])
    again = fused.pre_norm(new_stream, norm, dtype=dtype)
    assert mx.array_equal(again, normed)  # promised to the bit


@pytest.mark.quick(1)
@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_post_expert_norm_combine(dtype, log):
    experts, weights, norm_weight = (
        normal(3, 4, 1536, dtype=dtype),
        mx.softmax(normal(3, 4), -1),
        normal(1536, dtype=dtype),
    )
    out = fused.post_expert_norm_combine(experts, weights, norm_weight=norm_weight, eps=1e-6)
    close(
        out,
        (rms(f32(experts) * f32(norm_weight), 1e-6) * weights[..., None]).sum(-2),
        TOLERANCE[dtype],
    )


@pytest.mark.quick(1)
@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rope", [False, True])
def test_qk_norm(rope, dtype, log):
    heads, kv_heads, D = 6, 2, 128
    x = normal(2, 5, 2 * (heads + kv_heads) * D, dtype=dtype)
    arguments = {
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "head_dim": D,
        "eps": 1e-6,
        "query_scale": 0.25,
    }
    q = rms(f32(x[..., : heads * D]).reshape(2, 5, heads, D), 1e-6) * 0.25
    k = rms(f32(x[..., heads * D : (heads + kv_heads) * D]).reshape(2, 5, kv_heads, D), 1e-6)
    if not rope:
        got = fused.qk_norm(x, **arguments)
    else:
        offset = mx.array([3, 700])
        got = fused.qk_norm_rope(x, rope_base=1e4, offset=offset, **arguments)
        q, k = (
            mx.fast.rope(
                z.astype(dtype).swapaxes(1, 2),
                D,
                traditional=True,
                base=1e4,
                scale=1.0,
                offset=offset,
            ).swapaxes(1, 2)
            for z in (q, k)
        )
    for a, b in zip(got, (q, k), strict=False):
        close(a, b, TOLERANCE[dtype] * (5 if rope else 1))  # two roundings, and angles up to 700


@pytest.mark.quick(1)
@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_sigmoid_gate(dtype, log):
    B, H, L, D = 2, 3, 5, 128
    x, gate = normal(B, H, L, D, dtype=dtype), normal(B, L, H * D, dtype=dtype)
    expected = rms(f32(x), 1e-6).swapaxes(1, 2).reshape(B, L, -1) * mx.sigmoid(f32(gate))
    close(fused.rms_norm_sigmoid_gate(x, gate, eps=1e-6), expected, TOLERANCE[dtype])
    strided = mx.contiguous(x.swapaxes(1, 2)).swapaxes(1, 2)
    close(fused.rms_norm_sigmoid_gate(strided, gate, eps=1e-6), expected, TOLERANCE[dtype])
    assert log.last.copies == {}


@pytest.mark.quick(1)
@needs_fused
@pytest.mark.parametrize("dtype", DTYPES)
def test_expert_routing(dtype, log):
    logits, bias = normal(8, 60, dtype=dtype), normal(60, scale=0.1)
    got, weights = fused.expert_routing(
        logits, bias, top_k=6, multiplier=1.5, score_eps=1e-9, route_scale=2.0
    )
    scores = mx.sigmoid(f32(logits) * 1.5)
    expected = mx.argsort(-(scores + bias), -1)[:, :6]
    assert mx.array_equal(got, expected)
    chosen = mx.take_along_axis(scores, expected, -1)
    close(weights, chosen / chosen.sum(-1, keepdims=True) * 2, 1e-5)
