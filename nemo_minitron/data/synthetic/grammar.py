"""A seeded grammar: rules for the narrative around the facts, and how sentences are put together.

A rule's name in braces stands for one of its alternatives. The text is in WikiText's spelling, tokens apart.
"""

import random
from collections.abc import Sequence
from typing import Any

from nemo_minitron.data.synthetic.names import options, pick

RULES: dict[str, Sequence[str]] = {
    "adjective": options(
        "old narrow steep quiet wealthy remote crowded damp pale heavy modest curious careful simple broad sudden "
        "famous forgotten costly bitter gentle restless patient uneven fertile barren handsome plain rough stubborn "
        "hopeful lonely sturdy crooked delicate distant generous hollow idle late merry proud silent sour strict"
    ),
    "people": options(
        "farmers|millers|fishermen|pilgrims|merchants|soldiers|students|carpenters|masons|travellers|shepherds|nuns|"
        "sailors|clerks|weavers|gardeners|teachers|smugglers|beggars|surveyors|musicians|hunters|widows|bakers|pilots"
    ),
    "person": options(
        "a monk|a clerk|a visiting bishop|a retired officer|the innkeeper|a local doctor|a young teacher|the ferryman|"
        "a tax collector|an old forester|the postmaster|a foreign engineer|a blind singer|the harbour master|a notary"
    ),
    "thing": options(
        "bell|cart|wall|ledger|mill|roof|gate|barn|well|rope|letter|lamp|stone|map|net|ladder|chest|oven|plough|clock|"
        "fence|crane|boat|stove|bench|window|tower|signal|drum|mirror|cellar|staircase|furnace|ditch|wheel|kettle"
    ),
    "things": options(
        "bells|carts|walls|ledgers|mills|roofs|gates|barns|wells|ropes|letters|lamps|stones|maps|nets|ladders|chests|"
        "ovens|ploughs|clocks|fences|cranes|boats|stoves|benches|windows|towers|drums|coins|bricks|hides|barrels"
    ),
    "place": options(
        "near the church|behind the market|on the far bank|below the cliff|at the edge of the forest|by the toll house|"
        "in the upper valley|along the old road|outside the walls|under the lime trees|on the common|in the lower town|"
        "beside the quarry|at the crossroads|among the vineyards|on the north slope|in the cloister|"
        "at the ferry landing"
    ),
    "time": options(
        "in spring|in a wet autumn|after the great flood|before the harvest|during the long winter|"
        "at the end of summer|"
        "on market days|in times of war|within a single generation|in most years|after much delay|once a month|"
        "in the early morning|for nearly a century|since the last fire|every second year|in living memory|"
        "towards evening|at low water|in a year of bad crops"
    ),
    "verbed": options(
        "built|sold|repaired|moved|hid|burned|measured|painted|counted|lost|shared|stored|borrowed|defended|rebuilt|"
        "inspected|neglected|traded|carried|guarded|cleaned|described|pulled down|dug up|bought back|gave away"
    ),
    "verb": options(
        "build|sell|repair|move|hide|burn|measure|paint|count|lose|share|store|borrow|defend|rebuild|inspect|neglect|"
        "trade|carry|guard|clean|describe|pull down|dig up|buy back|give away"
    ),
    "participle": options(
        "built|sold|repaired|moved|hidden|burned|measured|painted|counted|lost|shared|stored|borrowed|defended|rebuilt|"
        "inspected|neglected|traded|carried|guarded|cleaned|described|pulled down|dug up|bought back|given away"
    ),
    "number": options(
        "two three four five six seven eight nine ten eleven twelve fifteen twenty thirty forty sixty ninety"
    ),
    "reason": options(
        "because {things} had become too expensive|since the {people} would not {verb} the {things}|"
        "so that the {people} could {verb} the {thing}|although nobody had asked the {people}|"
        "until {person} {verbed} the {thing}|while the {people} waited {place}|as the {people} had feared|"
        "for the {thing} stood {place}|which pleased the {people} more than the {people}|"
        "though {person} had warned against it|so the {things} were {participle} instead"
    ),
    "remark": options(
        "a {adjective} {thing}|the {adjective} {things} {place}|{number} {adjective} {things}|"
        "a {thing} that {person} {verbed} {time}|the {people} and their {adjective} {things}|"
        "a {adjective} and {adjective} {thing}"
    ),
    "opener": options(
        "according to {person} ,|it is said that|most accounts agree that|{time} it was noted that|records show that|"
        "as {person} wrote ,|it is well known that|it may surprise visitors that|a later edition adds that|"
        "older maps confirm that|schoolbooks repeat that|by all accounts ,|as far as is known ,|"
        "among {people} it is common knowledge that|{person} once reported that|in short ,|"
        "to this day it is taught that"
    ),
    "joint": options(
        ", and|, while|; moreover ,|, although|; at the same time ,|, whereas|; in addition ,|, and it is certain that|"
        "; besides ,|, and most sources add that"
    ),
    "tail": options(
        "which the {people} {time} still {verb}|a matter that {person} {verbed} {time}|"
        "as {person} {verbed} in a {thing}|"
        "to the surprise of the {people}|much to the relief of {person}|as may be read on a {thing} {place}|"
        "a point on which the {people} and the {people} agree|despite the {adjective} {things} {place}"
    ),
    "any_filler": options(
        "{time} the {people} {verbed} the {adjective} {things} {place} , {reason}|"
        "{person} {verbed} {remark} {place} , {reason}|the {things} {place} were {participle} {time} , {reason}|"
        "of the {number} {things} {place} , only {number} were ever {participle}|"
        "{remark} was all that the {people} found {place}|there was {remark} {place} , and {remark} beside it|"
        "neither the {people} nor {person} could {verb} the {thing} {time}|"
        "what the {people} {verbed} {time} , the {people} {verbed} {place}|"
        "a {adjective} dispute about the {thing} went on {time} , {reason}|"
        "it took the {people} {number} weeks to {verb} the {things} , {reason}"
    ),
    "country": options(
        "the {adjective} provinces of {n} are ruled from {adjective} castles , {reason}|"
        "roads in {n} are {adjective} , and the {people} {verb} their {things} {place}|"
        "an old law of {n} allows {people} to {verb} {number} {things} {time}|{any_filler}|{any_filler}"
    ),
    "town": options(
        "the {adjective} streets of {s} lead to a {thing} {place}|{time} the {people} of {s} {verbed} {remark}|"
        "a {adjective} suburb of {s} lies {place} , {reason}|the council of {s} {verbed} the {things} {time}|"
        "a fire destroyed {number} houses in {s} , {reason}|{any_filler}|{any_filler}"
    ),
    "river": options(
        "{time} {s} is {adjective} and carries {things} downstream|{people} {verb} {things} along {s} {time}|"
        "a {adjective} weir holds {s} back {place} , {reason}|floods on {s} have {participle} {number} {things}|"
        "{any_filler}|{any_filler}"
    ),
    "life": options(
        "{time} {s} {verbed} {remark} , {reason}|{s} kept a {adjective} {thing} {place}|"
        "letters of {n} mention {remark}|as a child {s} {verbed} {things} {place}|"
        "{p} friends , mostly {people} , thought {s} {adjective}|{any_filler}|"
        "{s} travelled with {people} for {number} months , {reason}"
    ),
    "ship": options(
        "the crew of {s} {verbed} the {things} {time} , {reason}|on one voyage {s} met {number} {adjective} boats|"
        "{time} {s} lay in dock , {reason}|the {adjective} deck of {s} was {participle} {time}|{any_filler}"
    ),
    "species": options(
        "{time} {s} becomes {adjective} and hides {place}|a female of {n} lays {number} eggs {place}|"
        "{people} once {verbed} {s} for its skin , {reason}|the call of {n} resembles a {adjective} {thing}|"
        "{any_filler}"
    ),
    "battle": options(
        "before {n} both armies {verbed} the {things} {place}|{adjective} fighting went on {place} , {reason}|"
        "{time} {number} companies of {people} joined in|a {adjective} fog covered the {things} {place}|{any_filler}"
    ),
    "bridge": options(
        "{time} {people} pay a toll on {s}|{s} was {participle} {number} times , {reason}|"
        "a {adjective} chapel once stood on {s}|a {thing} hangs in the middle of {s} , {reason}|{any_filler}"
    ),
    "mineral": options(
        "{people} used to {verb} {n} without knowing its worth|a {adjective} seam of {n} was {participle} {time}|"
        "heated {n} gives off a {adjective} smell|{n} is often mistaken for a {adjective} kind of glass|{any_filler}"
    ),
    "festival": options(
        "{time} the {people} {verb} the {things} for {n}|{n} was forbidden for {number} years , {reason}|"
        "at {n} {person} gives the {people} {remark}|a {adjective} tune is played at {n}|{any_filler}"
    ),
}  # fmt: skip


class Slots(dict):
    """Fills the slots of a template: bound names first, then a random alternative of the rule of that name."""

    def __init__(self, rng: random.Random, rules: dict[str, Sequence[str]], **bound: Any):
        super().__init__(bound)
        self.rng, self.rules = rng, rules

    def __missing__(self, name: str) -> str:
        return pick(self.rng, self.rules[name]).format_map(self)

    def say(self, name: str) -> str:
        return self.__missing__(name)


def capitalised(clause: str) -> str:
    return clause[0].upper() + clause[1:]
