"""References for people: marked in a terminal, and as a page that needs nothing else."""

import html
import json
import re
import unicodedata
from collections.abc import Iterable, Iterator
from itertools import accumulate
from pathlib import Path
from string import Template
from typing import IO

import numpy as np
from rich.console import Console
from rich.text import Text

from ..files import replaced
from .trace import Reference, Trace, pieces

# Tokens shown on either side of a reference.
AROUND = 16

# A token's chunks below this part of its heaviest one are not shaded.
FAINT = 0.02


def print_references(trace: Trace, tokenizer, file: IO[str], top: int = 3):
    """Print the heaviest passages with the words around them. Without a terminal's styles they
    stand between >> and <<."""
    console = Console(file=file, highlight=False)
    found, styled = _worth_showing(trace, tokenizer, top), console.is_terminal
    if not found:
        console.print(Text("(no references: nothing but the question was read)", "dim"))
    for r in found:
        console.print(Text(f"[{r.weight:.0%}, {describe(r)}]", "dim"))
        before, words, after = in_place(trace, tokenizer, r)
        marked = Text(words, "bold reverse") if styled else Text(f">>{words}<<")
        # A terminal gets whole lines, a file one line a passage.
        console.print(Text.assemble("  ", before, marked, after), soft_wrap=not styled)


def _worth_showing(trace: Trace, tokenizer, top: int) -> list[Reference]:
    return [r for r in trace.references(tokenizer, top) if r.weight >= 0.01]


def describe(r: Reference) -> str:
    """How a reference was read, and where it stands."""
    if r.through_summaries > 0.99:
        how = "through summaries"
    elif r.through_summaries < 0.01:
        how = "as text"
    else:
        how = f"{r.through_summaries:.0%} through summaries"
    return f"{how}, tokens {r.start:,} to {r.stop - 1:,}"


def in_place(trace: Trace, tokenizer, r: Reference) -> tuple[str, str, str]:
    """What stands before a reference, its words, and what stands after it, in one line."""
    begin, end = max(0, r.start - AROUND), min(trace.prompt_length, r.stop + AROUND)
    parts = readable(tokenizer, pieces(tokenizer, trace.tokens, [begin, r.start, r.stop, end]))
    before, words, after = (re.sub(r"\s+", " ", plain(t)) for t in parts)
    return (
        f"... {before.lstrip()}" if begin else before.lstrip(),
        words,
        f"{after.rstrip()} ..." if end < trace.prompt_length else after,
    )


def plain(text: str) -> str:
    """Text without control characters, which a terminal or a browser might obey."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Co") else "\ufffd"
        for c in text
    )


def readable(tokenizer, parts: Iterable[str]) -> list[str]:
    """Texts that follow each other, without what a chat template puts between turns: a line break
    stands for its marks, and for the names of roles that they enclose. Nor with the blank that
    every line begins with, if every one does."""
    parts = list(parts)
    text = "".join(parts)
    shown = list(text)

    def hide(match: re.Match, instead: str):
        shown[match.start() : match.end()] = [instead, *[""] * (len(match[0]) - 1)]

    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    if marks := "|".join(re.escape(mark) for mark in special if mark.strip()):
        role = r"(?:system|user|assistant|tool)(?=\s|" + marks + ")"
        for match in re.finditer(rf"\s*(?:(?:{marks})(?:{role})?\s*)+", text):
            hide(match, "\n" if match.start() else "")
    lines = list(re.finditer(r"\n ?(?=\S)", text))
    if all(len(line[0]) == 2 for line in lines):
        for line in lines:
            hide(line, "\n")
    ends = accumulate(map(len, parts))
    return ["".join(shown[end - len(part) : end]) for part, end in zip(parts, ends, strict=True)]


def write_page(trace: Trace, tokenizer, file: Path, model: str, top: int = 5):
    """Write a page that shows the prompt, shaded by how much the answer drew on each chunk.

    model: what the model is called.

    The file is replaced whole or not at all. Raises OSError if it cannot be written.
    """
    text = page(trace, tokenizer, model, top)
    with replaced(file) as part:
        part.write_text(text, encoding="utf-8")


def page(trace: Trace, tokenizer, model: str, top: int = 5) -> str:
    """The page's HTML."""
    chunks = [*range(0, trace.question, trace.chunk), trace.question]
    cuts = [*chunks, *range(trace.prompt_length, len(trace.tokens) + 1)]
    texts = readable(tokenizer, pieces(tokenizer, trace.tokens, cuts))
    context, question = texts[: len(chunks) - 1], texts[len(chunks) - 1]
    found = _worth_showing(trace, tokenizer, top)
    through = sum(r.weight * r.through_summaries for r in found)
    about = (
        f"These hold {sum(r.weight for r in found):.0%} of the weight, {through:.0%} through "
        f"summaries. Shaded below: how much the answer drew on each chunk of {trace.chunk} tokens."
        if found
        else "No references: nothing but the question was read."
    )
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        model=escape(model),
        question=escape(question.strip()),
        answer="".join(_answer(trace, texts[len(chunks) :])),
        about=escape(about),
        references="".join(_item(trace, tokenizer, r) for r in found),
        context="".join(_context(trace, context)),
        tokens=json.dumps(_token_shades(trace), separators=(",", ":")),
    )


def _item(trace: Trace, tokenizer, r: Reference) -> str:
    before, words, after = map(escape, in_place(trace, tokenizer, r))
    return (
        f'<li><a href="#c{r.start // trace.chunk}">{r.weight:.0%}</a>, {describe(r)}: '
        f'<span class="quiet">{before}</span><mark>{words}</mark>'
        f'<span class="quiet">{after}</span></li>'
    )


def escape(text: str) -> str:
    return html.escape(plain(text), quote=True)


def _context(trace: Trace, texts: list[str]) -> Iterator[str]:
    shades = _shades(trace.weights())
    for i, (text, shade, weight) in enumerate(zip(texts, shades, trace.weights(), strict=True)):
        style = f' style="--w:{shade:.2f}" title="{weight:.1%}"' if shade >= 0.01 else ""
        yield f'<span id="c{i}"{style}>{escape(text)}</span>'


def _answer(trace: Trace, texts: list[str]) -> Iterator[str]:
    shades = _shades(trace.token_weights.sum(1))
    for text, shade in zip(texts, shades, strict=True):
        yield f'<span tabindex="0" style="--w:{shade:.2f}">{escape(text)}</span>'


def _token_shades(trace: Trace) -> list:
    """For each token of the answer: its share of the weight, its chunks, their shades."""
    total, tokens = max(float(trace.by_layer.sum()), 1e-30), []
    for chunks, weights in zip(trace.token_chunks, trace.token_weights, strict=True):
        shown = weights > FAINT * max(weights.max(initial=0), 1e-30)
        shades = _shades(weights[shown])
        tokens.append(
            [
                round(float(weights.sum()) / total, 4),
                chunks[shown].tolist(),
                [round(float(x), 2) for x in shades],
            ]
        )
    return tokens


def _shades(weights: np.ndarray) -> np.ndarray:
    """Opacities, 0 to 0.85; roots, so that a tenth of the heaviest chunk can still be seen."""
    return 0.85 * np.sqrt(weights / max(weights.max(initial=0), 1e-30))
