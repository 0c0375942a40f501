"""Tables as the report's template sees them, as Markdown, and for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A table cell as the template sees it: a main line, small lines below it, a CSS class, a
    tooltip."""

    main: str
    small: tuple[str, ...] = ()
    css: str = ""
    tip: str = ""

    @property
    def text(self) -> str:
        """In one line: `85% (64-95), n=20`."""
        head = f"{self.main} ({self.small[0]})" if self.small else self.main
        return ", ".join((head, *self.small[1:]))


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A table as the template sees it; the rows are (name, cells), and `corner` says what the names
    are."""

    title: str
    note: str
    columns: tuple[str, ...]
    rows: list[tuple[str, list[Shown]]]
    corner: str = "method"

    def to_markdown(self) -> str:
        """A Markdown table under its title and note."""
        rows = [(name, [cell.text for cell in cells]) for name, cells in self.rows]
        return markdown_table(f"{self.title}. {self.note}", self.columns, rows, self.corner)

    def to_table(self, columns: Sequence[str], rows: int) -> Table:
        """The first `rows` of some columns for a terminal."""
        table = Table(title=self.title, title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column(self.corner, no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        chosen = [self.columns.index(column) for column in columns]
        for name, cells in self.rows[:rows]:
            texts = [" ".join((cells[at].main, *(f"({line})" for line in cells[at].small))) for at in chosen]
            table.add_row(escape(name), *map(escape, texts))
        return table


@dataclass(frozen=True, kw_only=True)
class Section:
    """Tables of one group, and how their rows were measured, by name."""

    caption: str
    grids: list[Grid]
    method: dict[str, str]


NOTHING = Shown(main="–", css="none")
"""A cell that has no value."""

NOT_RUN = Shown(main="not run", css="none")
"""A cell that was not measured."""


def markdown_table(
    caption: str, columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], corner: str = "method"
) -> str:
    """A Markdown table under its caption; the rows are (name, texts), and `corner` says what the
    names are."""
    lines = [caption, "", f"| {corner} | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, texts in rows:
        cells = [f"`{name}`", *texts]
        # A pipe ends a Markdown cell even between backticks.
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


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
