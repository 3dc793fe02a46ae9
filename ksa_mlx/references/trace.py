"""References: which chunks of the prompt an answer's tokens attended to.

The answer is read once more, at most a chunk a step, through layers that also report the attention
of their text queries. In a windowed layer a query sees every chunk exactly once, as text or through
its summary tokens, so attention comes by chunk as it is. What the numbers mean, and what they do
not: `docs/references.md`.
"""

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import mlx.core as mx
import numpy as np

from ..cache.make import make_cache
from ..cache.rolling import RollingSummaryCache

# Keys whose scores are held at once: bounds the workspace at heads x k x BLOCK.
BLOCK = 4096

# Neighbouring chunks are one reference if they weigh at least this much of its heaviest chunk.
JOIN, LONGEST = 0.1, 4

# Chunks kept for each token of the answer, the heaviest ones.
KEPT = 64

# A first chunk that gets more of all attention than this is a sink and no reference.
SINK = 0.25

# Text, token ids, or messages.
Prompt = str | Sequence[int] | Sequence[dict[str, str]]


@dataclass(frozen=True)
class Reference:
    """A passage of the prompt, one to four neighbouring chunks.

    text: its words. start, stop: it is the prompt's tokens start .. stop - 1. weight: its share,
    0 to 1, among all chunks of the context. attention: the part of the attention that it got,
    the mean over tokens, layers and heads. through_summaries: how much of the weight is due to
    summary keys, 0 to 1; the rest is due to text keys.
    """

    text: str
    start: int
    stop: int
    weight: float
    attention: float
    through_summaries: float


def references(
    model,
    tokenizer,
    prompt: Prompt,
    answer: str | Sequence[int],
    *,
    question: str | int | None = None,
    by_layer: bool = False,
    top: int = 5,
    cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
) -> list[Reference] | list[list[Reference]]:
    """The passages of a prompt that an answer's tokens attended to most, heaviest first.

    Args:
        model: what `ksa_mlx.load` returns first.
        tokenizer: what it returns second.
        prompt: text, token ids, or messages for the chat template.
        answer: text or token ids. Ids are safer: text may fall into other tokens.
        question: the end of the prompt that asks, as text or as a number of tokens; it is no
            reference. Default: the last line of a text or of the last message (the last sentence
            of one line); nothing of ids.
        by_layer: a list for each layer, instead of one over all layers.
        top: passages (a layer) at most.
        cache: a cache that has read the first tokens of the prompt, but not its last one. It is
            copied, and what it has read is not read again.
        prefill_step_size: prompt tokens a step.

    The question and the answer are no references, nor is the first chunk in a model that uses it as
    a sink for attention that is meant for nothing (see `SINK`). Raises ValueError for an empty
    prompt or answer, a cache that has read too much, and a model that is split over machines.
    """
    ids, start = _read_prompt(tokenizer, prompt, question)
    if isinstance(answer, str):
        said = tokenizer.encode(answer, add_special_tokens=False)
    else:
        said = list(answer)
    trace = trace_answer(model, ids, said, start, copy.deepcopy(cache), prefill_step_size)
    if by_layer:
        return [trace.references(tokenizer, top, i) for i in range(len(trace.by_layer))]
    return trace.references(tokenizer, top)


def _read_prompt(tokenizer, prompt: Any, question) -> tuple[list[int], int]:
    """The prompt's tokens, and where its question begins."""
    if isinstance(prompt, str):

        def render(text):
            # As mlx_lm.stream_generate encodes a prompt.
            bos = tokenizer.bos_token
            special = bos is None or not text.startswith(bos)
            return tokenizer.encode(text, add_special_tokens=special)

        ids = render(prompt)
        start = question_start(render, prompt, ids) or len(ids)
    elif len(prompt) and isinstance(prompt[0], dict):
        *earlier, last = prompt

        def render(text):
            messages = [*earlier, {**last, "content": text}]
            return tokenizer.apply_chat_template(messages, add_generation_prompt=True)

        ids = list(render(last["content"]))
        start = question_start(render, last["content"], ids)
    else:
        ids = [int(t) for t in prompt]
        start = len(ids)
    if isinstance(question, str):
        question = len(tokenizer.encode(question, add_special_tokens=False))
    return ids, start if question is None else max(0, len(ids) - question)


def question_start(render: Callable[[str], list[int]], text: str, ids: list[int]) -> int:
    """The token where the question begins in ids = render(text): the last line of `text`, of one
    line the last sentence."""
    text = text.rstrip()
    line = text.rfind("\n") + 1
    sentence = max((m.end() for m in re.finditer(r"[.!?]\s+", text)), default=0)
    other = render(text[: line or sentence] + "\u241f")  # a symbol that no question begins with
    same = (a == b for a, b in zip(ids, other, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(len(ids), len(other)))


@dataclass
class Trace:
    """What the tokens of an answer attended to, for every chunk of the context.

    A weight is a sum of squared attention shares: over heads, tokens of the answer and (except in
    by_layer) layers. Squares, so that a head which picks a chunk counts for more than several
    which spread as much attention over the whole text.
    """

    tokens: list[int]  # prompt and answer
    prompt_length: int
    question: int  # where the context ends
    chunk: int
    by_layer: np.ndarray  # (layers, chunks) weights
    summaries: np.ndarray  # (layers, chunks) the part of these that is due to summary keys
    attention: np.ndarray  # (layers, chunks) mean attention shares
    token_chunks: np.ndarray  # (answer tokens, up to KEPT) the heaviest chunks of each token,
    token_weights: np.ndarray  # and their weights, over all layers

    @property
    def chunks(self) -> int:
        """Chunks of the context."""
        return self.by_layer.shape[1]

    def weights(self, layer: int | None = None) -> np.ndarray:
        """The chunks' shares of the weight, (chunks,), summing to 1; over all layers or in one."""
        w = self.by_layer.sum(0) if layer is None else self.by_layer[layer]
        return w / max(w.sum(), 1e-30)

    def references(self, tokenizer, top: int = 5, layer: int | None = None) -> list[Reference]:
        """The heaviest passages, at most `top`, heaviest first; over all layers or in one."""
        weights, found = self.weights(layer), []
        layers = slice(None) if layer is None else slice(layer, layer + 1)
        own, mass = self.summaries[layers].sum(0), self.attention[layers].mean(0)
        for a, b in passages(weights, top):
            heavy = self.by_layer[layers, a:b].sum()
            start, stop = a * self.chunk, min(b * self.chunk, self.question)
            found.append(
                Reference(
                    text=next(pieces(tokenizer, self.tokens, [start, stop])),
                    start=start,
                    stop=stop,
                    weight=float(weights[a:b].sum()),
                    attention=float(mass[a:b].sum()),
                    through_summaries=min(1.0, float(own[a:b].sum()) / float(heavy)),
                )
            )
        return sorted(found, key=lambda r: -r.weight)


def passages(weights: np.ndarray, top: int) -> list[tuple[int, int]]:
    """The `top` heaviest chunks, each with its heavy neighbours: ranges first .. last - 1."""
    left = weights.copy()
    found: list[tuple[int, int]] = []
    while len(found) < top and left.size and (peak := left.max()) > 0:
        a = int(left.argmax())
        b = a + 1
        while b - a < LONGEST:
            before = left[a - 1] if a else 0
            after = left[b] if b < left.size else 0
            if max(before, after) < JOIN * peak:
                break
            a, b = (a - 1, b) if before > after else (a, b + 1)
        found.append((a, b))
        left[a:b] = 0
    return found


def trace_answer(
    model,
    prompt: list[int],
    answer: list[int],
    question: int,
    cache: list[Any] | None = None,
    prefill_step_size: int = 2048,
) -> Trace:
    """Read an answer once more and record what its tokens attended to.

    Args: prompt and answer token ids; question: where in the prompt the context ends; cache:
    one that has read the first tokens of the prompt but not its last, which is read on.
    """
    if not prompt or not answer:
        raise ValueError(f"{'answer' if prompt else 'prompt'}: found zero tokens, expected some")
    args, text = model.args, model.model
    heads = text.layers[-1].self_attn.n_heads if text.layers[-1] is not None else 0
    if text.pipeline_size > 1 or heads != args.num_attention_heads:
        raise ValueError("model: found a part of one, expected one that is not split over machines")
    held: list[Any] = make_cache(model, rollback=0) if cache is None else cache
    tokens, k, last = prompt + answer, args.summary_chunk_size, len(prompt) - 1
    offset = held[0].offset
    if offset > last:
        raise ValueError(f"cache: found {offset} tokens read, expected at most {last}, all but one")
    while offset < last:
        stop = min(last, offset + prefill_step_size)
        text(mx.array([tokens[offset:stop]]), cache=held)
        mx.eval([c.state for c in held])
        offset = stop

    layers, chunks = len(text.layers), -(-question // k)
    by_layer, summaries, attention = (np.zeros((layers, chunks), np.float32) for _ in range(3))
    kept = min(KEPT, chunks)
    token_chunks = np.zeros((len(answer), kept), np.int32)
    token_weights = np.zeros((len(answer), kept), np.float32)
    step_weights = []

    def report(i: int, mass: mx.array):
        mass = mass[:, :, :chunks]
        square = np.array(mx.square(mass).sum(0))
        step_weights.append(square)
        by_layer[i] += square.sum(0)
        attention[i] += np.array(mass.mean(0).sum(0)) / len(answer)
        if (window := args.windows[i]) is not None:
            summarised = max(0, offset // k - window)
            summaries[i, :summarised] += square.sum(0)[:summarised]

    shadow = observed(text, report, question)
    # The token at position p + 1 is what the query at p decided.
    while offset < len(tokens) - 1:
        stop = min((offset // k + 1) * k, len(tokens) - 1)
        step_weights.clear()
        mx.eval(shadow(mx.array([tokens[offset:stop]]), cache=held))
        weights = np.sum(step_weights, axis=0)
        order = np.argsort(-weights, axis=1, kind="stable")[:, :kept]
        rows = slice(offset - last, stop - last)
        token_chunks[rows] = order
        token_weights[rows] = np.take_along_axis(weights, order, axis=1)
        offset = stop
    if chunks and attention[:, 0].mean() > SINK:
        by_layer[:, 0] = 0
        token_weights[token_chunks == 0] = 0
    return Trace(
        tokens=tokens,
        prompt_length=len(prompt),
        question=question,
        chunk=k,
        by_layer=by_layer,
        summaries=summaries,
        attention=attention,
        token_chunks=token_chunks,
        token_weights=token_weights,
    )


class _Observed:
    """A decoder layer that also reports the attention of its text queries; it changes nothing."""

    def __init__(self, layer, report: Callable[[mx.array], None], chunk: int, split: int):
        self.layer, self.report, self.chunk, self.split = layer, report, chunk, split

    def __call__(self, h, call, mask=None, cache=None):
        attn, L = self.layer.self_attn, call.length
        queries = attn.text_queries(self.layer.input_layernorm(h[:, :L]), call.offset)
        out = self.layer(h, call, mask, cache)
        self.report(chunk_mass(queries, cache, self.chunk, self.split))
        return out


def observed(text_model, report: Callable[[int, mx.array], None], split: int):
    """A `KSAModel` on the same weights whose layers report (layer, what `chunk_mass` returns).
    `text_model` itself stays as it is."""

    chunk = text_model.args.summary_chunk_size

    def observe(i, layer):
        return _Observed(layer, lambda mass: report(i, mass), chunk, split)

    shadow = copy.copy(text_model)
    shadow.layers = [observe(i, layer) for i, layer in enumerate(text_model.layers)]
    return shadow


def chunk_mass(queries: mx.array, cache, chunk: int, split: int = 0) -> mx.array:
    """How the last queries share their attention among the chunks of the text.

    Args:
        queries (1, heads, L, head_dim): the last L tokens that `cache` has read, after RoPE, all
            of them in one chunk.
        cache: a layer's RollingSummaryCache or mlx-lm KVCache, quantised or not.
        chunk: k, text tokens a chunk.
        split: a position from which on the text keys of its chunk do not count for the chunk.

    Returns (heads, L, chunks), float32: the softmax over all visible keys, summed within each
    chunk. Its text keys or its summary keys count for a chunk.
    """
    _, heads, L, dim = queries.shape
    sums, rest = [], []
    for keys, n, start in _visible_keys(cache, chunk):
        q = queries.astype(mx.float32).reshape(keys.shape[0], -1, dim) * dim**-0.5
        scores = q @ keys.astype(mx.float32).swapaxes(1, 2)
        scores = scores.reshape(heads, L, -1)
        stop = cache.offset if start is None else start + keys.shape[1]
        if start is not None and stop == cache.offset:
            # The last L keys are the queries' own tokens; the open chunk is filled up.
            T = scores.shape[2]
            sees = mx.arange(T) <= mx.arange(T - L, T)[:, None]
            scores = mx.where(sees, scores, -mx.inf)
            scores = mx.pad(scores, [(0, 0), (0, 0), (0, -T % n)], constant_values=-mx.inf)
        if split % chunk and start is not None and start <= split < stop:
            first, end = split - start, -(-split // chunk) * chunk - start
            rest.append(mx.logsumexp(scores[..., first:end], axis=-1, keepdims=True))
            column = mx.arange(scores.shape[2])
            scores = mx.where((column < first) | (column >= end), scores, -mx.inf)
        sums.append(mx.logsumexp(scores.reshape(heads, L, -1, n), axis=-1))
        mx.eval(sums[-1])  # else MLX holds the scores of several blocks at once
    mass = mx.softmax(mx.concatenate(sums + rest, axis=-1), axis=-1)
    return mass[..., : mass.shape[-1] - len(rest)]


def _visible_keys(cache, k: int) -> Iterator[tuple[mx.array, int, int | None]]:
    """Blocks of the keys that the last token sees, oldest first: (keys (KV heads, ..., head_dim),
    keys a chunk, position of the first; None for summaries)."""
    if isinstance(cache, RollingSummaryCache):
        place = cache.place
        oldest = max(0, place.open - place.window)
        if oldest:
            keys, n = cache.summaries(oldest)[0][:, :, ::-1], place.summary_tokens
            size = max(1, BLOCK // n) * n
            for a in range(0, keys.shape[2], size):
                yield keys[0, :, a : a + size], n, None
        keys, first = cache.text(oldest)[0], oldest * k
    else:
        keys, first = cache.keys, 0
    size = max(1, BLOCK // k) * k
    for a in range(first, cache.offset, size):
        part = slice(a - first, min(a + size, cache.offset) - first)
        if isinstance(keys, mx.array):
            block = keys[:, :, part]
        else:
            block = mx.dequantize(
                *(x[:, :, part] for x in keys), group_size=cache.group_size, bits=cache.bits
            )
        yield block[0], k, a


def pieces(tokenizer, tokens: list[int], cuts: Sequence[int]) -> Iterator[str]:
    """The text between neighbouring cuts, positions in `tokens`. A character whose bytes are in
    several tokens belongs to the last of them."""

    def decode(a, b):
        """The text of tokens a .. b - 1 without the up to 3 bytes of a character that goes on."""
        for end in range(b, max(a, b - 4), -1):
            text = tokenizer.decode(tokens[a:end], skip_special_tokens=False)
            if not text.endswith("\ufffd"):
                return text
        return text if b - a > 3 else ""

    for start, stop in pairwise(cuts):
        # What a token looks like depends on the one before: tokenizers drop a text's first space.
        begin = max(0, start - 8)
        while begin and start - begin < 12 and decode(begin, start)[:1] in ("", "\ufffd"):
            begin -= 1  # not in the middle of a character
        yield decode(begin, stop)[len(decode(begin, start)) if start else 0 :]
