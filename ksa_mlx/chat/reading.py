"""Reading a prompt in steps that can be stopped: short in time, whatever the machine."""

import time
from collections.abc import Generator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, wired_limit

from ..stock.pacing import Pace

# Seconds that a step is meant to take. It may take twice as long before the next one is shorter.
SECONDS = 1.0


def read(
    readers: Sequence[tuple[Any, list[Any]]],
    tokens: list[int],
    longest: int,
    quantize: dict[str, int] | None = None,
) -> Generator[int, None, None]:
    """Read tokens into caches, a step at a time; yields how many are read, 0 at first.

    Args:
        readers: models, and the caches that they read into. A cache is replaced in its list when
            it is quantised.
        tokens: text ids.
        longest: tokens a step at most.
        quantize: arguments of mlx-lm's `maybe_quantize_kv_cache`, for the first reader's caches.
            No step goes across the token from which on they are quantised, so that nothing depends
            on the steps.
    """
    done, pace = 0, Pace()
    if quantize:
        maybe_quantize_kv_cache(readers[0][1], **quantize)
    yield done
    with wired_limit(readers[0][0]):
        while done < len(tokens):
            size = pace.step(SECONDS, 1, longest)
            to_go = quantize["quantized_kv_start"] - readers[0][1][0].offset if quantize else 0
            part = mx.array([tokens[done : done + (min(size, to_go) if to_go > 0 else size)]])
            begin = time.perf_counter()
            with mx.stream(generation_stream):
                for model, cache in readers:
                    model(part, cache=cache)
                if quantize:
                    maybe_quantize_kv_cache(readers[0][1], **quantize)
                mx.eval([c.state for _, cache in readers for c in cache])
            mx.clear_cache()
            done += part.shape[1]
            pace.took(part.shape[1], time.perf_counter() - begin)
            yield done
