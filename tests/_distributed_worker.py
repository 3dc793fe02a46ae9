"""What tests/test_distributed.py starts twice by mlx.launch; prints PASSED and its rank.

Usage: _distributed_worker.py [folder of a converted model]...
"""

import copy
import sys

import mlx.core as mx
from mlx_lm import batch_generate, stream_generate
from mlx_lm.utils import load, sharded_load

from ksa_mlx.cache.storage import segments_of
from tests._models import VARIANTS, build, tokens, worst

# Call lengths: prefill steps that end inside chunks, then token by token.
CALLS = [1, 17, 2, 11] + [1] * 4

NAMES = (
    "full layer inside",
    "two summaries",
    "shared, biases",
    "qwen2",
    "bypass",
    "own qk norms",
)

world = mx.distributed.init(strict=True)


def logits(model):
    """Logits of a batch of two texts, call by call on one cache, and without a cache."""
    text, cache, outs, a = tokens(sum(CALLS), 2), model.make_cache(), [], 0
    for n in CALLS:
        outs.append(model(text[:, a : a + n], cache=cache))
        # As mlx-lm's prefill: only the caches are evaluated at once.
        mx.eval([c.state for c in cache] if n > 1 else outs[-1])
        a += n
    return mx.concatenate(outs, axis=1), model(text), cache


def batched(model):
    """Logits of two texts of different length in one batched cache."""
    caches = [model.make_cache() for _ in range(2)]
    for cache, n in zip(caches, (9, 30), strict=True):
        model(tokens(n), cache=cache)
        mx.eval([c.state for c in cache])
    both = [type(c).merge([c, d]) for c, d in zip(*caches, strict=True)]
    outs = []
    for seed in range(6):
        outs.append(model(tokens(1, 2, seed=seed), cache=both))
        mx.eval(outs[-1])  # as mlx-lm: messages of later steps must not overtake
    return mx.concatenate(outs, axis=1)


def check(name, exact, model):
    """Compare a split model with what the whole one computed."""
    outs, cacheless, cache = logits(model)
    assert worst(outs, exact[0]) < 1e-3, (name, worst(outs, exact[0]))
    assert worst(cacheless, exact[1]) < 1e-3, name
    return cache


def visible(cache) -> float:
    """Bytes of what the last token sees."""
    return sum(one.nbytes for one in segments_of(cache))


def variants():
    for name in NAMES:
        for mode in ("tensor", "pipeline"):
            model = build(**VARIANTS[name])
            exact = logits(model)
            kv_heads = model.args.num_key_value_heads
            if mode == "pipeline":
                model.model.pipeline(world)
                cache = check(f"{name}, {mode}", exact, model)
                own = exact[2][model.model.start_idx : model.model.end_idx]
                assert len(cache) == len(model.layers) == len(own) < len(exact[2])
                assert [type(c) for c in cache] == [type(c) for c in own]
                assert [c.nbytes for c in cache] == [c.nbytes for c in own], name
            elif kv_heads % 2:
                refused(
                    lambda model=model: model.shard(world), f"num_key_value_heads: found {kv_heads}"
                )
            else:
                model.shard(world)
                cache = check(f"{name}, {mode}", exact, model)
                for c, e in zip(cache, exact[2], strict=True):
                    assert 2 * visible(c) == visible(e), name


def refused(action, message):
    try:
        action()
    except ValueError as e:
        assert message in str(e), e
    else:
        raise AssertionError(f"not refused: {message}")


def refusals():
    refused(lambda: build(intermediate_size=49).shard(world), "intermediate_size: found 49")
    refused(
        lambda: build(num_hidden_layers=1).model.pipeline(world), "found a split of [1, 0] layers"
    )
    # Summary rows would cross a rank that has no cache to plan them from.
    full_first = build(num_hidden_layers=4, summary_sliding_chunk_num="[2000]*2+[1]*2").model
    refused(lambda: full_first.pipeline(world), "found no windowed layer among layers 0 to 1")
    # A rank behind the last windowed layer needs none.
    model = build(num_hidden_layers=4, summary_sliding_chunk_num="[1]*2+[2000]*2")
    exact, together = logits(model), batched(model)
    model.model.pipeline(world)
    check("full layers last", exact, model)
    assert worst(batched(model), together) < 1e-3


def folders(paths):
    """mlx-lm's own loading and generation, one text and several at once."""
    prompt = (
        "<|system|> The badge of Olga is 6967. Linh's school: Dublin. "
        + "The paper came late. " * 8
    )
    prompt += "<|end|><|user|> What is the badge of Olga?<|assistant|>"
    for path in paths:
        whole, tokenizer = load(path)
        prompts = [tokenizer.encode(prompt), tokenizer.encode("The seat of Felix is")]

        def texts(model, tokenizer=tokenizer, prompts=prompts):
            one = "".join(
                r.text for r in stream_generate(model, tokenizer, prompts[0], max_tokens=8)
            )
            return [
                one,
                *batch_generate(model, tokenizer, copy.deepcopy(prompts), max_tokens=8).texts,
            ]

        expected = texts(whole)
        for groups in ((None, world), (world, None)):
            split, _ = sharded_load(path, *groups)
            assert texts(split) == expected, (path, expected, texts(split))


assert world.size() == 2
variants()
refusals()
folders(sys.argv[1:])
mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # leave together
print("PASSED", world.rank(), flush=True)
