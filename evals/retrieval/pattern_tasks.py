"""Retrieval tasks that continue a pattern of the prompt: the labels of many examples, and a copy of words."""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from random import Random
from typing import Any, ClassVar

from .haystack import WORDS_VERSION, boundary, plain_words, with_needles
from .task import Draft, Place, Task

_KINDS = (
    "otter badger falcon lizard hamster salmon donkey rabbit sparrow dolphin beetle leopard turtle giraffe hedgehog "
    "pelican squirrel panther walrus raccoon",
    "omelette lasagna pancake sausage porridge noodle burrito yogurt muffin pretzel waffle risotto sandwich meatball "
    "dumpling pudding biscuit cheesecake hamburger pizza",
    "sweater jacket trousers mitten scarf blouse cardigan sandal overcoat pajamas necktie stocking raincoat bonnet "
    "tuxedo sneaker apron skirt glove poncho",
    "plumber dentist carpenter lawyer surgeon librarian electrician accountant waiter journalist butcher architect "
    "tailor teacher nurse farmer barber pharmacist mechanic secretary",
    "violin trumpet clarinet piano saxophone banjo cello trombone accordion harmonica ukulele flute mandolin "
    "xylophone oboe guitar bassoon harp tuba piccolo",
    "bicycle tractor helicopter submarine ambulance scooter minivan locomotive canoe motorcycle airplane sailboat "
    "truck tram bulldozer kayak ferry taxi limousine glider",
    "armchair bookcase wardrobe sofa dresser cupboard nightstand footstool bench cradle sideboard couch desk stool "
    "hammock mattress cabinet recliner bookshelf loveseat",
    "hammer screwdriver wrench chisel pliers sickle shovel crowbar mallet drill hatchet trowel wheelbarrow hacksaw "
    "pickaxe sledgehammer rake spanner tweezers scissors",
)
"""Nouns of one kind each."""

_LABELS = 4  # kinds, and so labels, of a prompt
_LETTERS = "".join(letter for letter in string.ascii_uppercase if letter not in "AI")  # which are words too


@dataclass(frozen=True)
class ManyShot(Task):
    """The label of a word after many examples of words with labels: many-shot in-context learning
    (Agarwal et al., arXiv 2404.11018).

    Four kinds of things are drawn, such as animals and tools, and a letter for each, so the letters
    mean nothing outside the prompt. A unit is a line: an adjective, a noun of some kind, and the
    letter of the kind. The noun of the last line is in no other line. An answer is right if its
    letter is the likeliest of the four.
    """

    name: str = "many-shot"
    new_tokens: ClassVar[int] = 4
    least: ClassVar[int] = 2 * _LABELS
    chance: ClassVar[float] = 1 / _LABELS

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"words": WORDS_VERSION}

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        labels = random.sample(_LETTERS, _LABELS)
        nouns = [kind.split() for kind in random.sample(_KINDS, _LABELS)]
        asked = random.randrange(_LABELS)
        noun = nouns[asked].pop(random.randrange(len(nouns[asked])))
        first = [*range(_LABELS)]  # no label is missing
        random.shuffle(first)

        def phrase(noun: str) -> str:
            return f"{random.choice(plain_words('adjective'))} {noun}:"

        question = phrase(noun)
        lines = []
        for number in range(units):
            kind = first[number] if number < _LABELS else random.randrange(_LABELS)
            lines.append(f"{phrase(random.choice(nouns[kind]))} {labels[kind]}\n")
        assert not any(f" {noun}:" in line for line in lines), f"an example has the noun {noun} of the question"
        return Draft(
            prompt="".join(lines) + question,
            answers=(labels[asked],),
            target=f" {labels[asked]}",
            choices=tuple(f" {label}" for label in sorted(labels)),
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        letter = re.search(r"\b[A-Z]\b", written)
        return float(letter is not None and letter[0] == answers[0])


_CUE = 4  # words of the passage that come again at the end
_COPIED = 12  # words that follow them


@dataclass(frozen=True)
class NgramCopy(Task):
    """Continue a passage of random words that comes again: copying an n-gram, as induction heads do
    (Olsson et al., arXiv 2209.11895).

    The prompt is a list of random nouns, one a line. Its last four are the first four of a passage of 16 that
    lies at the depth; no noun of the passage occurs elsewhere. The score of an answer is the share of the other
    12 that are written before the first mistake. A unit is a noun.
    """

    name: str = "ngram-copy"
    new_tokens: ClassVar[int] = 64
    has_depth: ClassVar[bool] = True

    @property
    def settings(self) -> dict[str, Any]:
        return super().settings | {"words": WORDS_VERSION, "layout": "list"}  # rows of the first layout have none

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.depth is not None
        passage = random.sample(plain_words("noun"), _CUE + _COPIED)
        others = sorted({*plain_words("noun")} - {*passage})
        hay = [f"- {word}\n" for word in random.choices(others, k=units)]
        lines = [f"- {word}\n" for word in passage]
        assert not {*hay} & {*lines}, f"the haystack contains a word of {passage}"
        body, (start,) = with_needles(hay, [(boundary(hay, place.depth), "".join(lines))])
        copied = "\n- ".join(passage[_CUE:])
        return Draft(
            prompt="".join([body, "\n", *lines[:_CUE], "-"]), answers=(copied,), target=f" {copied}", needle=start
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        expected, words = (re.findall(r"[a-z]+", text.lower()) for text in (answers[0], written))
        right = takewhile(lambda pair: pair[0] == pair[1], zip(expected, words, strict=False))
        return sum(1 for _ in right) / len(expected)
