"""The invented world: countries, towns, rivers, people, ships... and the facts that tie them together.

It grows region by region, each from its own seed, and refers only backwards: a smaller world is the beginning of a
larger one of the same seed, so that corpora of different sizes and domains speak about the same things.
"""

import dataclasses
import random
from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache

from nemo_minitron.data.synthetic import names as lists
from nemo_minitron.data.synthetic.names import Names, decimal, grouped, pick

#: Words of training text for each region; a fact then recurs about ten times.
WORDS_PER_REGION = 44_000
REGION = {
    "country": 1, "river": 2, "town": 5, "person": 6, "ship": 2, "species": 2,
    "battle": 1, "bridge": 1, "mineral": 1, "festival": 1,
}  # fmt: skip


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Entity:
    """A thing with a name.

    Attributes:
        kind: key of REGION.
        name: as it stands inside a sentence, with its article.
        short: how it is called after it was introduced.
        possessive: ``its``, ``his`` or ``her``.
        region: number of its region.
        facts: what is known about it.
        mentions: facts about others whose value it is.
    """

    kind: str
    name: str
    short: str
    possessive: str
    region: int
    facts: list["Fact"] = dataclasses.field(default_factory=list)
    mentions: list["Fact"] = dataclasses.field(default_factory=list)

    @property
    def title(self) -> str:
        name = self.name.removeprefix("the ")
        return name[0].upper() + name[1:]


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Fact:
    """One attribute of an entity; `target` is the entity that is the value, if it is one."""

    entity: Entity
    attribute: str
    value: str
    target: Entity | None = None


class World:
    """`regions` regions of the world that belongs to `seed`."""

    def __init__(self, seed: int, regions: int):
        self.entities: list[Entity] = []
        self.kinds: dict[str, list[Entity]] = defaultdict(list)
        self.regions: list[list[Entity]] = []
        names = Names()
        for number in range(regions):
            _Region(self, names, number, random.Random(f"world/{seed}/{number}")).build()

    @property
    def facts(self) -> list[Fact]:
        return [fact for entity in self.entities for fact in entity.facts]

    def of_region(self, region: int, kind: str) -> list[Entity]:
        return [entity for entity in self.regions[region] if entity.kind == kind]


@lru_cache(maxsize=4)
def world_for(words: int, seed: int) -> World:
    """The world of a corpus of so many training words."""
    return World(seed, max(1, round(words / WORDS_PER_REGION)))


class _Region:
    """Builds one region: names first, so that facts may refer to any of them."""

    def __init__(self, world: World, names: Names, number: int, rng: random.Random):
        self.world, self.names, self.number, self.rng = world, names, number, rng
        self.style = names.style(rng)

    def build(self) -> None:
        created = [self._entity(kind) for kind, count in REGION.items() for _ in range(count)]
        self.world.regions.append(created)
        self.world.entities += created
        for entity in created:
            self.world.kinds[entity.kind].append(entity)
        for entity in created:
            getattr(self, f"_{entity.kind}_facts")(entity)

    def _entity(self, kind: str) -> Entity:
        woman = self.rng.random() < 0.5
        name = self._person_name(woman) if kind == "person" else self._thing_name(kind)
        short = name.split()[-1] if kind == "person" else f"the {kind}"
        possessive = ("her" if woman else "his") if kind == "person" else "its"
        return Entity(kind=kind, name=name, short=short, possessive=possessive, region=self.number)

    def _made(self, endings: Sequence[str], form: str = "{}") -> str:
        return self.names.make(self.rng, self.style, endings, form)

    def _person_name(self, woman: bool) -> str:
        first = self._made(lists.WOMEN_ENDINGS if woman else lists.MEN_ENDINGS)
        return f"{first} {self._made(lists.SURNAME_ENDINGS)}"

    def _thing_name(self, kind: str) -> str:
        if kind == "ship":
            return self.names.unique(self.rng, "the {} {}", lists.SHIP_ADJECTIVES, lists.SHIP_NOUNS)
        if kind == "species":
            return f"the {self._made(('ic', 'ish', 'ine', 'an'))} {pick(self.rng, lists.CREATURES)}"
        endings = {
            "country": lists.COUNTRY_ENDINGS,
            "river": lists.RIVER_ENDINGS,
            "mineral": lists.MINERAL_ENDINGS,
        }.get(kind, lists.TOWN_ENDINGS)
        form = {
            "river": "the {}", "battle": "the Battle of {}", "bridge": "the {} Bridge", "festival": "the {} Fair",
        }.get(kind, "{}")  # fmt: skip
        name = self._made(endings, form)
        return name.lower() if kind == "mineral" else name

    def _add(self, entity: Entity, **values: "Entity | str | int") -> None:
        for attribute, value in values.items():
            target = value if isinstance(value, Entity) else None
            fact = Fact(entity, attribute, target.name if target else str(value), target)
            entity.facts.append(fact)
            if target:
                target.mentions.append(fact)

    def _any(self, kind: str, besides: Entity | None = None) -> Entity:
        return pick(self.rng, [one for one in self.world.of_region(self.number, kind) if one is not besides])

    def _abroad(self, kind: str, besides: Entity) -> Entity:
        """One of this region or of the two before it."""
        near = self.world.kinds[kind][-3 * REGION[kind] :]
        return pick(self.rng, [one for one in near if one is not besides])

    def _year(self, first: int, last: int) -> int:
        return self.rng.randint(first, last)

    def _country_facts(self, country: Entity) -> None:
        rng = self.rng
        self._add(
            country,
            capital=self._any("town"),
            founded=self._year(1120, 1780),
            area=f"{grouped(rng.randint(21, 990) * 100)} square kilometres",
            currency=pick(rng, lists.CURRENCIES),
            export=pick(rng, lists.EXPORTS),
            leader=pick(rng, lists.LEADERS),
            river=self._any("river"),
        )

    def _town_facts(self, town: Entity) -> None:
        rng = self.rng
        self._add(
            town,
            country=self._any("country"),
            river=self._any("river"),
            population=grouped(rng.randint(1100, 98000)),
            founded=self._year(1105, 1790),
            industry=pick(rng, lists.INDUSTRIES),
            landmark=pick(rng, lists.LANDMARKS),
            mayor=self._any("person"),
            twin=self._abroad("town", town),
        )

    def _river_facts(self, river: Entity) -> None:
        rng = self.rng
        self._add(
            river,
            country=self._any("country"),
            length=f"{rng.randint(38, 940)} km",
            source=self._made(("horn", "berg", "tor", "fell"), "Mount {}"),
            mouth=self._made(("", "er", "en"), "Lake {}"),
            tributary=self._made(lists.RIVER_ENDINGS, "the {}"),
            depth=f"{decimal(rng.randint(14, 190) / 10)} m",
        )

    def _person_facts(self, person: Entity) -> None:
        rng = self.rng
        born = self._year(1610, 1930)
        self._add(
            person,
            profession=pick(rng, lists.PROFESSIONS),
            born=born,
            birthplace=self._any("town"),
            died=born + rng.randint(38, 91),
            work=f"The {pick(rng, lists.WORK_ADJECTIVES)} {pick(rng, lists.WORK_NOUNS)}",
            teacher=self._abroad("person", person),
            award=pick(rng, lists.AWARDS),
        )

    def _ship_facts(self, ship: Entity) -> None:
        rng = self.rng
        self._add(
            ship,
            type=pick(rng, lists.SHIP_CLASSES),
            shipyard=self._any("town"),
            launched=self._year(1780, 1950),
            captain=self._any("person"),
            length=f"{decimal(rng.randint(180, 1320) / 10)} m",
            cargo=pick(rng, lists.CARGOES),
            fate=pick(rng, lists.FATES),
        )

    def _species_facts(self, species: Entity) -> None:
        rng = self.rng
        self._add(
            species,
            country=self._any("country"),
            habitat=pick(rng, lists.HABITATS),
            colour=pick(rng, lists.COLOURS),
            diet=pick(rng, lists.DIETS),
            length=f"{decimal(rng.randint(12, 480) / 10)} cm",
            marking=pick(rng, lists.MARKINGS),
            describer=self._any("person"),
        )

    def _battle_facts(self, battle: Entity) -> None:
        rng = self.rng
        self._add(
            battle,
            year=self._year(1240, 1890),
            place=self._any("town"),
            victor=self._any("country"),
            enemy=self._made(("en", "ar", "ic"), "the {} League"),
            commander=self._any("person"),
            losses=grouped(rng.randint(110, 9800)),
            cause=pick(rng, lists.CAUSES),
        )

    def _bridge_facts(self, bridge: Entity) -> None:
        rng = self.rng
        self._add(
            bridge,
            river=self._any("river"),
            town=self._any("town"),
            opened=self._year(1390, 1960),
            length=f"{rng.randint(22, 1400)} m",
            material=pick(rng, lists.MATERIALS),
            architect=self._any("person"),
            arches=rng.randint(3, 41),
        )

    def _mineral_facts(self, mineral: Entity) -> None:
        rng = self.rng
        self._add(
            mineral,
            colour=pick(rng, lists.COLOURS),
            hardness=decimal(rng.randint(10, 95) / 10),
            place=self._any("town"),
            discoverer=self._any("person"),
            discovered=self._year(1720, 1960),
            use=pick(rng, lists.USES),
            crystals=pick(rng, lists.CRYSTALS),
        )

    def _festival_facts(self, festival: Entity) -> None:
        rng = self.rng
        self._add(
            festival,
            town=self._any("town"),
            month=pick(rng, lists.MONTHS),
            begun=self._year(1180, 1940),
            dish=pick(rng, lists.DISHES),
            custom=pick(rng, lists.CUSTOMS),
            patron=self._any("person"),
        )
