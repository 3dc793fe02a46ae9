"""The notebook assistant: its data, its PyTorch reference, its weights.

`python -m training.measure_recall` prints the full figures; here they are checked at a small size.
"""

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import ksa_mlx
from training import documents as docs
from training import evaluate, values
from training.data import Style, Writer
from training.documents import Composer
from training.tokenizer import load_tokenizer, train_tokenizer

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "ksa_mlx" / "notebook"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(SHIPPED / "tokenizer.model")


@pytest.fixture(scope="module")
def shipped():
    return ksa_mlx.load(str(SHIPPED))[0]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="the training reference needs PyTorch")


def documents(tokenizer, n=20, length=300, seed=3, **style):
    composer = Composer(tokenizer, random.Random(seed), Style(**style))
    return [composer.document(length, 150) for _ in range(n)]


# Data


def test_documents_repeat_by_seed(tokenizer):
    assert documents(tokenizer, 3) == documents(tokenizer, 3)
    assert documents(tokenizer, 3) != documents(tokenizer, 3, seed=4)


def test_sources_name_the_same_token(tokenizer):
    for d in documents(tokenizer):
        assert len(d.ids) == len(d.role) == len(d.source) == 301
        asked = [t for t, s in enumerate(d.source) if s >= 0]
        assert asked, "a document without a question teaches nothing"
        for t in asked:
            assert d.source[t] < t and d.ids[d.source[t]] == d.ids[t]
            assert d.role[t] in (docs.MARKER, docs.FIRST, docs.REST)


def test_pieces_join_as_the_whole_text(tokenizer):
    """Documents are encoded piece by piece; a chat encodes the whole text."""
    for d in documents(tokenizer):
        assert tokenizer.encode(tokenizer.decode(d.ids)) == d.ids


def test_training_never_shows_what_is_held_out():
    writer = Writer(random.Random(1), Style())
    names = {writer.name() for _ in range(3000)}
    assert not names & set(values.NAMES[True])
    shown = {writer.value(k) for k in ("number", "label", "time") for _ in range(1000)}
    assert not {v for v in shown if len(v) > 2 and values.is_held_out(v, 10)}
    words = {writer.draw.word() for _ in range(3000)}
    assert not words & {w for w in values.WORDS[True] if len(w) > 2}
    assert not values.ORDINARY & {w.lower() for w in [*words, *values.WORDS[False]]}
    held = Writer(random.Random(1), Style(held_out=True))
    for _ in range(200):
        assert held.name().split()[0] in values.NAMES[True]
        assert len(n := held.draw.number()) == 2 or values.is_held_out(n, 10)


def test_free_values_are_of_any_kind():
    writer = Writer(random.Random(2), Style())
    free = [writer.draw.free() for _ in range(3000)]
    assert {len(v) for v in free} == set(range(1, 11))
    for kind in (str.isdigit, str.isalpha, str.islower, str.isupper, lambda v: "-" in v):
        assert sum(map(kind, free)) > 20


def test_words_of_pieces_show_every_piece_of_a_word(tokenizer):
    """Without them many are in no value of thousands, and such words are not copied."""
    pieces = docs.pieces_of(tokenizer)
    assert len(pieces.letters) == 26 and min(map(len, pieces.heads)) == 2
    words = {}
    for share in (0.0, 1.0):
        draw = values.Draw(random.Random(4), held_out=False, pieced=share, pieces=pieces)
        words[share] = [draw.word() for _ in range(4000)]
    assert max(map(len, words[1.0])) == values.LONGEST
    missing = {
        share: sum(p not in shown for p in pieces.tails) / len(pieces.tails)
        for share, some in words.items()
        for shown in [{tokenizer.id_to_piece(i) for w in some for i in tokenizer.encode(f" {w}")}]
    }
    assert missing[1.0] < 0.02 < 0.2 < missing[0.0]


def test_what_is_not_there_is_no_question_for_what_is():
    writer = Writer(random.Random(3), Style())
    for _ in range(50):
        known = writer.facts(12)
        fact = writer.absent(known)
        assert not any(f.key == fact.key for f in known)
        assert fact.attribute or all(f.key[0] != fact.key[0] for f in known)


def test_answers_are_the_newest_values(tokenizer):
    """Whatever was told twice, the answer is what stands last in the notes."""
    told_twice = 0
    for d in documents(tokenizer, 30, updates=0.5):
        for t, s in enumerate(d.source):
            if s >= 0 and d.role[t] in (docs.MARKER, docs.FIRST):
                told_twice += tokenizer.decode(d.ids[s - 3 : s]).endswith(("now", "changed to"))
                assert s < t
    assert told_twice > 10


def test_a_name_in_lower_case_differs_in_one_token(tmp_path):
    file = tmp_path / "tokenizer.model"
    tokenizer = train_tokenizer(file, 1280)
    assert tokenizer.vocab_size() == 1280
    # The same bytes each time: no name of a folder is left in it.
    assert b"corpus.txt" not in file.read_bytes()
    alike = 0
    for name in values.NAMES[True]:
        upper, lower = (tokenizer.encode(f" {n}") for n in (name, name.lower()))
        alike += upper[1:] == lower[1:] and upper[0] != lower[0]
    # Others begin with a common word: "Will", "Theo".
    assert alike >= 0.95 * len(values.NAMES[True])


def test_intervals_are_wilsons():
    low, high = evaluate.Score(right=90, total=100).interval
    assert abs(low - 0.839) < 2e-3 and abs(high - 0.939) < 2e-3


# The PyTorch reference


def tiny(torch, **sizes):
    from training.model import NotebookConfig, NotebookModel  # noqa: PLC0415  (needs PyTorch)

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_layers": 3,
        "head_dim": 16,
        "window": 2,
    } | sizes
    return NotebookModel(NotebookConfig(**sizes)).eval()


def dense(torch, model, ids):
    """The model by its definition: text and summaries in one sequence under one mask."""
    from training.model import rope_table, rotate  # noqa: PLC0415  (needs PyTorch)

    c, length = model.config, ids.shape[1]
    chunks = length // c.chunk
    position = torch.cat([torch.arange(length), torch.arange(c.chunk - 1, length, c.chunk)])
    summary = torch.arange(length + chunks) >= length
    chunk = position // c.chunk
    same = chunk[:, None] == chunk[None]
    text_sees = torch.where(
        summary[None],
        chunk[None] < chunk[:, None] - c.window,
        (position[None] <= position[:, None]) & (chunk[:, None] - chunk[None] <= c.window),
    )
    summary_sees = same & (~summary[None] | torch.eye(length + chunks, dtype=torch.bool))
    mask = torch.where(summary[:, None], summary_sees, text_sees)
    table = rope_table(position[None], c)
    embedding = model.model.embed_tokens.weight
    rows = embedding[-1].expand(ids.shape[0], chunks, -1)
    x = torch.cat([model.model.embed_tokens(ids), rows], 1)
    for layer in model.model.layers:
        a, h = layer.self_attn, layer.input_layernorm(x)

        def heads(name, a=a, h=h):
            base, own = (getattr(a, f"{name}_proj{s}")(h) for s in ("", "_summary"))
            y = torch.where(summary[:, None], own, base).unflatten(-1, (-1, c.head_dim))
            if name == "v":
                return y.transpose(1, 2)
            return rotate(getattr(a, f"{name}_norm")(y), table).transpose(1, 2)

        q, k, v = heads("q"), heads("k"), heads("v")
        groups = c.num_heads // c.num_kv_heads
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + a.o_proj(out.transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x[:, :length]) @ embedding[:-1].T


def test_gradients_of_the_short_forms_are_right(torch):
    from training.model import Normed, NotebookConfig, rope_table, rotate  # noqa: PLC0415

    torch.manual_seed(0)
    options = {"dtype": torch.float64, "requires_grad": True}
    x, w = torch.randn(3, 5, 2, 8, **options), torch.randn(8, **options)
    assert torch.autograd.gradcheck(lambda *a: Normed.apply(*a, 1e-6), (x, w))
    table = rope_table(torch.arange(5)[None], NotebookConfig(head_dim=8))
    table = tuple(t.double() for t in table)
    assert torch.autograd.gradcheck(lambda x: rotate(x, table), (x,))


@pytest.mark.parametrize("window", [1, 2, 3])
def test_blocks_equal_the_definition(torch, window):
    model = tiny(torch, window=window)
    ids = torch.randint(0, 40, (2, 6 * 8 * window))
    with torch.no_grad():
        got, expected = model(ids), dense(torch, model, ids)
        hidden = model(ids, hide_summaries=True)
    assert (got - expected).abs().max() < 1e-4
    assert (hidden - expected).abs().max() > 1e-3, "the summaries change nothing"


def test_attention_of_selected_tokens_is_their_share(torch):
    model = tiny(torch)
    ids = torch.randint(0, 40, (1, 96))
    with torch.no_grad():
        _, log_share, held = model(
            ids, select=(torch.tensor([0, 0]), torch.tensor([5, 90])), select_layer=1
        )
    share = log_share.exp()
    assert held.shape == (1, 12, 2 * 16)
    assert share.shape == (2, 4, 12)
    assert share[0].max() == 0, "the window is not full: no summary is visible"
    visible = 90 // 8 - 2
    assert (share[1, :, :visible] > 0).all() and share[1, :, visible:].max() == 0
    assert (share[1].sum(-1) < 1).all(), "the text of the window has the rest"


@pytest.mark.slow
def test_training_learns_and_resumes(torch, tokenizer, tmp_path):
    from training.model import NotebookConfig  # noqa: PLC0415  (needs PyTorch)
    from training.train import Level, train  # noqa: PLC0415  (needs PyTorch)

    said = []
    options = {
        "lr": 4e-3, "seed": 0,
        "config": NotebookConfig(
            vocab_size=tokenizer.vocab_size(), hidden_size=32, num_layers=3, head_dim=16
        ),
        "levels": [Level(64, 4, Style(filler=0), 2.0)], "say": said.append, "report_every": 10,
    }  # fmt: skip
    train(tokenizer, tmp_path, steps=20, **options)
    go_on = train(tokenizer, tmp_path, steps=21, resume=True, **options)
    answers = [float(s.split("answers ")[1].split()[0]) for s in said if s.startswith("step")]
    assert len(answers) == 2 and answers[1] < answers[0]
    assert torch.load(tmp_path / "state.pt", weights_only=True)["progress"][0] == 21
    assert all(torch.isfinite(p).all() for p in go_on.parameters())


def logits_of_both(torch, folder, ids):
    from training.export import read  # noqa: PLC0415  (needs PyTorch)

    model = ksa_mlx.load(str(folder))[0]
    model.set_dtype(mx.float32)
    block = read(folder).config.block
    padded = ids + [0] * (-len(ids) % block)
    with torch.no_grad():
        reference = read(folder)(torch.tensor([padded]))[0, : len(ids)].numpy()
    return reference, np.array(model(mx.array([ids]))[0]), model


def test_export_loads_in_mlx(torch, tokenizer, tmp_path):
    from training.export import export  # noqa: PLC0415  (needs PyTorch)

    model = tiny(torch, vocab_size=tokenizer.vocab_size())
    export(model, SHIPPED / "tokenizer.model", tmp_path)
    ids = documents(tokenizer, 1)[0].ids
    reference, got, _ = logits_of_both(torch, tmp_path, ids)
    assert np.abs(reference - got).max() <= 1e-3


# The shipped weights


@pytest.mark.slow
def test_shipped_weights_agree_with_the_reference_at_4096_tokens(torch, tokenizer):
    ids = documents(tokenizer, 1, length=4095)[0].ids
    reference, got, model = logits_of_both(torch, SHIPPED, ids)
    assert np.abs(reference - got).max() <= 1e-3
    # The same through the cache, in two calls.
    cache = model.make_cache()
    model(mx.array([ids[:3001]]), cache=cache)
    rest = np.array(model(mx.array([ids[3001:]]), cache=cache)[0])
    assert np.abs(reference[3001:] - rest).max() <= 1e-3


@pytest.mark.slow
def test_shipped_weights_recall_through_summaries(shipped, tokenizer):
    """512 tokens are 16 windows. The bounds leave room for chance: 40 questions."""
    options = {"notebooks": 10, "asked": 4, "seed": 11}
    seen = evaluate.recall(shipped, tokenizer, 512, **options)
    hidden = evaluate.recall(shipped, tokenizer, 512, hide=True, **options)
    assert seen.total == hidden.total >= 25
    assert seen.recall >= 0.85
    assert hidden.recall <= 0.1


def test_shipped_weights_copy_ordinary_words(shipped, tokenizer):
    """Words that training never shows, and the one of the documentation: 0.96 of many."""
    asked = evaluate.FIGURES["words in no list"]
    right, _ = evaluate.measure(shipped, tokenizer, asked, 60, seed=5)
    assert right.recall >= 0.88
    told = " wifi password is swordfish"
    ids = tokenizer.encode(f"{docs.USER}{told}{docs.ASSISTANT} Noted.{docs.END}")
    ids += tokenizer.encode(evaluate.turn("What is the wifi password?"))
    said = tokenizer.encode(f" swordfish.{docs.END}")
    assert evaluate.is_answer(shipped, shipped.make_cache(), ids, said)


def test_hiding_summaries_is_undone(shipped):
    ids = mx.array([[(7 * i) % 900 + 300 for i in range(200)]])
    before = shipped(ids)
    with evaluate.hidden_summaries():
        hidden = shipped(ids)
    assert mx.array_equal(before, shipped(ids))
    assert mx.array_equal(before[:, :40], hidden[:, :40]), "within the window nothing changes"
    assert not mx.allclose(before[:, 60:], hidden[:, 60:], atol=1e-2)


def test_shipped_folder_is_a_pytorch_checkpoint_of_bounded_size():
    files = {f.name: f.stat().st_size for f in SHIPPED.iterdir()}
    assert sum(files.values()) <= 8e6
    assert {"config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"} <= set(
        files
    )
    weights = mx.load(str(SHIPPED / "model.safetensors"))
    assert all(w.dtype == mx.float16 for w in weights.values())
    assert any(n.endswith("k_proj_summary.weight") for n in weights)
