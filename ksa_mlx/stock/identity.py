"""What a prompt cache depends on beside its tokens: two models never have the same identity."""

import hashlib
import weakref
from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache

from ..cache.rolling import STATE


def identity(models: list[Any], tokenizer: Any, flags: dict[str, Any]) -> str:
    """A digest of all that keys and values follow from.

    Args:
        models: the model, and a draft model if it has one.
        tokenizer: the model's.
        flags: further settings, such as the bits of the caches.

    It is taken of what is in memory, so that adapters, quantisation and a machine's share of the
    weights count as they are. Weights are read once: the sums of each array's rows and columns.
    """
    digest = hashlib.sha256(f"{STATE} {mlx_lm.__version__} {sorted(flags.items())}".encode())
    digest.update(repr(sorted(tokenizer.get_vocab().items())).encode())
    for model in models:
        args: Any = getattr(model, "args", None)
        digest.update(repr(vars(args) if is_dataclass(args) else args).encode())
        for cache in make_prompt_cache(model):
            digest.update(f"{type(cache).__name__} {getattr(cache, 'place', None)}".encode())
        weights: Any = tree_flatten(model.parameters())
        for name, w in sorted(weights):
            digest.update(f"{name} {w.shape} {w.dtype}".encode())
            for sums in _sums(w):
                digest.update(np.array(sums).tobytes())
    return digest.hexdigest()


def _sums(w: mx.array) -> Iterator[mx.array]:
    """Of the bits of an array, as numbers that wrap around: which moves or changes any weight but
    by the most unlikely of chances changes them too."""
    bits = mx.atleast_2d(w).view(mx.uint16 if w.dtype.size == 2 else mx.uint8)
    for axis in (-1, 0):
        yield bits.reshape(-1, bits.shape[-1]).sum(axis).astype(mx.uint32)


class Identities:
    """The identity of the model that a `ModelProvider` holds, taken once a model."""

    def __init__(self, provider: Any):
        self.provider = provider
        self._known: tuple[Any, str] = (lambda: None, "")

    def __call__(self, key: Any) -> str:
        """Of the model that mlx-lm knows by this key, `ModelProvider.model_key`."""
        provider = self.provider
        model, draft = provider.model, provider.draft_model
        if self._known[0]() is not model:
            flags = vars(provider.cli_args).items()
            of_caches = {k: v for k, v in flags if k.startswith(("kv_", "quantized_kv_"))}
            models = [model] if draft is None else [model, draft]
            self._known = weakref.ref(model), identity(models, provider.tokenizer, of_caches)
        return self._known[1]
