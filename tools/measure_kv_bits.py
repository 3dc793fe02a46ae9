"""What quantising the KV cache costs in quality: KL divergence of the next-token distribution.

    python tools/measure_kv_bits.py

A long text is read through caches whose keys, values and window text have bits of their own (mlx's
affine format, groups of 32, from the first token on), and the logits are compared with those of
plain caches: on the embedded model, whose recall goes through its summaries, and on a random model.
"""

import argparse

import mlx.core as mx

import ksa_mlx
from ksa_mlx.benchmark.models import dims, make_args
from ksa_mlx.benchmark.timing import Table
from ksa_mlx.chat.notebook import CHECKPOINT, notes
from ksa_mlx.model import Model

GROUP = 32

# Bits of keys, of values, and of the window's text (keys and values), None: as all else.
SPLITS: list[tuple[int, int, int | None]] = [
    (8, 8, None),
    (8, 4, None),
    (6, 6, None),
    (4, 8, None),
    (6, 4, None),
    (5, 5, None),
    (4, 6, None),
    (4, 4, None),
    (6, 4, 8),
    (5, 5, 8),
    (4, 6, 8),
    (4, 4, 8),
    (5, 3, 8),
    (3, 5, 8),
    (3, 3, 8),
]


def logprobs(model: Model, text: mx.array, split=None) -> tuple[mx.array, int]:
    """Of a text (1, n) read in steps of 512, and the bytes of the caches behind it."""
    cache = model.make_cache()
    if split:
        bits, value_bits, text_bits = split
        cache = ksa_mlx.make_cache(model, text_bits=text_bits, value_bits=value_bits)
        cache = [c.to_quantized(GROUP, bits) for c in cache]
    parts = []
    for at in range(0, text.shape[1], 512):
        x = model(text[:, at : at + 512], cache=cache).astype(mx.float32)
        parts.append(x - mx.logsumexp(x, axis=-1, keepdims=True))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1), sum(c.nbytes for c in cache)


def measure(name: str, model: Model, text: mx.array):
    exact, plain = logprobs(model, text)
    columns = [("keys", 6), ("values", 7), ("text", 5), ("bytes", 8), ("mean KL", 10)]
    table = Table(f"{name}, {text.shape[1]} tokens", [*columns, ("max KL", 10), ("same", 8)])
    for bits in SPLITS:
        got, held = logprobs(model, text, bits)
        # What is never predicted is minus infinity in both.
        both = mx.where(mx.isinf(exact), 0.0, exact - got)
        kl = (mx.exp(exact) * both).sum(axis=-1)
        same = (exact.argmax(axis=-1) == got.argmax(axis=-1)).mean()
        numbers = f"{kl.mean().item():.2e}", f"{kl.max().item():.2e}", f"{same.item():.4f}"
        keys, values, own = bits
        table.add(keys, values, own or "", f"{held / plain:.3f}", *numbers)


def random_model() -> Model:
    """Layers as the embedded model's, with random weights and a head_dim of 64."""
    mx.random.seed(0)
    return Model(make_args(dims(256, 512, 4, 4, 2, 64, 1024), [4] * 4))


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    model, tokenizer = ksa_mlx.load(CHECKPOINT)
    model.set_dtype(mx.float32)
    measure("Embedded model", model, mx.array(tokenizer.encode(notes()))[None])
    measure("Random model", random_model(), mx.random.randint(0, 1024, (1, 2048)))


if __name__ == "__main__":
    main()
