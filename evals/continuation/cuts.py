"""The prompts that ways of continuing are compared on: texts, and the kinds of places at which they are cut."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...tokenizer_tools import cuts
from ...tokenizer_tools.cuts import Cut
from ...tokenizer_tools.vocabulary import Vocabulary
from ..data import Text, load_text

_USUAL = (
    ("shakespeare", cuts.ANYWHERE),
    ("code", cuts.ANYWHERE),
    ("shakespeare", cuts.AFTER_SPACE),
    ("code", cuts.INSIDE),
    ("chinese", cuts.INSIDE),
)
_OF_ONE_TEXT = (cuts.ANYWHERE, cuts.AFTER_SPACE, cuts.INSIDE)


@dataclass(frozen=True, kw_only=True)
class CutText:
    """One text, cut at one kind of place."""

    text: Text
    kind: str
    cuts: tuple[Cut, ...]

    @property
    def name(self) -> str:
        """Such as "code, any character"."""
        return f"{Path(self.text.name).name}, {self.kind}"


def draw_all(vocabulary: Vocabulary, text: str | None, count: int, seed: int) -> list[CutText]:
    """Cuts to compare on, fewer where a text has not so many places of a kind.

    Args:
        text: as `load_text` takes it; None is English, code and Chinese.
        count: cuts of each kind in each text.
        seed: of their places.

    Raises:
        DataError: a text is too short to cut.
    """
    wanted = _USUAL if text is None else tuple((text, kind) for kind in _OF_ONE_TEXT)
    found = []
    for name, kind in wanted:
        loaded = load_text(name)
        drawn = cuts.draw(vocabulary, "\n\n".join(loaded.documents), kind, count, seed)
        found.append(CutText(text=loaded, kind=kind, cuts=tuple(drawn)))
    return found
