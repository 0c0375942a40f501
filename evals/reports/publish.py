"""From a run's rows to what people read: tables, plots, the report, and the last lines on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ..runs import compare
from ..runs.cell import Cell
from ..runs.result import Run
from .findings import findings
from .plots import plot_run
from .report import Passage, write_report
from .retrieval_findings import retrieval_findings
from .retrieval_plots import plot_retrieval
from .table import write_tables


def publish(run: Run, *, title: str, passages: Sequence[Passage] = ()) -> list[Path]:
    """Write tables, plots and report of everything in `run`; returns the files, the report first."""
    plots = [*plot_run(run), *plot_retrieval(run)]
    tables = write_tables(run)
    report = write_report(
        run, run.folder / "report.html", title=title, story=story(run), passages=passages, plots=plots
    )
    return [report, *tables, *plots]


def story(run: Run) -> list[str]:
    """What the rows say, in sentences."""
    sentences = retrieval_findings(run.rows)
    return sentences if sentences and not compare.settings(run.rows) else [*findings(run), *sentences]


def print_results(run: Run, files: Sequence[Path], left_out: Sequence[Cell], console: Console) -> None:
    """The table, what was learnt, what was left out, and where the files are."""
    console.print(Markdown((run.folder / "table.md").read_text(encoding="utf-8")))
    console.print()
    for sentence in story(run):
        console.print(f"• {sentence}", highlight=False, markup=False)
    print_left_out(left_out, console)
    print_files(files, console)


def print_left_out(left_out: Sequence[Cell], console: Console) -> None:
    """What there was no time for, if anything."""
    if left_out:
        cells = ", ".join(f"{cell.scaler} at {cell.label}" for cell in left_out)
        console.print(
            f"\nLeft out for lack of time: {cells}. Run the same command again to measure them.",
            highlight=False,
            markup=False,
        )


def print_files(files: Sequence[Path], console: Console) -> None:
    """Where the files are."""
    console.print("\nFiles:")
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True, markup=False)
