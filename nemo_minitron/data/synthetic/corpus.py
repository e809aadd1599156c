"""The embedded corpus: deterministic text about an invented world, and questions about its facts.

Two domains speak about the same world. `encyclopedic` has articles in WikiText's format; `broad` has news, letters,
dialogues, diaries, instructions and stories in ordinary spelling. A fact recurs in several documents in different
words, so that a model can learn it; the narrative between the facts is random, so that it cannot learn that by heart.
"""

import random
from collections.abc import Iterator
from typing import Any

from nemo_minitron.data.synthetic.articles import pages
from nemo_minitron.data.synthetic.facts import FACTS
from nemo_minitron.data.synthetic.grammar import capitalised
from nemo_minitron.data.synthetic.names import article_of, pick
from nemo_minitron.data.synthetic.registers import pieces
from nemo_minitron.data.synthetic.world import Fact, World, world_for

DOMAINS = {"broad": pieces, "encyclopedic": pages}
SHARES = {"train": 1.0, "validation": 0.1, "test": 0.1}
CHOICES = 4


def documents(domain: str, split: str, words: int, seed: int) -> Iterator[str]:
    """The documents of a split, one after another.

    Args:
        domain: `broad` or `encyclopedic`.
        split: `train`, `validation` or `test`.
        words: words of the training split; the others have a tenth. The world grows with it.
        seed: of the world and of the text.
    """
    left = words * SHARES[split]
    stream = DOMAINS[domain](world_for(words, seed), random.Random(f"{domain}/{split}/{seed}"))
    while left > 0:
        document = next(stream)
        left -= len(document.split())
        yield document


def questions(words: int, seed: int) -> list[dict[str, Any]]:
    """One multiple-choice question about each fact of the world of `documents(..., words, seed)`.

    Each has `question`, `context` (a statement that the right choice completes), four `choices`, `answer` (index of
    the right one), `kind`, `attribute` and `entity`. Wrong choices are values of the same attribute of other entities.
    """
    world = world_for(words, seed)
    rng = random.Random(f"questions/{seed}")
    pool = _values(world)
    return [_question(rng, fact, pool) for fact in world.facts]


def _values(world: World) -> dict[tuple[str, str], list[str]]:
    """(kind, attribute) -> the different values that occur, or might, where too few do."""
    pool: dict[tuple[str, str], dict[str, None]] = {}
    for fact in world.facts:
        pool.setdefault((fact.entity.kind, fact.attribute), {})[fact.value] = None
    spare = World(-1, 2 * CHOICES)
    for fact in spare.facts:
        values = pool[fact.entity.kind, fact.attribute]
        if len(values) < 2 * CHOICES:
            values[fact.value] = None
    return {key: list(values) for key, values in pool.items()}


def _question(rng: random.Random, fact: Fact, pool: dict[tuple[str, str], list[str]]) -> dict[str, Any]:
    entity = fact.entity
    ask, clauses = FACTS[entity.kind][fact.attribute]
    wrong: dict[str, None] = {}
    while len(wrong) < CHOICES - 1:
        value = pick(rng, pool[entity.kind, fact.attribute])
        if value not in (fact.value, entity.name):
            wrong[value] = None
    values = [*wrong, fact.value]
    rng.shuffle(values)
    stem, form = clauses[0].removesuffix(" {v}"), "{v}"
    if stem.endswith(" {a}"):
        stem, form = stem.removesuffix(" {a}"), "{a} {v}"
    return {
        "question": ask.format(n=entity.name),
        "context": capitalised(stem.format(n=entity.name, s=entity.name, p=entity.possessive)),
        "choices": [form.format(v=value, a=article_of(value)) for value in values],
        "answer": values.index(fact.value),
        "kind": entity.kind,
        "attribute": fact.attribute,
        "entity": entity.name,
    }
