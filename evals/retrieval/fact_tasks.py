"""Retrieval tasks whose answer is a name or a place, among the sentences of a text: facts that belong together, and a
needle whose meaning is asked for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar

from ..data import Text
from .haystack import boundary, drawn_anew, sentences, stretch, with_needles
from .task import Draft, Place, Task

NAMES = (
    "Kevin Natasha Dmitri Yusuf Ingrid Brandon Chloe Tyler Svetlana Hiroshi Priya Kwame Lindsay Gunnar Fatima Diego "
    "Wendy Bruno Tamika Stanley Yolanda Vikram Heidi Preston Jessica Mateusz Shannon Rajesh Felicity Douglas"
)

PLACES = (
    "kitchen library museum garage cinema bakery laboratory pharmacy supermarket aquarium gymnasium greenhouse "
    "cafeteria bathroom classroom hallway basement attic workshop restaurant airport stadium warehouse casino"
)

THINGS = (
    "umbrella laptop suitcase football newspaper flashlight teapot backpack camera guitar bicycle notebook telescope "
    "wallet hairbrush saucepan thermometer calculator microscope skateboard"
)


def fresh(random: Random, words: str, count: int, text: Text) -> list[str]:
    """`count` different words of `words` that do not occur in the text.

    Raises:
        DataError: the text has too many of the words.
    """
    chosen: list[str] = []
    for _ in range(count):
        chosen.append(drawn_anew(lambda: random.choice(words.split()), chosen, text))
    return chosen


def match_first_of(written: str, answers: Sequence[str], known: str) -> float:
    """1 if the first of the words `known` in `written` is the only answer, else 0."""
    (answer,) = answers
    found = re.search(rf"\b({'|'.join(known.split())})\b", written, re.IGNORECASE)
    return float(found is not None and found[0].lower() == answer.lower())


def _hay(random: Random, units: int, text: Text, words: Sequence[str]) -> list[str]:
    hay = stretch(text, random.randrange(len(sentences(text))), units)
    assert not any(word.lower() in unit.lower() for unit in hay for word in words), f"the haystack has one of {words}"
    return hay


class _InText(Task):
    """A task whose haystack is a text."""

    new_tokens: ClassVar[int] = 16

    @property
    def needs_text(self) -> bool:
        return True

    def most(self, place: Place) -> int | None:
        return None if place.text is None else len(sentences(place.text))


_PERSONS, _CARRIED, _VISITED, _EVENTS = 3, 2, 6, 14


@dataclass(frozen=True)
class _Story:
    """What persons did, the question about it, and the number of the first fact that the answer needs."""

    facts: tuple[str, ...]
    question: str
    answer: str
    first: int


@dataclass(frozen=True, kw_only=True)
class FactsNoise(_InText):
    """Where a person or a thing is, from facts among the sentences of a text: the idea of BABILong
    (arXiv 2406.10149), with templates of our own.

    Three persons move between six places, and take two things along. With one needed fact the
    question asks where a person is, with two where a thing is, with three where a thing was before.
    Their names occur nowhere in the text. The recorded depth is that of the first needed fact. A
    unit is a sentence of the text. An answer is right if it is the first place that is written.

    Args:
        needed: facts that the answer needs.
    """

    name: str
    needed: int
    chance: ClassVar[float] = 1 / _VISITED

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.text is not None
        groups = [(NAMES, _PERSONS), (THINGS, _CARRIED), (PLACES, _VISITED)]
        persons, things, places = (fresh(random, words, count, place.text) for words, count in groups)
        story = None
        while story is None:
            story = _story(random, persons, things, places, self.needed)
        shares = sorted(random.random() for _ in story.facts)
        hay = _hay(random, units, place.text, [*persons, *things, *places])
        needles = [(boundary(hay, share), f"{fact} ") for share, fact in zip(shares, story.facts, strict=True)]
        body, starts = with_needles(hay, needles)
        opening = (
            f"Facts about {persons[0]}, {persons[1]} and {persons[2]} are hidden within the following text, in the "
            "order in which they happened. Read them carefully. I will ask a question about them afterwards.\n"
        )
        return Draft(
            prompt=f"{opening}{body}\nQuestion: {story.question} Answer: In the",
            answers=(story.answer,),
            target=f" {story.answer}",
            needle=len(opening) + starts[story.first],
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_first_of(written, answers, PLACES)


def _story(
    random: Random, persons: Sequence[str], things: Sequence[str], places: Sequence[str], needed: int
) -> _Story | None:
    """A story, or None if it has no question that needs so many facts."""
    facts: list[str] = []
    at: dict[str, tuple[str, int]] = {}  # of a person: the place, and the number of the fact that says so
    stays: dict[str, list[tuple[str, int]]] = {}  # the same of a thing that was picked up, for all of its places
    taken: dict[str, int] = {}  # the fact that says who picked it up
    told: dict[str, int] = {}  # the last fact that names it
    holder: dict[str, str | None] = {}
    for number in range(_EVENTS):
        person = persons[number] if number < len(persons) else random.choice(persons)
        held = [thing for thing in taken if holder[thing] == person]
        acts = [("go", "")] * 2 + [("put", thing) for thing in held]
        acts += [("pick", thing) for thing in things if thing not in taken]
        act, thing = random.choice(acts) if person in at else ("go", "")
        if act == "go":
            goal = random.choice([place for place in places if person not in at or place != at[person][0]])
            at[person] = (goal, number)
            for thing in held:
                stays[thing].append(at[person])
            facts.append(f"{person} {random.choice(['went', 'moved', 'walked'])} to the {goal}.")
        elif act == "pick":
            taken[thing] = told[thing] = number
            holder[thing], stays[thing] = person, [at[person]]
            facts.append(f"{person} picked up the {thing}.")
        else:
            told[thing], holder[thing] = number, None
            facts.append(f"{person} put down the {thing}.")
    if needed == 1:
        place, fact = at[person := random.choice(persons)]
        return _Story(tuple(facts), f"Where is {person}?", place, fact)
    carried = [thing for thing in taken if len(stays[thing]) > 1]
    if not carried:
        return None
    thing = random.choice(carried)
    (before, earlier), (last, fact) = stays[thing][-2:]
    if needed == 2:
        return _Story(tuple(facts), f"Where is the {thing}?", last, min(fact, told[thing]))
    if last in [place for place, _ in stays[thing][:-1]]:
        return None
    return _Story(tuple(facts), f"Where was the {thing} before the {last}?", before, min(earlier, taken[thing]))


PAIRS = (
    ("{} plays first violin in an orchestra.", "Who makes music for a living?"),
    ("{} bakes sourdough every morning at four.", "Who sells fresh bread?"),
    ("{} rents an attic beside the Eiffel Tower.", "Who can be found in France?"),
    ("{} injects insulin before each meal.", "Who suffers from diabetes?"),
    ("{} has not touched beef or pork since childhood.", "Who is a vegetarian?"),
    ("{} steers a container ship through the Atlantic.", "Who is a sailor?"),
    ("{} sneezes whenever a cat is near.", "Who has an allergy?"),
    ("{} has climbed Mount Everest twice.", "Who knows Nepal from a journey?"),
    ("{} teaches algebra and geometry to teenagers.", "Who is good at mathematics?"),
    ("{} replaces worn brakes and leaking radiators.", "Who is a car mechanic?"),
    ("{} fills cavities and fits braces.", "Who is a dentist?"),
    ("{} studies the moons of Jupiter through a telescope.", "Who is an astronomer?"),
    ("{} waters the tulips and prunes the roses.", "Who is a gardener?"),
    ("{} won the final at Wimbledon.", "Who is famous for tennis?"),
    ("{} flies passengers between Tokyo and Sydney.", "Who is a pilot?"),
    ("{} defends suspects in court.", "Who is a lawyer?"),
    ("{} has published three novels about vampires.", "Who is an author?"),
    ("{} milks forty cows before dawn.", "Who owns a farm?"),
    ("{} looks down on the Brandenburg Gate from the balcony at home.", "Who can be met in Berlin?"),
    ("{} pushes letters and parcels through every door of the street.", "Who is employed by the post office?"),
    ("{} searches the luggage of arriving travellers for smuggled cigarettes.", "Who is a customs officer?"),
    ("{} trims fringes and dyes curls.", "Who is a hairdresser?"),
    ("{} puts out burning houses.", "Who is a firefighter?"),
    ("{} grew up near the beaches of Rio de Janeiro.", "Who comes from Brazil?"),
    ("{} understands others only by sign language.", "Who is deaf?"),
    ("{} never leaves home without a wheelchair.", "Who is unable to walk?"),
    ("{} photographs wild zebras and giraffes every summer.", "Who goes to Africa for the animals?"),
    ("{} carves statues out of marble.", "Who is a sculptor?"),
    ("{} looks after patients on the night shift.", "Who is a nurse?"),
    ("{} hands out aspirin and cough syrup.", "Who runs a pharmacy?"),
    ("{} has a beard down to the belt.", "Who does not shave?"),
    ("{} descends to coral reefs with an oxygen tank.", "Who is a diver?"),
)
"""Needles and questions that share no word but those of grammar. No needle answers another's question."""

_NEEDLES = 4


@dataclass(frozen=True)
class NeedleMeaning(_InText):
    """The person whom a question means, where question and needle share no word: the idea of NoLiMa
    (arXiv 2502.05167), with pairs of our own.

    Four needles about four persons lie among the sentences of a text, the one that is asked for at
    the depth, the others anywhere. The names occur nowhere in the text. A unit is a sentence of the
    text. An answer is right if it is the first name that is written.
    """

    name: str = "needle-meaning"
    has_depth: ClassVar[bool] = True
    chance: ClassVar[float] = 1 / _NEEDLES

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.text is not None and place.depth is not None
        names = fresh(random, NAMES, _NEEDLES, place.text)
        pairs = random.sample(PAIRS, _NEEDLES)
        shares = [place.depth, *(random.random() for _ in pairs[1:])]
        hay = _hay(random, units, place.text, names)
        said = [f"{needle.format(name)} " for (needle, _), name in zip(pairs, names, strict=True)]
        needles = sorted((boundary(hay, share), text) for share, text in zip(shares, said, strict=True))
        body, starts = with_needles(hay, needles)
        opening = "Read the following text carefully. I will ask a question about a person in it afterwards.\n"
        start = starts[[text for _, text in needles].index(said[0])]
        return Draft(
            prompt=f"{opening}{body}\nQuestion: {pairs[0][1]} Answer: The name of that person is",
            answers=(names[0],),
            target=f" {names[0]}",
            needle=len(opening) + start,
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_first_of(written, answers, NAMES)
