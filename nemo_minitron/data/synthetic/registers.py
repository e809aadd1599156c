"""The broad domain: news, letters, dialogues, instructions, diaries, stories, notices and lessons.

They speak about the world of the articles, among much else, in ordinary spelling and without the articles' structure.
"""

import random
from collections.abc import Callable, Iterator

from nemo_minitron.data.synthetic.articles import Writer
from nemo_minitron.data.synthetic.facts import FACTS
from nemo_minitron.data.synthetic.grammar import RULES, Slots, capitalised
from nemo_minitron.data.synthetic.names import MONTHS, Names, options, pick
from nemo_minitron.data.synthetic.world import Entity, Fact, World

SPELLING = (
    (" @,@ ", ","), (" @.@ ", "."), (" @-@ ", "-"), (" ,", ","), (" .", "."), (" ;", ";"), (" :", ":"), (" ?", "?"),
    (" !", "!"), (" 's", "'s"), (" '", "'"),
)  # fmt: skip

SPOKEN = RULES | {
    "opener": options(
        "my aunt says that|I read that|everybody here knows that|I am told that|it turns out that|"
        "the paper says that|I had forgotten that|I am sure that|they say|somebody told me that|as you know ,"
    ),
    "tail": options(
        "or so I heard|if I am not mistaken|which I did not believe at first|and {person} agrees|"
        "at least that is what {person} told us|which made the {people} laugh|believe it or not"
    ),
    "joint": options(", and|, but|, so|; anyway ,|, and I think|, and they say"),
    "weather": options(
        "it rained all day|the sun came out {time}|there was frost on the {things}|the wind blew the {things} about|"
        "fog lay {place}|it was too hot to {verb} anything|snow fell {place}|the air smelled of {things}"
    ),
    "mood": options("tired|glad|worried|calm|cross|hungry|hopeful|bored|grateful|uneasy|cheerful|homesick"),
    "greeting": options("Dear|My dear|Dearest|Good|Dear old"),
    "closing": options(
        "Yours ever ,|With love ,|Your friend ,|Write soon ,|Best wishes ,|In haste ,|Until we meet ,|Warmly ,"
    ),
    "chat": options(
        "we {verbed} the {things} {place}|I still have to {verb} the {thing} , {reason}|"
        "{weather} , so I {verbed} the {thing}|"
        "I feel {mood} today|the {people} next door {verbed} our {thing}|please bring the {adjective} {thing}|"
        "{person} asked about you {time}|I dreamed of a {adjective} {thing}|{weather} , and everyone was {mood}|"
        "yesterday {person} {verbed} {remark} , {reason}"
    ),
    "report": options(
        "{people} {verbed} {number} {things} {place} on Monday , {reason}|"
        "{person} told reporters that the {thing} was {adjective}|"
        "no {people} were hurt , officials said|the council will {verb} the {thing} next week , {reason}|"
        "a crowd of {people} gathered {place}|repairs to the {thing} will cost {number} thousand|"
        "police are looking for {number} missing {things}|the {adjective} {thing} will stay closed for {number} days"
    ),
    "step": options(
        "{verb} the {thing} until it looks {adjective}|put {number} {things} {place}|"
        "wait {number} minutes , then {verb} the {things}|"
        "never {verb} a {adjective} {thing}|if the {thing} is {adjective} , {verb} it again|ask {person} for a {thing}|"
        "take {number} {adjective} {things} and {verb} them|keep the {things} away from the {people}"
    ),
    "event": options(
        "the {adjective} one {verbed} a {thing} {place}|nobody knew who had {participle} the {things}|"
        "{weather} , and the {people} went home|{person} gave her {remark}|he {verbed} the {thing} and said nothing|"
        "they walked for {number} days and {verbed} {things}|she was {mood} , {reason}|"
        "{place} they met {person} with {remark}|then the {thing} fell down , {reason}"
    ),
    "reply": options(
        "Really ? I thought the {people} {verbed} it|I see . And the {thing} ?|That is {adjective} news|"
        "You sound {mood}|"
        "Who told you that ? {capital_person} ?|Well , {chat}|I am not so sure , {reason}|"
        "Let us {verb} the {thing} first"
    ),
    "capital_person": options(
        "The innkeeper|A monk|Your brother|The ferryman|My sister|The teacher|Old Hanna|The notary"
    ),
    "headline": options(
        "{capital_people} {verb} {adjective} {thing}|{capital_people} wait for {things}|News from the council|"
        "{capital_people} and {people} at odds|The week in brief"
    ),
    "capital_people": options("Farmers|Millers|Pilots|Students|Bakers|Teachers|Sailors|Clerks|Masons|Hunters|Weavers"),
}  # fmt: skip


class Speaker(Writer):
    """A writer with the rules of everyday speech."""

    def rule(self, name: str) -> str:
        return Slots(self.rng, SPOKEN).say(name)

    def said(self, name: str, sentences: int) -> str:
        return " ".join(self.sentence(self.rule(name)) for _ in range(sentences))

    def told(self, name: str, sentences: int) -> str:
        """As `said`, without anything around the sentences."""
        return " ".join(f"{capitalised(self.rule(name))} ." for _ in range(sentences))

    def facts(self, entity: Entity, count: int) -> list[Fact]:
        known = entity.facts + entity.mentions
        return self.rng.sample(known, min(count, len(known)))


def spelled(text: str) -> str:
    """WikiText's spelling turned into the ordinary one."""
    for tokens, ordinary in SPELLING:
        text = text.replace(tokens, ordinary)
    return text


def _news(speaker: Speaker, entity: Entity) -> str:
    facts = speaker.paragraph(speaker.facts(entity, 3), entity, 0)
    date = f"{pick(speaker.rng, MONTHS)} {speaker.rng.randint(1, 28)}"
    headline = capitalised(speaker.rule("headline"))
    return f"{headline}\n\n{date} . {speaker.said('report', 3)}\n\n{facts} {speaker.said('report', 2)}\n"


def _letter(speaker: Speaker, entity: Entity) -> str:
    style = NAMES.style(speaker.rng)
    to, by = ("".join(pick(speaker.rng, part) for part in (*style[:2], ("na", "ro", "le", "to"))) for _ in range(2))
    about = speaker.paragraph(speaker.facts(entity, 3), entity, 0)
    lines = (
        f"{speaker.rule('greeting')} {to.capitalize()} ,",
        f"{speaker.said('chat', 3)}",
        f"{about} {speaker.said('chat', 2)}",
        f"{speaker.rule('closing')}\n{by.capitalize()}",
    )
    return "\n\n".join(lines) + "\n"


def _dialogue(speaker: Speaker, entity: Entity) -> str:
    one, two = speaker.rng.sample(("Anna", "Bruno", "Clara", "David", "Edith", "Felix", "Greta", "Hugo", "Ida"), 2)
    lines = []
    for fact in speaker.facts(entity, 4):
        if fact.entity is entity and speaker.rng.random() < 0.5:
            lines.append(f"{one} : {FACTS[entity.kind][fact.attribute][0].format(n=entity.name)}")
            lines.append(f"{two} : {speaker.sentence(speaker.clause(fact))}")
        else:
            lines.append(f"{one} : {speaker.sentence(speaker.clause(fact))}")
            lines.append(f"{two} : {speaker.rule('reply')} .")
        if speaker.rng.random() < 0.4:
            lines.append(f"{one} : {speaker.said('chat', 1)}")
    return "\n".join(lines) + "\n"


def _instructions(speaker: Speaker, entity: Entity) -> str:
    goal = speaker.rule("verb"), speaker.rule("adjective"), speaker.rule("thing")
    steps = [f"{number} . {speaker.told('step', 2)}" for number in range(1, speaker.rng.randint(5, 8))]
    note = speaker.paragraph(speaker.facts(entity, 1), entity, 0)
    return "How to {} a {} {}\n\n".format(*goal) + "\n".join(steps) + f"\n\nNote : {note}\n"


def _diary(speaker: Speaker, entity: Entity) -> str:
    month, day = pick(speaker.rng, MONTHS), speaker.rng.randint(1, 20)
    entries = []
    for number in range(3):
        facts = speaker.paragraph(speaker.facts(entity, 1), entity, 0)
        entries.append(f"{day + 3 * number} {month}\n{speaker.said('chat', 2)} {facts} {speaker.said('chat', 1)}")
    return "\n\n".join(entries) + "\n"


def _story(speaker: Speaker, entity: Entity) -> str:
    start = f"Once , {speaker.rule('time')} , there lived {speaker.rule('person')} with {speaker.rule('remark')} ."
    aside = speaker.paragraph(speaker.facts(entity, 2), entity, 0)
    return (
        f"{start} {speaker.said('event', 4)}\n\n{speaker.said('event', 2)} {aside} {speaker.said('event', 2)}\n\n"
        f"{speaker.said('event', 3)} And that was the end of it .\n"
    )


def _guide(speaker: Speaker, entity: Entity) -> str:
    facts = speaker.facts(entity, 5)
    tour = speaker.paragraph(facts[:3], entity, 1)
    more = speaker.paragraph(facts[3:], entity, 1) if facts[3:] else speaker.said("chat", 2)
    return f"Welcome to this short tour . {speaker.told('step', 1)}\n\n{tour}\n\n{more} {speaker.said('chat', 1)}\n"


def _lesson(speaker: Speaker, entity: Entity) -> str:
    pairs = []
    for fact in speaker.rng.sample(entity.facts, 4):
        question = FACTS[entity.kind][fact.attribute][0].format(n=entity.name)
        pairs.append(f"Question : {question}\nAnswer : {capitalised(speaker.clause(fact))} .")
    return f"{speaker.said('chat', 1)}\n\n" + "\n".join(pairs) + f"\n\n{speaker.said('event', 2)}\n"


NAMES = Names()
REGISTERS: tuple[Callable[[Speaker, Entity], str], ...] = (
    _news, _letter, _dialogue, _instructions, _diary, _story, _guide, _lesson,
)  # fmt: skip


def pieces(world: World, rng: random.Random) -> Iterator[str]:
    """Texts without end; each round touches every thing of the world once, in a random register."""
    speaker = Speaker(rng)
    while True:
        for entity in rng.sample(world.entities, len(world.entities)):
            yield spelled(pick(rng, REGISTERS)(speaker, entity))
