"""Turns on one cache: what is read, stopped, taken back, and what it costs."""

import numpy as np
import pytest

from ksa_mlx.chat import reading
from ksa_mlx.chat.conversation import Document
from ksa_mlx.chat.report import cache_bytes, cache_line, full_bytes
from ksa_mlx.chat.session import Session
from ksa_mlx.errors import ContextError, SessionError

from ._chat import SYSTEM, fresh, say


def test_turns_read_only_what_is_new(session):
    said = list(session.conversation.messages)
    for question in ("What is the locker of Maria?", "Omar's bike?", "What is Klara's code?"):
        held = session.offset
        answer = say(session, question)
        said.append({"role": "user", "content": question})
        assert answer == fresh(session, said)
        full = session.tokenizer.apply_chat_template(said, add_generation_prompt=True)
        assert session.tokens[: len(full)] == full
        assert session.usage.prompt_tokens == len(full) - held
        assert session.offset == len(session.tokens) == session.cache[0].offset
        said.append({"role": "assistant", "content": answer})
    assert session.conversation.messages == said


def test_reading_ahead(session):
    n = session.read_ahead()
    assert n == session.offset == session.cache[-1].offset > 20
    answer = say(session, "Omar's bike?")
    assert session.usage.prompt_tokens < n
    assert answer == fresh(session, session.conversation.messages[:-1])


def test_a_template_that_rewrites_the_past(session, monkeypatch):
    """As Qwen3's does, which drops the thinking of earlier turns."""
    template = session.tokenizer.chat_template
    cut = "m['content'] | trim + '<|end|>'"
    assert cut in template
    monkeypatch.setattr(
        session.tokenizer._tokenizer,
        "chat_template",
        template.replace(cut, "(m['content'] | trim)[:2] + '<|end|>'"),
    )
    say(session, "What is the locker of Maria?")
    answer = say(session, "Omar's bike?")
    said = session.conversation.messages[:-1]
    assert answer == fresh(session, said)
    full = session.tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert session.usage.prompt_tokens == len(full)  # read again, from the start


def test_stop_in_an_answer(session):
    session.max_tokens = 40
    pieces = []
    for piece in session.answer("Omar's bike?"):
        pieces.append(piece)
        session.stop = True
    assert len(pieces) == 1 and session.usage.finish_reason == "stopped"
    assert session.conversation.messages[-1] == {"role": "assistant", "content": pieces[0]}
    assert {c.offset for c in session.cache} == {len(session.tokens)}
    assert say(session, "What is Klara's code?") == fresh(
        session, session.conversation.messages[:-1]
    )


@pytest.mark.parametrize("after", [0, 8, 16])
def test_stop_while_a_prompt_is_read(session, after):
    session.options["prefill_step_size"] = 8

    def progress(done, total):
        session.stop = done >= after

    session.progress = progress
    before = list(session.conversation.messages)
    assert say(session, "Omar's bike?") == "" and session.usage is None
    assert session.conversation.messages == before
    assert {c.offset for c in session.cache} == {len(session.tokens)} == {after}
    session.progress = lambda done, total: None
    assert say(session, "Klara's code?") == fresh(session, session.conversation.messages[:-1])


def test_interrupt_in_the_middle_of_a_step(session, monkeypatch):
    """A second Ctrl-C strikes anywhere: the layers' caches then disagree."""
    say(session, "What is the locker of Maria?")
    layer = session.model.layers[2].self_attn
    with monkeypatch.context() as m:
        m.setattr(type(layer), "__call__", _raise_keyboard_interrupt)
        with pytest.raises(KeyboardInterrupt):
            say(session, "Omar's bike?")
    assert session.offset == 0 and len(session.conversation.messages) == 3
    assert say(session, "Omar's bike?") == fresh(session, session.conversation.messages[:-1])


def _raise_keyboard_interrupt(*args, **kwargs):
    raise KeyboardInterrupt


NEEDS_A_QUESTION = (
    "{%- if messages[-1]['role'] != 'user' -%}{{ raise_exception('Ask.') }}{%- endif -%}"
)


@pytest.mark.parametrize(
    "template",
    [
        NEEDS_A_QUESTION + "{%- for m in messages -%}{{- '<|user|> ' + m['content'] -}}"
        "{%- endfor -%}{{- '<|assistant|>' -}}",
        # The system prompt is part of the user's first turn.
        NEEDS_A_QUESTION + "{{- '<|user|> ' + messages[0]['content'] + ' ' -}}"
        "{%- for m in messages[1:] -%}{{- m['content'] -}}{%- endfor -%}{{- '<|assistant|>' -}}",
    ],
)
def test_reading_ahead_where_the_template_wants_a_question(session, monkeypatch, template):
    monkeypatch.setattr(session.tokenizer._tokenizer, "chat_template", template)
    n = session.read_ahead()
    assert n == session.offset > 20
    answer = say(session, "Omar's bike?")
    assert session.usage.prompt_tokens < n
    assert answer == fresh(session, session.conversation.messages[:-1])


def test_a_template_that_refuses(session, monkeypatch, capsys, folder):
    refusal = "{{ raise_exception('No system prompts.') }}"
    monkeypatch.setattr(session.tokenizer._tokenizer, "chat_template", refusal)
    for act in (session.read_ahead, lambda: say(session, "Omar's bike?")):
        with pytest.raises(SessionError, match=r"^chat template: refused .*No system prompts"):
            act()


def test_one_beginning_of_the_text_whoever_writes_it(session, monkeypatch):
    model, tokenizer = session.model, session.tokenizer
    encode = tokenizer._tokenizer.encode

    def with_bos(text, add_special_tokens=True, **kwargs):
        ids = encode(text, add_special_tokens=False, **kwargs)
        return [tokenizer.bos_token_id, *ids] if add_special_tokens else ids

    monkeypatch.setattr(tokenizer._tokenizer, "encode", with_bos)
    for system in (None, "<s>Notes.", "Notes."):
        for text in ("hello", "<s>hello"):
            s = Session(model, tokenizer, "m", system_prompt=system, use_template=False)
            prompt = s._prompt(text)[0]
            typed = bool(system) and text.startswith("<s>")
            assert prompt[0] == tokenizer.bos_token_id and prompt.count(prompt[0]) == 1 + typed


def test_several_lines_can_be_continued(loaded):
    """mlx_lm.cache_prompt's way to read the beginning of a turn."""
    tokenizer = loaded[1]
    for text in ("one line", "two\nlines", "two\n lines\n\nmore\n", "a"):
        turn = [{"role": "user", "content": text}]
        begun = tokenizer.apply_chat_template(turn, continue_final_message=True)
        full = tokenizer.apply_chat_template(turn, add_generation_prompt=False)
        assert begun == full


def test_text_that_is_not_utf8(session):
    with pytest.raises(SessionError, match=r"^prompt: the text is not UTF-8$"):
        say(session, "caf\udce9")


@pytest.mark.parametrize("rate", [2000, 120, 20])
def test_steps_are_sized_by_time(rate):
    """Rates of tokens a second. No step but the first takes more than two seconds."""
    sizes, clock = [], [0.0]

    def model(part, cache):
        sizes.append(part.shape[1])
        clock[0] += part.shape[1] / rate

    with pytest.MonkeyPatch.context() as m:
        m.setattr(reading.time, "perf_counter", lambda: clock[0])
        done = list(reading.read([(model, [])], list(range(6000)), 2048))
    assert done == [0, *np.cumsum(sizes)] and done[-1] == 6000
    assert all(n <= 2 * rate for n in sizes[1:]) and max(sizes) <= 2048
    assert sizes[1] >= min(rate / 2, 1024)


def test_context(session, monkeypatch):
    question = "What is the locker of Maria?"
    messages = [*session.conversation.messages, {"role": "user", "content": question}]
    n = len(session.tokenizer.apply_chat_template(messages, add_generation_prompt=True))
    monkeypatch.setattr(session.model.args, "max_position_embeddings", n)
    with pytest.raises(SessionError, match=rf"found {n} tokens, .* context of {n}"):
        say(session, question)
    session.model.args.max_position_embeddings = n + 2
    say(session, question)
    assert session.offset == n + 2 and session.usage.finish_reason == "context"
    with pytest.raises(ContextError, match="context"):
        say(session, "Omar's bike?")
    assert session.offset == n + 2  # nothing is forgotten


def test_reset(session):
    first = say(session, "Omar's bike?")
    say(session, "What is Klara's code?")
    session.reset()
    assert session.offset == 0 == cache_bytes(session) and len(session.conversation.messages) == 1
    assert say(session, "Omar's bike?") == first


def test_statistics(session):
    """Like with like: what attention reads, of ours and of full attention, not what is reserved."""
    layers, heads, dim, size, k, window = 5, 2, 64, 2, 8, 4
    row = 2 * layers * heads * dim * size
    for text in ("Omar's bike?", "What is Klara's code?", "And " * 90):
        say(session, text)
        n = session.offset
        assert full_bytes(session) == row * n
        gone = max(0, (n - 1) // k - window)
        assert cache_bytes(session) == row * (n - gone * k + gone)
        ratio = full_bytes(session) / cache_bytes(session)
        assert cache_line(session).endswith(f"{ratio:.2f} times as much")
    assert ratio > 1.5
    session.reset()
    session.conversation.messages.clear()
    say(session, "a")
    assert cache_bytes(session) == full_bytes(session) > 0


def test_a_cache_that_is_quantised_later_says_so(session):
    session.options.update(kv_bits=4, kv_group_size=32)
    say(session, "Omar's bike?")
    assert cache_line(session).endswith("; quantised from 5,000 tokens on (--quantized-kv-start)")


def test_a_penalty_sees_the_prompt_as_mlx_lms_does(session):
    """The prompt is read before mlx-lm sees it: its processors are shown it none the less."""
    seen = []

    def processor(tokens, logits):
        seen.append(tokens.tolist())
        return logits

    session.options.update(logits_processors=[processor], prefill_step_size=8)
    prompt, _ = session._prompt("Omar's bike?")
    say(session, "Omar's bike?")
    assert seen[0] == prompt and len(prompt) > 16
    n = len(prompt)
    assert [x[n:] for x in seen] == [session.tokens[n : n + i] for i in range(len(seen))]
    held = session.offset
    seen.clear()
    say(session, "And Klara's code?")
    assert seen[0] == session.tokens[held : held + len(seen[0])]


# Taking turns back


@pytest.fixture
def long_reach(loaded, folder):
    return Session(*loaded, str(folder), system_prompt=SYSTEM, max_tokens=12, rollback=64)


def test_again_and_undo_take_the_cache_back(long_reach):
    session, question = long_reach, "What is the locker of Maria?"
    first = say(session, question)
    said, held = list(session.conversation.messages), list(session.tokens)
    assert "".join(session.again()) == first
    assert session.usage.prompt_tokens == 1 and session.reread == 0  # the prompt's last token
    assert (session.conversation.messages, session.tokens) == (said, held)
    assert session.undo() == question
    assert session.conversation.messages == said[:1] and session.reread == 0
    assert session.tokens == session.conversation.opening() == held[: session.offset] != []
    assert {c.offset for c in session.cache} == {session.offset}
    assert say(session, "Omar's bike?") == fresh(session, session.conversation.messages[:-1])
    with pytest.raises(SessionError, match="no turn to take back"):
        session.reset()
        session.undo()


def test_undo_out_of_reach_reads_again(session):
    """A cache without rollback: it is emptied, and says how much is read again."""
    say(session, "What is the locker of Maria?")
    session.undo()
    opening = session.conversation.opening()
    assert session.offset == 0 and session.reread == len(opening) > 20
    assert say(session, "Omar's bike?") == fresh(session, session.conversation.messages[:-1])
    assert session.usage.prompt_tokens > len(opening)


def test_what_a_template_rewrites_is_taken_back(long_reach, monkeypatch):
    template = long_reach.tokenizer.chat_template
    other = template.replace("m['content'] | trim + '<|end|>'", "(m['content'] | trim)[:2] + '.'")
    assert other != template
    monkeypatch.setattr(long_reach.tokenizer._tokenizer, "chat_template", other)
    say(long_reach, "What is the locker of Maria?")
    held = long_reach.offset
    answer = say(long_reach, "Omar's bike?")
    assert answer == fresh(long_reach, long_reach.conversation.messages[:-1])
    assert long_reach.usage.prompt_tokens < 24 < held and long_reach.reread == 0


def test_turns_without_a_template_are_taken_back(loaded, folder):
    session = Session(*loaded, str(folder), use_template=False, max_tokens=4, rollback=64)
    first = say(session, "The locker of Maria is")
    plain = session.conversation.plain
    say(session, " and the code of")
    assert session.undo() == " and the code of" and session.conversation.plain == plain
    assert session.tokens == plain
    assert "".join(session.again()) == first
    session.undo()
    assert session.offset == 0 and not session.conversation.begun


def test_a_document_is_read_before_its_question(long_reach):
    session, talk = long_reach, long_reach.conversation
    talk.documents = [Document("notes.txt", "The locker of Maria is 4821.\n")]
    n = session.read_ahead()
    assert n == session.offset == len(session.tokens)
    with pytest.raises(SessionError, match=r"^again: found a document that waits"):
        session.again()
    answer = say(session, "What is the locker of Maria?")
    assert session.usage.prompt_tokens < 16 and not talk.documents
    text = "notes.txt:\nThe locker of Maria is 4821.\n\nWhat is the locker of Maria?"
    assert talk.messages[1:] == [
        {"role": "user", "content": text},
        {"role": "assistant", "content": answer},
    ]
    assert answer == fresh(session, talk.messages[:-1])
    assert "".join(session.again()) == answer and session.usage.prompt_tokens == 1
    talk.documents = [Document("notes.txt", "The hat of Tom is blue.\n")]
    assert session.undo() == "notes.txt" and not talk.documents and talk.begun


def test_a_document_that_does_not_fit(session, monkeypatch):
    monkeypatch.setattr(session.model.args, "max_position_embeddings", 60)
    session.conversation.documents = [Document("long.txt", SYSTEM * 9)]
    with pytest.raises(ContextError, match=r"^long.txt: found \d+ tokens, .* context of 60"):
        session.read_ahead()
