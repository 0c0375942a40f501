"""The first table of docs/results.md: every method in all models beyond their lengths, from docs/results."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import position_tables
from position_tables import auto, code, relative

from ropewalk.evals.runs.compare import UNTOUCHED, difference
from ropewalk.evals.runs.result import Row, Run
from ropewalk.scaling import format_length

RESULTS = Path(__file__).resolve().parent / "results"

MODELS = {"smollm2-135m": "SmolLM2", "gemma3-270m": "Gemma", "qwen2.5-coder-0.5b": "Qwen"}

METHODS = (UNTOUCHED, "auto", "dual-chunk", "rerope:0.5x|logn", "yarn:F", "linear:F", "ntk:F", "ntk-mixed:F")
"""The methods of the table. F is the ratio of the lengths."""


@dataclass(frozen=True, order=True)
class Column:
    """A text that a model reads up to a multiple of its trained length, or a task there; `times` is 0 at others."""

    times: int
    kind: str
    model: int
    what: str
    length: int

    @property
    def title(self) -> str:
        return f"{list(MODELS.values())[self.model]}, {self.what}, {format_length(self.length)}"


def across() -> str:
    """Losses beside those of the model that stays within its length, and passkeys found."""
    cells: dict[Column, dict[str, str]] = {}
    for column, method, cell in (*_positions(), *_places(), *_passkeys()):
        cells.setdefault(column, {})[method] = cell
    columns = sorted(column for column in cells if column.times >= 2)
    lines = [f"| method | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in METHODS:
        shown = " | ".join(cells[column].get(method, "") for column in columns)
        lines.append(f"| {code(method)} | {shown} |")
    return "\n".join(lines)


def _positions() -> Iterator[tuple[Column, str, str]]:
    """The last part of every pass over a text, beside the untouched model on the cut text."""
    for folder in (position_tables.RUN, position_tables.FOUR_TIMES, position_tables.QWEN):
        for row, change in position_tables.costs(folder):
            if row["bucket_end"] == row["context"]:
                yield _column(row, row["text"], "loss"), _method(row), f"{change.mean:+.3f}"


def _places() -> Iterator[tuple[Column, str, str]]:
    """The places of docs/results/models, beside the untouched model at its trained length on the same tokens."""
    run = Run(RESULTS / "models")
    bases = {
        (row["model"], row["tokens_sha256"]): row
        for row in run.rows
        if row["rope"] == UNTOUCHED and row["context"] == row["trained_length"]
    }
    for row in run.rows:
        base = bases.get((row["model"], row["tokens_sha256"]))
        change = None if base is None else difference(run, row, base)
        if change is not None:
            yield _column(row, row["text"], "loss"), _method(row), f"{change.mean:+.3f}"


def _passkeys() -> Iterator[tuple[Column, str, str]]:
    found: dict[tuple[Column, str], list[Row]] = {}
    for row in Run(RESULTS / "retrieval").rows:
        if row["task"] == "passkey":
            found.setdefault((_column(row, "passkeys", "task"), _method(row)), []).append(row)
    for (column, method), rows in found.items():
        yield column, method, f"{round(sum(row['correct'] for row in rows))} of {len(rows)}"


def _column(row: Row, what: str, kind: str) -> Column:
    times, rest = divmod(row["context"], row["trained_length"])
    model = list(MODELS).index(row["model"])
    return Column(times=0 if rest else times, kind=kind, model=model, what=what, length=row["context"])


def _method(row: Row) -> str:
    """The name of a row's method in `METHODS`."""
    trained, times = row["trained_length"], row["context"] // row["trained_length"]
    rope = row["rope"]
    if rope == auto(trained, max(times, 2)):
        return "auto"
    return re.sub(rf"^(yarn|linear|ntk|ntk-mixed):{times}$", r"\1:F", relative(rope, trained))
