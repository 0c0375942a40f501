"""Tables of retrieval: scores by method and length, by task and length, and the answers' log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from ..scaling import format_length
from .result import Row
from .retrieval_score import Score, Setting, settings


@dataclass(frozen=True, kw_only=True)
class ScoreTable:
    """Texts by line and length.

    Args:
        caption: what was measured on what.
        corner: what the lines are: `method` or `task`.
        lines: their names.
        columns: lengths as people write them.
        cells: `scores`, line by line; None where nothing was measured.
        show: a score as a cell's text.
    """

    caption: str
    corner: str
    lines: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Score | None, ...], ...]
    show: Callable[[Score], str]

    def text(self, line: int, column: int) -> str:
        """Of one cell."""
        found = self.cells[line][column]
        return "not run" if found is None else self.show(found)

    def to_markdown(self) -> str:
        """A Markdown table under its caption."""
        rows = [
            self.caption,
            "",
            f"| {self.corner} | {' | '.join(self.columns)} |",
            "|---" * (len(self.columns) + 1) + "|",
        ]
        for number, line in enumerate(self.lines):
            texts = [self.text(number, column) for column in range(len(self.columns))]
            # A pipe ends a Markdown cell even between backticks.
            rows.append(f"| `{line.replace('|', chr(92) + '|')}` | {' | '.join(texts)} |")
        return "\n".join(rows) + "\n"


def retrieval_tables(rows: Iterable[Row]) -> list[ScoreTable]:
    """For each setting: right answers by method and length, their log-probabilities, and, where there are several
    tasks, right answers by task and length for each method."""
    tables = []
    for setting in settings(rows):
        tables += _by_method(setting)
        if len(setting.tasks) > 1:
            tables += [_by_task(setting, rope) for rope in setting.methods]
    return tables


def _by_method(setting: Setting) -> list[ScoreTable]:
    cells = tuple(tuple(setting.score(rope, length) for length in setting.lengths) for rope in setting.methods)
    what = f"{setting.name}, {setting.measured_on}"
    depths = f", depths {', '.join(f'{depth:g}' for depth in setting.depths)} together" if setting.depths else ""
    each = ", each task counting alike" if len(setting.tasks) > 1 else ""
    trials, show = _trials(cells)
    captions = {
        f"Right answers, {what}{depths}{each}; 95% intervals, {trials}.": show,
        f"Log-probability of the right answer, nats a token, {what}{depths}; 95% intervals.": show_nats,
    }
    return [
        ScoreTable(
            caption=caption,
            corner="method",
            lines=tuple(setting.methods),
            columns=tuple(map(format_length, setting.lengths)),
            cells=cells,
            show=show,
        )
        for caption, show in captions.items()
    ]


def _by_task(setting: Setting, rope: str) -> ScoreTable:
    cells = tuple(tuple(setting.score(rope, length, task=task) for length in setting.lengths) for task in setting.tasks)
    trials, show = _trials(cells)
    return ScoreTable(
        caption=f"Right answers by task, {setting.name}, {setting.measured_on}, rope {rope}; 95% intervals, {trials}.",
        corner="task",
        lines=tuple(setting.tasks),
        columns=tuple(map(format_length, setting.lengths)),
        cells=cells,
        show=show,
    )


def _trials(cells: Iterable[Iterable[Score | None]]) -> tuple[str, Callable[[Score], str]]:
    """Where the number of trials is said: in the caption if it is the same in all cells, else in each."""
    numbers = {cell.trials for line in cells for cell in line if cell is not None}
    if len(numbers) == 1:
        return f"n={numbers.pop()} trials in each cell", show_share
    return "n trials", lambda score: f"{show_share(score)}, n={score.trials}"


def show_share(score: Score) -> str:
    """`85% (64-95)`; without the interval where there are too few trials."""
    interval = f" ({100 * score.low:.0f}-{100 * score.high:.0f})" if math.isfinite(score.low) else ""
    return f"{100 * score.mean:.0f}%{interval}"


def show_nats(score: Score) -> str:
    """`-1.204 (-1.310 to -1.101)`; without the interval where there are too few trials."""
    low, high = score.nats_interval
    return f"{score.nats:.3f}" + (f" ({low:.3f} to {high:.3f})" if math.isfinite(low) else "")
