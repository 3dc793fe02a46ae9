"""Every id that reaches a model is one that it knows."""

import mlx.core as mx
import mlx_lm
import pytest
from mlx_lm.generate import BatchGenerator, generate_step, speculative_generate_step

import ksa_mlx
from ksa_mlx.chat.notebook import CHECKPOINT
from ksa_mlx.errors import SessionError

from ._models import build


@pytest.mark.parametrize("wrong", [64, 10**6, -1])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_by_every_entry(wrong, place):
    """One sequence, with a draft, and in a batch, wherever the id stands."""
    model, prompt = build(), [1, 2, 3, 4, 5]
    model.rollback = 64
    prompt[place] = wrong
    says = rf"prompt: found token id {wrong}, expected 0 to 63"
    with pytest.raises(SessionError, match=says):
        list(generate_step(mx.array(prompt), model, max_tokens=1))
    with pytest.raises(SessionError, match=says):
        list(speculative_generate_step(mx.array(prompt), model, build(), max_tokens=1))
    with pytest.raises(SessionError, match=says):
        list(generate_step(prompt=mx.array(prompt), model=model, max_tokens=1))
    batch = BatchGenerator(model, max_tokens=1)
    with pytest.raises(SessionError, match=says):
        batch.insert([[1, 2], prompt])
    batch.close()


def test_what_a_draft_does_not_know():
    model, draft = build(), build(vocab_size=33, summary_token_begin=32)
    model.rollback = draft.rollback = 64
    with pytest.raises(SessionError, match="found token id 40, expected 0 to 31"):
        list(speculative_generate_step(mx.array([1, 40]), model, draft, max_tokens=1))


def test_known_ids_are_read():
    model, tokenizer = ksa_mlx.load(str(CHECKPOINT))
    last = model.args.summary_token_begin - 1
    assert isinstance(mlx_lm.generate(model, tokenizer, [1, last], max_tokens=2), str)
    with pytest.raises(SessionError, match=f"found token id {last + 1}"):
        mlx_lm.generate(model, tokenizer, [1, last + 1], max_tokens=2)
