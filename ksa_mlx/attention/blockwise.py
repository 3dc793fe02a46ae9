"""Attention to train on: block by block, and the backward computes each block again.

MLX's own backward holds the scores of all queries at once. Here both passes hold one block's, and
what grows with the text is queries, keys, values and their gradients only.
"""

from collections.abc import Callable, Iterable, Iterator

import mlx.core as mx

from .decode import attend
from .plan import BLOCK, Step

# Scores of a head that a block has at most, but for blocks of FEWEST rows.
SCORES, FEWEST = 1 << 21, 32

# Query rows start .. stop - 1, the ranges of keys that they see some of, mask.
Seen = tuple[int, int, list[tuple[int, int]], mx.array | str]


def blockwise(
    queries: mx.array, keys: mx.array, values: mx.array, blocks: Callable[[], Iterable[Seen]]
) -> mx.array:
    """Attention of queries (B, heads, L, head_dim) over keys and values (B, KV heads, N,
    head_dim), differentiable once.

    blocks: gives the blocks in order, anew for each pass, so that nobody holds all masks. Returns
    (B, heads, L, head_dim). Gradients of keys and values are summed in float32.
    """

    @mx.custom_function
    def attention(queries: mx.array, keys: mx.array, values: mx.array) -> mx.array:
        outputs: list[mx.array] = []
        for a, b, ranges, mask in blocks():
            seen = _part(keys, ranges), _part(values, ranges)
            outputs.append(attend(queries[:, :, a:b], *seen, mask, outputs[-1:]))
        return mx.concatenate(outputs, axis=2) if len(outputs) > 1 else outputs[0]

    @attention.vjp
    def backward(primals, cotangent, _output):
        queries, *pair = primals
        sums = [mx.zeros(x.shape, mx.float32) for x in pair]
        of_queries: list[mx.array] = []
        for a, b, ranges, mask in blocks():
            rows, given = queries[:, :, a:b], cotangent[:, :, a:b]
            if of_queries:  # after the block before, as in `attend`
                rows, given = mx.depends([rows, given], [of_queries[-1], *sums])
            block = [rows, *(_part(x, ranges) for x in pair)]
            _, (one, *two) = mx.vjp(lambda q, k, v, m=mask: attend(q, k, v, m), block, [given])
            of_queries.append(one)
            sums = [_add(total, ranges, x) for total, x in zip(sums, two, strict=True)]
        like = [total.astype(x.dtype) for total, x in zip(sums, pair, strict=True)]
        return mx.concatenate(of_queries, axis=2), *like

    return attention(queries, keys, values)


def _part(x: mx.array, ranges: list[tuple[int, int]]) -> mx.array:
    parts = [x[:, :, a:b] for a, b in ranges]
    return mx.concatenate(parts, axis=2) if len(parts) > 1 else parts[0]


def _add(total: mx.array, ranges: list[tuple[int, int]], x: mx.array) -> mx.array:
    """The sum with rows x added at these ranges, of which it holds those of all in order."""
    done = 0
    for a, b in ranges:
        total[:, :, a:b] = total[:, :, a:b] + x[:, :, done : done + b - a]
        done += b - a
    return total


def causal(start: int, stop: int, first: int = 0) -> Iterator[Seen]:
    """Rows start .. stop - 1 of plain causal attention, in blocks; row i is key first + i."""
    a = start
    while a < stop:
        b = min(stop, a + min(BLOCK, max(FEWEST, SCORES // (first + stop))))
        yield a, b, [(first, first + b)], "causal"
        a = b


def windowed(step: Step, window: int, summaries: int) -> Iterator[Seen]:
    """All rows of a text without a cache, over [summaries, newest first | text]; summaries: how
    many keys these are."""
    for a, b, text, count, mask in step.in_blocks(window):
        if not count:
            yield from causal(a, b, summaries)
            continue
        own = summaries - count * step.args.summary_token_num
        yield a, b, [(own, summaries), (summaries + text, summaries + b)], mask
