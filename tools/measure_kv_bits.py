"""What quantising the KV cache costs in quality: KL divergence of the next-token distribution.

    python tools/measure_kv_bits.py

Text and summaries are rounded to each pair of bit widths (mlx's affine format, groups of 32) and
the logits of a long text are compared with those of the plain cache: on the embedded model, whose
recall goes through its summaries, and on a random model.
"""

import argparse

import mlx.core as mx

import ksa_mlx
from ksa_mlx.benchmark.models import dims, make_args
from ksa_mlx.benchmark.timing import Table
from ksa_mlx.cache.rolling import RollingSummaryCache
from ksa_mlx.chat.notebook import CHECKPOINT, notes
from ksa_mlx.model import Model

GROUP = 32


def rounded(x: mx.array, bits: int) -> mx.array:
    if bits == 16:
        return x
    return mx.dequantize(*mx.quantize(x, GROUP, bits), GROUP, bits).astype(x.dtype)


class Rounded(RollingSummaryCache):
    """Holds what a quantised cache would give back; text and summaries each in their bits."""

    def __init__(self, cache: RollingSummaryCache, text: int, summaries: int):
        super().__init__(cache.chunk, cache.summary_tokens, cache.window)
        self.bits_of_text, self.bits_of_summaries = text, summaries

    def append(self, keys, values):
        return super().append(*(rounded(x, self.bits_of_text) for x in (keys, values)))

    def extend(self, keys, values, first=None):
        return super().extend(*(rounded(x, self.bits_of_text) for x in (keys, values)), first)

    def store_summaries(self, keys, values):
        super().store_summaries(*(rounded(x, self.bits_of_summaries) for x in (keys, values)))


def logprobs(model: Model, text: mx.array, bits=None) -> mx.array:
    cache = model.make_cache()
    if bits:
        cache = [Rounded(c, *bits) for c in cache]
    parts = []
    for at in range(0, text.shape[1], 512):
        x = model(text[:, at : at + 512], cache=cache).astype(mx.float32)
        parts.append(x - mx.logsumexp(x, axis=-1, keepdims=True))
        mx.eval(parts[-1])
    return mx.concatenate(parts, axis=1)


def measure(name: str, model: Model, text: mx.array):
    exact = logprobs(model, text)
    columns = [("text bits", 9), ("summary bits", 14), ("mean KL", 12), ("max KL", 12)]
    table = Table(f"{name}, {text.shape[1]} tokens", [*columns, ("same top token", 16)])
    for bits in ((8, 8), (4, 4), (4, 8), (8, 4), (4, 16), (16, 4)):
        got = logprobs(model, text, bits)
        kl = (mx.exp(exact) * (exact - got)).sum(axis=-1)
        same = (exact.argmax(axis=-1) == got.argmax(axis=-1)).mean()
        numbers = f"{kl.mean().item():.2e}", f"{kl.max().item():.2e}", f"{same.item():.4f}"
        table.add(*bits, *numbers)


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
