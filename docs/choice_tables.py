"""The table and the plot behind the recommendation, docs/choose.md, from the runs in docs/results."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from position_tables import auto, code, relative

from ropewalk.evals.reports.loss_plots import plot_loss_curve
from ropewalk.evals.runs import compare
from ropewalk.evals.runs.result import Row, Run
from ropewalk.scaling import parse

DOCS = Path(__file__).resolve().parent

SMOLLM2, PLAY, L = "smollm2", "1:41813", 8192  # As You Like It: the play that is long enough for four times L

PLOTTED = ("none", "self-extend:8,window=2k", "dual-chunk", "rerope:4k|logn", "yarn:4")
"""The methods of the plot."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One column of the table: a model at a multiple of its trained length, on the same tokens for every method."""

    title: str
    run: str
    trained_length: int
    times: int
    places: str | None = None

    def rope(self, method: str) -> str:
        """The spec of a method as the rows have it."""
        if method == AUTO:
            return auto(self.trained_length, self.times)
        return str(parse(method.replace("yarn:F", f"yarn:{self.times}"), self.trained_length))


CELLS = (
    Cell(title="SmolLM2, *Dream*, 2x", run=SMOLLM2, trained_length=L, times=2, places="0:32207"),
    Cell(title="*As You Like It*, 2x", run=SMOLLM2, trained_length=L, times=2, places=PLAY),
    Cell(title="4x", run=SMOLLM2, trained_length=L, times=4, places=PLAY),
    Cell(title="small model, 2x", run="choice-tiny", trained_length=256, times=2),
    Cell(title="4x", run="choice-tiny", trained_length=256, times=4),
)

AUTO = "auto"
AUTO_AT = [code(relative(auto(L, times), L)) for times in (2, 4)]

METHODS = (
    AUTO,
    "self-extend:8,window=0.5x",
    "self-extend:8,window=0.25x",
    "self-extend:8,window=0.25x|logn",
    "dual-chunk",
    "dual-chunk|logn",
    "rerope:0.5x",
    "rerope:0.5x|logn",
    "yarn:F",
    "ntk:8",
    "ntk-mixed:4",
)
"""The methods of the table in docs/choose.md; F is the ratio of the lengths."""


def tables() -> dict[str, str]:
    """The block of docs/choose.md."""
    return {"choice": choice_table()}


def draw() -> None:
    """The plot of docs/choose.md."""
    png, _ = plot_loss_curve(_plotted_rows(), _run(SMOLLM2), DOCS / "length")
    png.unlink()


def choice_table() -> str:
    """Every method against the untouched model at its trained length, and how far it was behind the best."""
    found = {(cell, method): _rows(cell).get((cell.rope(method), cell.times)) for cell in CELLS for method in METHODS}
    lines = [
        f"| method | {' | '.join(cell.title for cell in CELLS)} | furthest behind the best |",
        "|---" * (len(CELLS) + 2) + "|",
    ]
    for method in METHODS:
        shown, behind = [], []
        for cell in CELLS:
            row, untouched = found[cell, method], _rows(cell)["none", 1]
            difference = compare.difference(_run(cell.run), row, untouched)
            if row is None or difference is None:
                shown.append("")
                continue
            shown.append(f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})")
            losses = [other["loss"] for one in METHODS if (other := found[cell, one]) is not None]
            behind.append(row["loss"] - min(losses))
        name = f"`auto`: {AUTO_AT[0]}, at 4x {AUTO_AT[1]}" if method == AUTO else code(method)
        lines.append(f"| {name} | {' | '.join(shown)} | {max(behind):.3f} |")
    return "\n".join(lines)


@cache
def _run(name: str) -> Run:
    return Run(DOCS / "results" / name)


@cache
def _rows(cell: Cell) -> dict[tuple[str, float], Row]:
    """The rows of a cell's model on its tokens, by method and multiple of the trained length."""
    return {
        (row["rope"], row["context"] / cell.trained_length): row
        for row in _run(cell.run).rows
        if row.get("protocol") == "fixed-target" and cell.places in (None, row["places"])
    }


def _plotted_rows() -> list[Row]:
    rows = [row for row in _run(SMOLLM2).rows if row["places"] == PLAY and row["rope"] in PLOTTED]
    return sorted(rows, key=lambda row: PLOTTED.index(row["rope"]))
