"""What a command is waiting for, shown on standard error once it takes more than a second."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress

    from ..engine.model import Model

_PATIENCE = 1.0  # seconds before anything is shown


@contextlib.contextmanager
def waiting(what: str, total: int | None = None, unit: str = "tokens") -> Iterator[Callable[[int], None]]:
    """A line that says what is being done, gone at the end; with `total`, how much, how fast and the time left.

    Nothing is shown before a second has passed, where standard error is no terminal, and by other processes than the
    first one of a launch.

    Args:
        total: of `unit`, to be done.

    Yields:
        Call it with how much was done since the last call.
    """
    if not sys.stderr.isatty() or os.environ.get("RANK", "0") != "0":
        yield lambda _: None
        return
    progress = _line(total is not None, unit)
    task = progress.add_task(what, total=total)
    timer = threading.Timer(_PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield lambda count: progress.advance(task, count)
    finally:
        timer.cancel()
        timer.join()
        progress.stop()


def _line(counts: bool, unit: str) -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        SpinnerColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.text import Text

    class Rate(ProgressColumn):
        """How many a second since the beginning, and the time left, once something is done."""

        def render(self, task: Task) -> Text:
            if not task.completed or not task.elapsed or task.remaining is None:
                return Text("")
            rate = task.completed / task.elapsed
            shown = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
            return Text(f"{shown}/s, {timedelta(seconds=round(task.remaining / rate))} left")

    columns: list[Any] = [SpinnerColumn(), TextColumn("{task.description}", markup=False)]
    if counts:
        columns += [BarColumn(), TextColumn(f"{{task.completed:,.0f}} of {{task.total:,.0f}} {unit}"), Rate()]
    else:
        columns.append(TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True, redirect_stdout=False)


def fetch_model(name: str) -> None:
    """Download or convert a model where that is needed, which has a bar of its own.

    Raises:
        AssetError: there is no such model, or it cannot be fetched.
    """
    with waiting("starting"):
        from ..engine.checkpoints.source import resolve

    resolve(name)


def load_model(name: str, **settings: Any) -> Model:
    """`ropewalk.load`, with a word about what is waited for.

    Raises:
        RopewalkError: as `load`.
    """
    fetch_model(name)
    with waiting(f"loading {Path(name).name}"):
        from ..engine.load import load

        return load(name, **settings)
