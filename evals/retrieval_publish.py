"""Tables, plots and sentences of a retrieval run, as files and on the screen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from .cell import Cell
from .result import Run, write_atomic
from .retrieval_findings import retrieval_findings
from .retrieval_plots import plot_retrieval
from .retrieval_table import retrieval_tables
from .table import to_csv

_TABLES = "retrieval.md"


def publish_retrieval(run: Run) -> list[Path]:
    """Write retrieval.md, retrieval.csv (every trial) and the plots; returns the files."""
    markdown, csv_file = run.folder / _TABLES, run.folder / "retrieval.csv"
    write_atomic(markdown, "\n".join(table.to_markdown() for table in retrieval_tables(run.rows)).encode())
    write_atomic(csv_file, to_csv([row for row in run.rows if "suite" in row]).encode())
    return [markdown, csv_file, *plot_retrieval(run)]


def print_retrieval(run: Run, files: Sequence[Path], left_out: Sequence[Cell], console: Console) -> None:
    """The tables, what was learnt, what was left out, and where the files are."""
    console.print(Markdown((run.folder / _TABLES).read_text(encoding="utf-8")))
    for sentence in retrieval_findings(run.rows):
        console.print(f"• {sentence}", highlight=False, markup=False)
    if left_out:
        cells = ", ".join(f"{cell.scaler} at {cell.label}" for cell in left_out)
        console.print(f"\nLeft out for lack of time: {cells}. Run the same command again to measure them.")
    console.print("\nFiles:")
    for path in files:
        console.print(f"  {path}", highlight=False, soft_wrap=True)
