"""Tables of the report, as its template sees them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table cell as the template sees it: a main line, small lines below it, a CSS class, a tooltip."""

    main: str
    small: tuple[str, ...] = ()
    css: str = ""
    tip: str = ""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as the template sees it; the rows are (name, cells), and `corner` says what the names are."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Shown]]]
    corner: str = "method"

    def to_markdown(self) -> str:
        """A Markdown table under its title and note."""
        lines = [f"{self.title}. {self.note}", "", f"| {self.corner} | {' | '.join(self.columns)} |"]
        lines.append("|---" * (len(self.columns) + 1) + "|")
        for name, cells in self.rows:
            texts = [" ".join((cell.main, *(f"({line})" for line in cell.small))) for cell in cells]
            # A pipe ends a Markdown cell even between backticks.
            lines.append(f"| `{name.replace('|', chr(92) + '|')}` | {' | '.join(texts)} |")
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class Section:
    """Tables of one setting, and how their rows were measured, by name."""

    caption: str
    grids: list[Grid]
    method: dict[str, str]


NOTHING = Shown(main="–", css="none")
"""A cell that was not measured."""


def signed(value: float) -> str:
    """`+0.012`, with a true minus sign."""
    return f"{value:+.3f}".replace("-", "−")


def interval(low: float, high: float) -> str:
    """`0.012 to 0.034`."""
    return f"{low:.3f} to {high:.3f}".replace("-", "−")


def span(values: Sequence[int]) -> str:
    """`1,024`, or `512 to 2,048` of sorted values."""
    if not values:
        return "no"
    return f"{values[0]:,}" if len(values) == 1 else f"{values[0]:,} to {values[-1]:,}"
