"""The encyclopedic domain: articles in WikiText's format about the invented world."""

import random
from collections.abc import Callable, Iterator

from nemo_minitron.data.synthetic.facts import FACTS
from nemo_minitron.data.synthetic.grammar import RULES, Slots, capitalised
from nemo_minitron.data.synthetic.names import article_of, pick
from nemo_minitron.data.synthetic.world import Entity, Fact, World

NARRATIVE = {"person": "life"}
HEADINGS = {
    "country": ("Government", "Economy", "Geography", "Early history"),
    "town": ("History", "Economy", "Sights", "Townspeople"),
    "river": ("Course", "Geography", "Navigation", "Floods"),
    "person": ("Early life", "Career", "Later years", "Reception"),
    "ship": ("Construction", "Service", "Crew", "End of service"),
    "species": ("Description", "Distribution", "Behaviour", "Discovery"),
    "battle": ("Background", "Course of the battle", "Aftermath", "Memory"),
    "bridge": ("Construction", "Structure", "Traffic", "Repairs"),
    "mineral": ("Properties", "Occurrence", "Discovery", "Applications"),
    "festival": ("Origins", "Customs", "Food", "Present day"),
}
TOPICS = ("Legacy", "Chronology", "Sources", "Outline", "History", "Notes")
PLURALS = {"species": "Species", "country": "Countries"}
DATES = ("founded", "born", "died", "launched", "year", "opened", "discovered", "begun")


class Writer:
    """Puts facts into sentences; with the same random state it writes the same."""

    def __init__(self, rng: random.Random):
        self.rng = rng

    def clause(self, fact: Fact, *, named: bool = True) -> str:
        entity = fact.entity
        return pick(self.rng, FACTS[entity.kind][fact.attribute][1]).format(
            n=entity.name,
            s=entity.name if named else entity.short,
            p=entity.possessive,
            v=fact.value,
            a=article_of(fact.value),
        )

    def filler(self, entity: Entity, *, named: bool = False) -> str:
        name = entity.name if named else entity.short
        slots = Slots(self.rng, RULES, n=entity.name, s=name, p=entity.possessive)
        return slots.say(NARRATIVE.get(entity.kind, entity.kind))

    def rule(self, name: str) -> str:
        return Slots(self.rng, RULES).say(name)

    def sentence(self, clause: str) -> str:
        """The clause alone, introduced, or with something behind it."""
        chance = self.rng.random()
        if chance < 0.2:
            clause = f"{self.rule('opener')} {clause}"
        elif chance < 0.35:
            clause = f"{clause} , {self.rule('tail')}"
        return f"{capitalised(clause)} ."

    def paragraph(self, facts: list[Fact], about: Entity, fillers: int) -> str:
        """Facts and fillers in random order; facts about `about` name it half the time after its first mention."""
        clauses: list[Fact | None] = [*facts, *[None] * fillers]
        self.rng.shuffle(clauses)
        sentences: list[str] = []
        pending = ""
        for number, fact in enumerate(clauses):
            named = number == 0 or self.rng.random() < 0.5
            if fact is None:
                clause = self.filler(about, named=named)
            else:
                clause = self.clause(fact, named=fact.entity is not about or named)
            if pending:
                sentences.append(f"{capitalised(pending)} {self.rule('joint')} {clause} .")
                pending = ""
            elif fact is not None and number + 1 < len(clauses) and self.rng.random() < 0.3:
                pending = clause
            else:
                sentences.append(self.sentence(clause))
        return " ".join(sentences)


def page(title: str, sections: list[tuple[str, list[str]]]) -> str:
    """A WikiText page: lines padded with spaces, blank lines around headings."""
    lines = [f" = {title} = \n \n"]
    for heading, paragraphs in sections:
        if heading:
            lines.append(f" = = {heading} = = \n \n")
        lines += [f" {paragraph} \n" for paragraph in paragraphs]
        lines.append(" \n")
    return "".join(lines)


def article(writer: Writer, world: World, entity: Entity) -> str:
    """The entity's own page: every fact about it, and what others have to do with it."""
    rng = writer.rng
    facts = rng.sample(entity.facts, len(entity.facts))
    lead, rest = facts[:3], facts[3:]
    headings = rng.sample(HEADINGS[entity.kind], 2)
    half = (len(rest) + 1) // 2
    sections = [("", [writer.paragraph(lead, entity, rng.randint(1, 2))])]
    for heading, part in zip(headings, (rest[:half], rest[half:])):
        paragraphs = [writer.paragraph(part, entity, rng.randint(1, 3))]
        if rng.random() < 0.4:
            paragraphs.append(writer.paragraph(rng.sample(entity.facts, 1), entity, 2))
        sections.append((heading, paragraphs))
    relations = _relations(rng, entity, 4)
    if relations:
        sections.append(("Related subjects", [writer.paragraph(relations, entity, 1)]))
    title = entity.title if rng.random() < 0.75 else f"{entity.title} ( {entity.kind} )"
    return page(title, sections)


def _relations(rng: random.Random, entity: Entity, count: int) -> list[Fact]:
    """Facts of others that mention the entity, and a fact about each thing that it mentions."""
    onwards = [pick(rng, fact.target.facts) for fact in entity.facts if fact.target]
    facts = entity.mentions + onwards
    return rng.sample(facts, min(count, len(facts)))


def survey(writer: Writer, world: World, entity: Entity) -> str:
    """A page about one aspect of an entity, with some of its facts and those of its neighbours."""
    rng = writer.rng
    own = rng.sample(entity.facts, min(4, len(entity.facts)))
    parts = [("", [writer.paragraph(own[:2], entity, 2)])]
    around = _relations(rng, entity, 5)
    parts.append((pick(rng, HEADINGS[entity.kind]), [writer.paragraph(own[2:] + around[:2], entity, 1)]))
    if around[2:]:
        parts.append(("Context", [writer.paragraph(around[2:], entity, 2)]))
    return page(f"{pick(rng, TOPICS)} of {entity.title}", parts)


def listing(writer: Writer, world: World, entity: Entity) -> str:
    """A list of all entities of one kind in a region or two, a line with two facts for each."""
    rng = writer.rng
    kind, region = entity.kind, entity.region
    members = world.of_region(region, kind) + (world.of_region(region - 1, kind) if region else [])
    rng.shuffle(members)
    lines = []
    for member in members[:6]:
        first, second = rng.sample(member.facts, 2)
        joint = pick(rng, (", and", ";", ", while"))
        lines.append(f"{capitalised(writer.clause(first))} {joint} {writer.clause(second)} .")
    country = world.of_region(region, "country")[0].title
    plural = PLURALS.get(kind, "People" if kind == "person" else f"{kind.capitalize()}s")
    intro = writer.sentence(writer.filler(members[0], named=True))
    return page(f"{plural} of {country}", [("", [intro]), ("List", lines)])


def century(writer: Writer, world: World, entity: Entity) -> str:
    """What happened in the region in one century."""
    rng = writer.rng
    dated = [fact for one in world.regions[entity.region] for fact in one.facts if fact.attribute in DATES]
    hundred = int(pick(rng, dated).value) // 100
    events = [fact for fact in dated if int(fact.value) // 100 == hundred]
    events = sorted(rng.sample(events, min(8, len(events))), key=lambda fact: int(fact.value))
    lines = []
    for fact in events:
        follow_up = pick(rng, fact.entity.facts)
        lines.append(f"{writer.sentence(writer.clause(fact))} {writer.sentence(writer.clause(follow_up))}")
    country = world.of_region(entity.region, "country")[0]
    intro = writer.sentence(writer.filler(country, named=True))
    return page(f"{hundred}00s in {country.title}", [("", [intro]), ("Events", lines)])


def comparison(writer: Writer, world: World, entity: Entity) -> str:
    """Two entities of a kind side by side, attribute by attribute."""
    rng = writer.rng
    others = [one for one in world.kinds[entity.kind] if one is not entity]
    if not others:
        return survey(writer, world, entity)
    other = pick(rng, others)
    sentences = []
    for one, two in rng.sample(list(zip(entity.facts, other.facts)), 4):
        contrast = pick(rng, (", whereas", ", while", "; on the other hand ,", ", but"))
        sentences.append(f"{capitalised(writer.clause(one))} {contrast} {writer.clause(two)} .")
        if rng.random() < 0.5:
            sentences.append(writer.sentence(writer.filler(pick(rng, (one.entity, two.entity)), named=True)))
    return page(f"{entity.title} and {other.title}", [("", [" ".join(sentences)])])


#: What a cycle writes about: the page of each entity, and the others for the given share of the entities.
FORMS: tuple[tuple[Callable[[Writer, World, Entity], str], float], ...] = (
    (article, 1.0),
    (survey, 0.5),
    (listing, 0.2),
    (century, 0.2),
    (comparison, 0.4),
)


def pages(world: World, rng: random.Random) -> Iterator[str]:
    """Pages without end: cycle after cycle over the whole world, in a new order and new words each time."""
    writer = Writer(rng)
    while True:
        plan = [
            (form, entity)
            for form, share in FORMS
            for entity in rng.sample(world.entities, max(1, round(share * len(world.entities))))
        ]
        rng.shuffle(plan)
        for form, entity in plan:
            yield form(writer, world, entity)
