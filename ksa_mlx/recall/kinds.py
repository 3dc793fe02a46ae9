"""What is asked, by kind: facts with their depths, and questions about them (RULER's kinds,
arXiv 2404.06654, and plain facts)."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from .splits import Pattern, Split

NAMES, VALUES = 3, 4  # names with several values, and how many each
CHAINS, CHAIN = 3, 4  # of variables, and how many each
# Shares of the three commonest words of a list; the others come equally often.
COMMON = (0.14, 0.10, 0.07)
OTHERS = 60


@dataclass(frozen=True)
class Asked:
    """A question; fact: which holds the answer, or its beginning; None: the whole text does."""

    question: str
    begin: str
    answer: str
    fact: int | None = None


@dataclass
class Plan:
    """Facts, each with its depth in the text, and what is asked about them."""

    facts: list[tuple[float, str]] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)

    def add(self, depth: float, fact: str) -> int:
        self.facts.append((depth, fact))
        return len(self.facts) - 1

    def ask(self, pattern: Pattern, answer: str, fact: int | None, **names: str):
        self.asked.append(
            Asked(pattern.question.format(**names), pattern.begin.format(**names), answer, fact)
        )


# Depths, how many facts of a kind have a text, and a guess of how many list entries fill it.
Make = Callable[[Split, random.Random, Sequence[float], int, int], Plan]


def _numbers(rng: random.Random, n: int) -> list[str]:
    return [str(v) for v in rng.sample(range(1000, 10000), n)]


def _depths(rng: random.Random, n: int) -> list[float]:
    """Random, but one in each of n equal parts."""
    return [(i + rng.random()) / n for i in range(n)]


def _listed(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} and {words[-1]}"


def needle(split, rng, depths, facts, entries) -> Plan:
    """Facts of different attributes at the given depths, each of which is asked for by itself."""
    plan, pattern = Plan(), rng.choice([p for p in split.digits if "{a}" in p.fact])
    attributes = [rng.choice(split.attributes) for _ in depths]
    if len(depths) <= len(split.attributes):
        attributes = rng.sample(split.attributes, len(depths))
    names, values = rng.sample(split.names, len(depths)), _numbers(rng, len(depths))
    for depth, a, n, v in zip(depths, attributes, names, values, strict=True):
        plan.ask(pattern, v, plan.add(depth, pattern.fact.format(a=a, n=n, v=v)), a=a, n=n)
    return plan


def _keys(patterns: list[Pattern], attributes, values, split, rng, facts) -> Plan:
    plan, pattern, a = Plan(), rng.choice(patterns), rng.choice(attributes)
    names = rng.sample(split.names, facts)
    for depth, n, v in zip(_depths(rng, facts), names, values, strict=True):
        plan.ask(pattern, v, plan.add(depth, pattern.fact.format(a=a, n=n, v=v)), a=a, n=n)
    rng.shuffle(plan.asked)
    return plan


def digits(split, rng, depths, facts, entries) -> Plan:
    """Several keys: facts of one form, whose values are numbers."""
    return _keys(split.digits, split.attributes, _numbers(rng, facts), split, rng, facts)


def words(split, rng, depths, facts, entries) -> Plan:
    """Several keys: facts of one form, whose values are words."""
    drawn = rng.sample(split.words, facts)
    return _keys(split.word, split.word_attributes, drawn, split, rng, facts)


def values(split, rng, depths, facts, entries) -> Plan:
    """Several values: all numbers of a name, which are spread among those of others."""
    plan, names = Plan(), rng.sample(split.names, NAMES)
    owners = [n for n in names for _ in range(VALUES)]
    rng.shuffle(owners)
    held: dict[str, list[tuple[int, str]]] = {n: [] for n in names}
    drawn = zip(_depths(rng, len(owners)), owners, _numbers(rng, len(owners)), strict=True)
    for depth, n, v in drawn:
        held[n].append((plan.add(depth, split.values.fact.format(n=n, v=v)), v))
    for n in names:
        plan.ask(split.values, _listed([v for _, v in held[n]]), held[n][0][0], n=n)
    return plan


def variables(split, rng, depths, facts, entries) -> Plan:
    """Variable tracking: which variables got a number, one from another; several chains."""
    plan, chains = Plan(), _numbers(rng, CHAINS)
    order = [c for c in chains for _ in range(CHAIN)]
    rng.shuffle(order)
    made: dict[str, None] = {}  # in order
    while len(made) < len(order):
        made["".join(rng.choice(split.letters) for _ in range(3))] = None
    held: dict[str, list[tuple[int, str]]] = {c: [] for c in chains}
    for depth, c, n in zip(_depths(rng, len(order)), order, made, strict=True):
        form, v = (split.copy, held[c][-1][1]) if held[c] else (split.assign, c)
        held[c].append((plan.add(depth, form.format(n=n, v=v)), n))
    for c in chains:
        plan.ask(split.holding, _listed([n for _, n in held[c]]), held[c][0][0], v=c)
    return plan


def common(split, rng, depths, facts, entries) -> Plan:
    """Common words: the three commonest of a list that fills the text."""
    drawn = rng.sample(split.words, OTHERS + len(COMMON))
    top, others = drawn[: len(COMMON)], drawn[len(COMMON) :]
    counts = [max(9 - 2 * i, round(share * entries)) for i, share in enumerate(COMMON)]
    listed = [w for w, n in zip(top, counts, strict=True) for _ in range(n)]
    listed += [others[i % OTHERS] for i in range(entries - len(listed))]
    rng.shuffle(listed)
    plan = Plan([(0.0, split.listed.format(v=", ".join(listed)))])
    plan.ask(split.counted, _listed(top), None)
    return plan


MAKE: dict[str, Make] = {f.__name__: f for f in (needle, digits, words, values, variables, common)}
