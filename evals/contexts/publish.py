"""From the rows of `facts` and `endless` to a table and a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from ...engine.storage import write_atomic
from ..reports.publish import print_files, print_left_out
from ..runs.cell import Cell
from ..runs.result import Row, Run


def publisher(
    name: str,
    own: Callable[[Sequence[Row]], Sequence[Row]],
    to_markdown: Callable[[Sequence[Row]], str],
    plot: Callable[[Sequence[Row], Path], list[Path]],
) -> Callable[[Run, Sequence[Cell], Console], None]:
    """What a command does with its run when it is measured.

    Args:
        name: of the plots' files.
        own: the rows of a run that the table and the plot are of.
    """

    def finish(run: Run, left_out: Sequence[Cell], console: Console) -> None:
        files = []
        if own(run.rows):
            table, markdown = run.folder / "table.md", to_markdown(run.rows)
            write_atomic(table, markdown.encode())
            console.print(Markdown(markdown))
            files = [table, *plot(run.rows, run.folder / name)]
        print_left_out(left_out, console)
        print_files(files, console)

    return finish
