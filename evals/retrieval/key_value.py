"""Key-value retrieval: one pair of many in a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import ClassVar
from uuid import UUID

from .task import Draft, Place, Task, match_first


@dataclass(frozen=True)
class KeyValue(Task):
    """The value of one key in a JSON object of random UUIDs (Liu et al., "Lost in the Middle", arXiv 2307.03172).

    A unit is a pair. The value must be the first word with a digit that the model writes.
    """

    name: str = "kv"
    new_tokens: ClassVar[int] = 48
    has_depth: ClassVar[bool] = True

    def draft(self, random: Random, units: int, place: Place) -> Draft:
        assert place.depth is not None
        pairs = [(random_uuid(random), random_uuid(random)) for _ in range(units)]
        key, value = pairs[0]
        assert sum(key in pair for pair in pairs) == 1, f"the key {key} occurs twice"
        index = round(place.depth * (units - 1))
        pairs[0], pairs[index] = pairs[index], pairs[0]
        lines = [f'"{name}": "{content}"' for name, content in pairs]
        opening = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
        body = ",\n ".join(lines)
        return Draft(
            prompt=f'{opening}{body}}}\n\nKey: "{key}"\nCorresponding value:',
            answers=(value,),
            target=f' "{value}"',
            needle=len(opening) + sum(len(line) + 3 for line in lines[:index]),
        )

    def mark(self, written: str, answers: Sequence[str]) -> float:
        return match_first(written, answers)


def random_uuid(random: Random) -> str:
    """A version 4 UUID."""
    return str(UUID(int=random.getrandbits(128), version=4))
