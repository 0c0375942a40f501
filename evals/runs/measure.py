"""Runs cells: skips what is done, shows time left, keeps what is finished, stops in time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ...engine import tensor_parallel
from ..models.measured import MeasuredModel
from .cell import Cell
from .result import Run, recipe_key

_PATIENCE = 0.5  # seconds between two looks at what other processes have done
_WIDEST = 48  # letters of a spec on the screen
_COLUMNS = (
    SpinnerColumn(),
    TextColumn("{task.description}"),
    BarColumn(),
    TextColumn("{task.percentage:>3.0f}%"),
    TimeElapsedColumn(),
    TextColumn("left"),
    TimeRemainingColumn(elapsed_when_finished=False),
)


@dataclass(kw_only=True)
class RunOutcome:
    """What a run did: cells measured now, found done before, and left out for lack of time.

    Attributes:
        rate: operations a second of what was measured now; None if nothing was.
    """

    measured: list[Cell] = field(default_factory=list)
    found: list[Cell] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)
    rate: float | None = None


def new_console() -> Console:
    """Where progress is drawn: the terminal, for the first of several processes."""
    return Console(quiet=not tensor_parallel.is_first())


def measure_all(
    model: MeasuredModel,
    cells: Sequence[Cell],
    run: Run,
    console: Console,
    *,
    deadline: float | None = None,
    rate: float | None = None,
    is_essential: Callable[[Cell], bool] = lambda cell: False,
    then: Callable[[Cell], None] = lambda cell: None,
) -> RunOutcome:
    """Measure `cells` in order, with a progress bar; returns when all are done, here or by others.

    Processes that are given the same cells and folder share them: the process that claims a cell
    first measures it, and another one takes over the cell of a process that died. Processes that
    split one model measure every cell together, each with a run of its own (`open_run`).

    Args:
        model: its scaler is put back at the end.
        cells: finished ones are skipped.
        run: where rows go, each as soon as it is finished.
        console: where the bar is drawn.
        deadline: `time.monotonic()` value; a cell that would not finish before it, at the rate
            measured so far, is left out. Without a `rate` the first cell always runs.
        rate: operations a second, as an earlier outcome tells it.
        is_essential: cells that run whatever the time.
        then: called with each cell that has been measured here.
    """
    outcome = RunOutcome(found=[c for c in cells if c.is_done(run)])
    todo = [c for c in cells if c not in outcome.found]
    if not todo:
        return outcome
    with Progress(*_COLUMNS, console=console, speed_estimate_period=300) as bar:
        work = _Work(model, run, bar, sum(model.cost.passes(cell.windows) for cell in todo), rate)
        try:
            while todo:
                busy = []
                for cell in todo:
                    too_late = deadline is not None and work.would_end(cell) > deadline
                    if tensor_parallel.broadcast_from_rank0(too_late) and not is_essential(cell):
                        outcome.left_out.append(cell)
                        work.drop(cell)
                        continue
                    with run.claim(recipe_key(cell.row_recipes()[0])) as is_ours:
                        if not (is_ours and cell.is_ready(run)):
                            busy.append(cell)
                        elif cell.is_done(run):
                            outcome.found.append(cell)
                            work.drop(cell)
                        else:
                            work.do(cell)
                            outcome.measured.append(cell)
                            then(cell)
                if len(busy) == len(todo):
                    work.wait()
                todo = busy
        finally:
            model.restore()
        outcome.rate = work.rate
    return outcome


class _Work:
    """Cells measured one after the other, with a bar, and the rate at which it goes."""

    def __init__(self, model: MeasuredModel, run: Run, bar: Progress, total: float, rate: float | None) -> None:
        self._model, self._run, self._bar, self._known_rate = model, run, bar, rate
        self._cost, self._total = model.cost, total
        self._done, self._spent = 0.0, 0.0  # operations, seconds
        self._task = bar.add_task("", total=total)

    def would_end(self, cell: Cell) -> float:
        """When `cell` would be done, as `time.monotonic()` tells it."""
        rate = self.rate or self._known_rate
        return time.monotonic() + (self._cost.passes(cell.windows) / rate if rate else 0.0)

    @property
    def rate(self) -> float | None:
        """Operations a second of what was measured here."""
        return self._done / self._spent if self._spent else None

    def drop(self, cell: Cell) -> None:
        """Count a cell out that is not measured here."""
        self._total -= self._cost.passes(cell.windows)
        self._bar.update(self._task, total=self._total)

    def wait(self) -> None:
        """What is left is in the hands of other processes."""
        self._bar.update(self._task, description="waiting for other processes")
        time.sleep(_PATIENCE)

    def do(self, cell: Cell) -> None:
        """Measure a cell."""
        self._bar.update(self._task, description=f"{_shown(cell)} at {cell.label}")
        started = time.monotonic()
        rows = cell.measure(
            self._model.under(cell.scaler),
            self._run,
            lambda past, n: self._bar.advance(self._task, self._cost.step(past, n)),
        )
        seconds = time.monotonic() - started
        self._spent, self._done = self._spent + seconds, self._done + self._cost.passes(cell.windows)
        self._bar.console.print(
            f"  {_shown(cell):<18} {cell.label:>6}  {cell.outcome(rows)}  [dim]{seconds:.0f} s[/dim]"
        )


def _shown(cell: Cell) -> str:
    """Its scaler in one line: lists of factors make a spec far longer than a screen is wide."""
    spec = str(cell.scaler)
    return spec if len(spec) <= _WIDEST else spec[: _WIDEST - 3] + "..."


def print_plan(model: MeasuredModel, cells: Sequence[Cell], console: Console) -> None:
    """The cells, and about how long they would take, from one short forward pass."""
    cost = model.cost
    probe = min(1024, model.trained_length or 1024)
    started = time.monotonic()
    model.time_forward(probe)
    rate = cost.step(0, probe - 1) / (time.monotonic() - started)
    table = Table("scaler", "context", "windows", "tokens fed", "about")
    for cell in cells:
        seconds = cost.passes(cell.windows) / rate
        table.add_row(
            str(cell.scaler),
            cell.label,
            str(len(cell.windows)),
            str(sum(cell.windows)),
            f"{seconds:.0f} s",
        )
    console.print(table)
    total = sum(cost.passes(c.windows) for c in cells) / rate
    longest = max(max(cell.windows) for cell in cells)
    console.print(
        f"{len(cells)} cells, about {total / 60:.1f} minutes; {model.needs(longest)}. Nothing was measured: this was "
        "--dry-run."
    )
