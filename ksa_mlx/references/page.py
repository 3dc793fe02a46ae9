"""References for people: marked in a terminal, and as a page that needs nothing else."""

import html
import json
import re
import unicodedata
from collections.abc import Iterator
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
    parts = pieces(tokenizer, trace.tokens, [begin, r.start, r.stop, end])
    before, words, after = (re.sub(r"\s+", " ", plain(t)) for t in parts)
    return (
        f"... {before.lstrip()}" if begin else before,
        words,
        f"{after.rstrip()} ..." if end < trace.prompt_length else after,
    )


def plain(text: str) -> str:
    """Text without control characters, which a terminal or a browser might obey."""
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Co") else "\ufffd"
        for c in text
    )


def write_page(trace: Trace, tokenizer, file: Path, top: int = 5):
    """Write a page that shows the prompt, shaded by how much the answer drew on each chunk.

    The file is replaced whole or not at all. Raises OSError if it cannot be written.
    """
    text = page(trace, tokenizer, top)
    with replaced(file) as part:
        part.write_text(text, encoding="utf-8")


def page(trace: Trace, tokenizer, top: int = 5) -> str:
    """The page's HTML."""
    found = _worth_showing(trace, tokenizer, top)
    through = sum(r.weight * r.through_summaries for r in found)
    about = (
        f"Shaded: how much the answer drew on each chunk of {trace.chunk} tokens. The passages "
        f"below hold {sum(r.weight for r in found):.0%} of the weight, {through:.0%} through "
        "summaries. Point at a token of the answer to see its own."
        if found
        else "No references: nothing but the question was read."
    )
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(
        answer="".join(_answer(trace, tokenizer)),
        about=escape(about),
        references="".join(_item(trace, tokenizer, r) for r in found),
        context="".join(_context(trace, tokenizer)),
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


def _context(trace: Trace, tokenizer) -> Iterator[str]:
    cuts = [*range(0, trace.question, trace.chunk), trace.question, trace.prompt_length]
    texts: list[str] = [escape(t) for t in pieces(tokenizer, trace.tokens, cuts)]
    *texts, tail = texts
    shades = _shades(trace.weights())
    for i, (text, shade, weight) in enumerate(zip(texts, shades, trace.weights(), strict=True)):
        style = f' style="--w:{shade:.2f}" title="{weight:.1%}"' if shade >= 0.01 else ""
        yield f'<span id="c{i}"{style}>{text}</span>'
    yield f"<i>{tail}</i>"


def _answer(trace: Trace, tokenizer) -> Iterator[str]:
    cuts = range(trace.prompt_length, len(trace.tokens) + 1)
    shades = _shades(trace.token_weights.sum(1))
    for text, shade in zip(pieces(tokenizer, trace.tokens, cuts), shades, strict=True):
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
