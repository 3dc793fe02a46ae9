"""Drafts from the text itself: what followed the last tokens when they came before.

mlx-lm drafts with a second model only (mlx-lm#851). Here its place is taken by a `PromptLookup`:
answers that copy from the prompt, quotes or edited code, come several tokens a step. The text is
the one without: greedy the same ids, sampled the same distribution, since the model draws each
token itself and a draft is kept where it says the same.
"""

import functools
import importlib
from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache
from mlx_lm.sample_utils import make_sampler

generate: Any = importlib.import_module("mlx_lm.generate")  # mlx_lm has a function of that name

# How many last tokens must have come before, the longest first.
SIZES = (4, 3, 2)


class Matches:
    """A text, and where its last tokens came before."""

    def __init__(self, text: Sequence[int]):
        self.text: list[int] = []
        self._behind: dict[tuple[int, ...], int] = {}
        self.extend(text)

    def extend(self, tokens: Sequence[int]):
        text = self.text
        for token in tokens:
            for n in SIZES:
                if len(text) >= n:
                    self._behind[tuple(text[-n:])] = len(text)
            text.append(token)

    def drafts(self, most: int) -> list[int]:
        """Up to `most` tokens that followed the last ones, where they came last; [] if never."""
        text = self.text
        for n in SIZES:
            at = self._behind.get(tuple(text[-n:])) if len(text) >= n else None
            if at is not None:
                found: list[int] = []
                for i in range(at, at + most):  # on into what is drafted: it may go round
                    found.append(text[i] if i < len(text) else found[i - len(text)])
                return found
        return []


class PromptLookup:
    """Stands where mlx-lm has a draft model; without layers, caches and weights.

    text: what the model has read and is to read next; its end is the prompt that mlx-lm is given.
    progress: called with (tokens read, tokens to read).
    """

    layers = ()

    def __init__(self) -> None:
        self.text: list[int] = []
        self.progress: Callable[[int, int], Any] = lambda done, total: None

    def make_cache(self) -> list[Any]:
        return []

    def __call__(self, tokens: mx.array, cache: Any = None) -> None:
        """It has nothing to read."""


Steps = Generator[tuple[int, mx.array, bool], None, None]


def lookup_step(
    prompt: mx.array,
    model: Any,
    lookup: PromptLookup,
    stream: Any,
    *,
    num_draft_tokens: int = 8,
    max_tokens: int = 256,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = 512,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 5000,
) -> Steps:
    """What `speculative_generate_step` is with a draft model: tokens, log-probabilities, and
    whether a draft said the same.

    Args: prompt (n,), new ids; all others as there. Ends with a cache that has read no more than
    what was yielded. Raises ValueError for a cache that nothing can be taken back from.
    """
    cache = make_prompt_cache(model) if prompt_cache is None else prompt_cache
    if not can_trim_prompt_cache(cache):
        raise ValueError("prompt lookup: found a cache that is not trimmable, expected a rollback")
    sampler = sampler or make_sampler(0)
    rest = prompt.tolist()
    own = lookup.text if lookup.text[-len(rest) :] == rest else rest
    matches, seen, total = Matches(own), len(own) - len(rest), len(rest)

    def room(most: int) -> int:
        """Of so many tokens those that may be read at once: none with the first quantised one."""
        to_go = quantized_kv_start - cache[0].offset if kv_bits else 0
        return min(most, to_go) if to_go > 0 else most

    def read(tokens: list[int]) -> mx.array:
        return model(mx.array([tokens]), cache=cache)[0]

    def quantize():
        generate.maybe_quantize_kv_cache(cache, quantized_kv_start, kv_group_size, kv_bits)

    def choose(logits: mx.array, drafts: list[int]) -> tuple[mx.array, mx.array]:
        """Of logits (rows, ids) that stand behind the text and each draft: a token a row."""
        rows = [logits]
        if logits_processors:
            rows = [logits[i : i + 1] for i in range(len(drafts) + 1)]
            for i, row in enumerate(rows):
                tokens = mx.array(matches.text[seen:] + drafts[:i], mx.uint32)
                for process in logits_processors:
                    row = process(tokens, row)
                rows[i] = row
        x = mx.concatenate(rows)
        logprobs = x - mx.logsumexp(x, axis=-1, keepdims=True)
        return sampler(logprobs), logprobs

    with mx.stream(stream):
        quantize()
        lookup.progress(0, total)
        while len(rest) > 1:
            n = room(min(prefill_step_size, len(rest) - 1))
            read(rest[:n])
            quantize()
            mx.eval([c.state for c in cache])
            mx.clear_cache()
            rest = rest[n:]
            lookup.progress(total - len(rest), total)
        count = 0
        while count != max_tokens:
            most = min(num_draft_tokens, max_tokens - count - 1 if max_tokens > 0 else 1 << 30)
            drafts = matches.drafts(room(most + 1) - 1)
            tokens, logprobs = choose(read([matches.text[-1], *drafts]), drafts)
            said = tokens.tolist()
            same = next((i for i, d in enumerate(drafts) if said[i] != d), len(drafts))
            matches.extend(said[: same + 1])
            given = 0
            if count == 0:
                lookup.progress(total, total)
            try:
                for i in range(same + 1):
                    given, count = given + 1, count + 1
                    yield said[i], logprobs[i], i < same
            finally:
                trim_prompt_cache(cache, len(drafts) - min(given, same))
            quantize()
            if count % 256 < same + 1:
                mx.clear_cache()


def install():
    """Make mlx-lm's generation take a `PromptLookup` for a draft model."""
    step = generate.speculative_generate_step

    @functools.wraps(step)
    def either(prompt, model, draft_model, stream=generate.generation_stream, **kwargs):
        if isinstance(draft_model, PromptLookup):
            return lookup_step(prompt, model, draft_model, stream, **kwargs)
        return step(prompt, model, draft_model, stream, **kwargs)

    generate.speculative_generate_step = either
