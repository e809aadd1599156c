"""Names and values of the invented world, made from syllables and word lists."""

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def options(text: str) -> tuple[str, ...]:
    """The alternatives of a list written as one string, with bars between them, or else spaces."""
    return tuple(text.split("|" if "|" in text else None))


ONSETS = options("b br c cl d dr f fl g gr h j k kr l m n p pr r s sk st t th tr v w z")
NUCLEI = options("a ae ai e ea ei i ia o oa oe u ua")
CODAS = options("l ld ll m n nd ng r rd rk rn s sk st t v")
TOWN_ENDINGS = options("ford holm stad wick mere haven by gard dale port minster crag")
RIVER_ENDINGS = options("el is ane ow ey ette ur in")
COUNTRY_ENDINGS = options("ia or mark land une avia esse oth")
WOMEN_ENDINGS = options("a e ine ira elle is")
MEN_ENDINGS = options("an or eth in o us")
SURNAME_ENDINGS = options("sk ner well mann ton ard ovic sen ley quist")
MINERAL_ENDINGS = ("ite", "lite", "ine", "spar")

INDUSTRIES = options(
    "glass blowing|salt refining|wool weaving|rope making|paper milling|clock making|tin smelting|leather tanning|"
    "barrel making|brewing|printing|brick making|herring curing|candle making|lace making|bell founding|"
    "saddle making|lens grinding|cheese making|timber sawing|slate quarrying|dye making|pottery|silk spinning"
)
LANDMARKS = options(
    "a leaning bell tower|a covered market|a domed observatory|a round library|a granite lighthouse|"
    "an octagonal chapel|a botanical garden|a tidal mill|a marble theatre|a copper @-@ roofed town hall|"
    "a ruined castle|a seven @-@ arched aqueduct|a wooden cathedral|a museum of maps|a walled orchard|"
    "a public bath house|a vaulted granary|a sunken amphitheatre"
)
PROFESSIONS = options(
    "painter|botanist|composer|engineer|poet|surgeon|astronomer|sculptor|historian|chemist|cartographer|"
    "playwright|geologist|novelist|architect|physician|philosopher|mathematician|explorer|organist"
)
AWARDS = options(
    "the Silver Compass|the Laurel of Merit|the Academy Medal|the Queen 's Ribbon|the Order of the Oak|"
    "the Founders ' Prize|the Gold Quill|the Harbour Cross|the Star of Learning|the Lantern Prize"
)
SHIP_CLASSES = options(
    "schooner|frigate|paddle steamer|ice breaker|coastal ferry|whaler|survey vessel|barque|gunboat|lightship|"
    "mail packet|dredger|training ship|cable layer"
)
FATES = options(
    "broken up for scrap|lost in a gale|turned into a museum|sold to a timber company|sunk by a mine|"
    "wrecked on a reef|burned at its moorings|converted into a hospital|abandoned in the ice|"
    "scuttled to block a harbour|rebuilt as a floating school|captured and renamed"
)
CARGOES = options("coal|grain|timber|wine|letters|copper ore|wool|salted fish|machine parts|ceramics|sugar|cotton")
CREATURES = options(
    "marsh finch|tree frog|river otter|stag beetle|reed warbler|cave spider|mountain hare|sand lizard|tern|"
    "dwarf owl|water vole|snow moth|pond turtle|crested newt|heath viper|mud crab|fruit bat|field cricket"
)
HABITATS = options(
    "peat bogs|salt marshes|alpine meadows|beech forests|limestone caves|gravel banks|coastal dunes|"
    "abandoned orchards|reed beds|pine plantations|rocky slopes|flooded quarries|heathland|deep gorges"
)
DIETS = options(
    "snails|juniper berries|mayflies|pine seeds|earthworms|moss|small crustaceans|fallen fruit|ants|lichen|"
    "beetle larvae|clover|fish eggs|grass roots"
)
COLOURS = options(
    "grey|crimson|pale blue|olive green|black|golden|white|violet|rust red|amber|silver|dark brown|turquoise|pink"
)
MARKINGS = options(
    "a white throat|a striped back|a yellow eye ring|a forked tail|dark wing tips|a red crest|spotted flanks|"
    "a pale collar|banded legs|a notched ear"
)
MATERIALS = options("granite|cast iron|oak|red brick|steel|limestone|sandstone|reinforced concrete|larch|basalt")
USES = options(
    "glazes for pottery|lamp mantles|grinding wheels|white paint|fertiliser|watch bearings|optical glass|"
    "matches|cement|signal flares|roofing|soap"
)
CRYSTALS = [
    "cubes",
    "needles",
    "thin plates",
    "hexagonal prisms",
    "fibrous masses",
    "octahedra",
    "rounded grains",
    "twinned blades",
]
MONTHS = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
]
DISHES = options(
    "plum dumplings|smoked eel|honey cakes|barley soup|pickled herring|chestnut bread|roast goose|apple fritters|"
    "mushroom pies|rye pancakes|spiced cheese|lentil stew|pear tart|fish broth"
)
CUSTOMS = options(
    "a procession of lanterns|a race of flat boats|the burning of a straw horse|a contest of bell ringers|"
    "the blessing of the nets|a dance on stilts|the weighing of the mayor|a market of masks|"
    "a tug of war across the water|the crowning of a shepherd"
)
CURRENCIES = options("crown|florin|talent|mark|shilling|ducat|groat|real|penning|guilder|lira|denar")
EXPORTS = options(
    "amber|oats|cut timber|mineral water|horses|linen|dried apples|marble|tobacco|clocks|porcelain|hops|"
    "flax|olive oil|wax|iron nails"
)
LEADERS = options("president|regent|chancellor|grand duke|governor|first minister|queen|speaker")
CAUSES = options(
    "a dispute over salt duties|the seizure of a convoy|a broken marriage contract|control of a mountain pass|"
    "unpaid tolls|the murder of an envoy|a quarrel about fishing rights|the succession to a vacant throne"
)
WORK_ADJECTIVES = options("Quiet Long Broken Distant Hollow Second Burning Patient Northern Glass Unwritten Narrow")
WORK_NOUNS = options(
    "Harbour Winter Meadow Ladder Orchard Voyage Mirror Tide Garden Hour Bridge Shepherd Lantern Shore"
)
SHIP_NOUNS = options("Heron Tide Anchor Falcon Star Meridian Swallow Compass Gull Lantern Dolphin Sovereign Wanderer")
SHIP_ADJECTIVES = options("Silver Morning Northern Bold Fair Distant Amber Swift Royal Western Faithful Bright")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    return options[int(rng.random() * len(options))]


def grouped(number: int) -> str:
    """12345 as WikiText writes it: ``12 @,@ 345``."""
    return f"{number:,}".replace(",", " @,@ ")


def decimal(number: float) -> str:
    """3.5 as WikiText writes it: ``3 @.@ 5``."""
    return f"{number:.1f}".replace(".", " @.@ ")


def article_of(noun: str) -> str:
    """The indefinite article that goes with a noun."""
    return "an" if noun[0] in "aeiou" else "a"


class Names:
    """Makes names that sound alike within a region, each of them once."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def style(self, rng: random.Random) -> tuple[list[str], ...]:
        """The sounds of a region's language."""
        return rng.sample(ONSETS, 12), rng.sample(NUCLEI, 5), rng.sample(CODAS, 7)

    def make(self, rng: random.Random, style: tuple, endings: Sequence[str], form: str = "{}") -> str:
        onsets, nuclei, codas = style
        while True:
            stem = pick(rng, onsets) + pick(rng, nuclei) + pick(rng, codas)
            if rng.random() < 0.3:
                stem = pick(rng, onsets) + pick(rng, nuclei) + stem
            name = form.format((stem + pick(rng, endings)).capitalize())
            if name not in self._used:
                self._used.add(name)
                return name

    def unique(self, rng: random.Random, form: str, *lists: Sequence[str]) -> str:
        """A name put together from word lists; numbered like a ship's successor when the lists are exhausted."""
        for _ in range(8):
            name = form.format(*(pick(rng, options) for options in lists))
            if name not in self._used:
                break
        base, number = name, 2
        while name in self._used:
            name, number = f"{base} {number}", number + 1
        self._used.add(name)
        return name
