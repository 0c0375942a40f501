"""Measure the cells of a run: skip finished ones, show the remaining time, store each row, respect
a deadline."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from ...engine import tensor_parallel
from ..models.measured import MeasuredModel
from .cell import Cell
from .progress import RunProgress
from .result import Run, recipe_key

_PATIENCE = 0.5  # seconds between two checks for rows of other processes
_WIDEST = 48  # characters of a spec on the screen


@dataclass(kw_only=True)
class RunOutcome:
    """The cells of a run by what happened to them.

    Attributes:
        measured: measured now.
        already_done: stored before, or measured by another process.
        left_out: not measured for lack of time.
        rate: operations per second of the cells that were measured now; None if there were none.
    """

    measured: list[Cell] = field(default_factory=list)
    already_done: list[Cell] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)
    rate: float | None = None


class TimeUp(Exception):
    """A cell was stopped at a hard deadline."""


def new_console() -> Console:
    """The terminal on which progress is drawn. It is quiet in all processes except the first."""
    return Console(quiet=not tensor_parallel.is_first())


def measure_all(
    model: MeasuredModel,
    cells: Sequence[Cell],
    run: Run,
    console: Console,
    *,
    deadline: float | None = None,
    is_hard: bool = False,
    rate: float | None = None,
    is_wanted: Callable[[Cell], bool] = lambda cell: True,
    then: Callable[[Cell], None] = lambda cell: None,
    progress: RunProgress | None = None,
) -> RunOutcome:
    """Measure `cells` in order, with a progress bar. Returns when all are done, here or in other
    processes.

    Processes with the same cells and folder share the work: each cell is measured by the process
    that claims it first. If a process dies, another one takes over its cell. Processes that split
    one model measure every cell together, each with its own run (`open_run_of_rank`).

    Args:
        model: its scaler is restored at the end.
        cells: finished ones are skipped.
        run: where rows are written, each as soon as it is finished.
        console: where the bar is drawn.
        deadline: `time.monotonic()` value. A cell that would not finish before it, at the rate so
            far, is left out. Without a `rate` the first cell always begins.
        is_hard: a cell that is still running at the deadline is stopped and left out.
        rate: operations per second of an earlier outcome.
        is_wanted: asked when it is a cell's turn; a cell that is not wanted is left out.
        then: called with each cell that was measured here.
        progress: the bar of a longer search that this is a part of. None: a new bar is drawn.

    Raises:
        KeyboardInterrupt: Ctrl-C. Its text says what is stored.
    """
    outcome = RunOutcome(already_done=[c for c in cells if c.is_done(run)])
    todo = [c for c in cells if c not in outcome.already_done]
    if outcome.already_done:
        _print_already_done(outcome.already_done, cells, run, console)
    if not todo:
        return outcome
    with nullcontext(progress) if progress is not None else RunProgress(console, deadline) as bar:
        work = _Work(model, run, bar, todo, rate, deadline, is_hard)
        try:
            while todo:
                todo = _take(todo, run, work, outcome, is_wanted, then)
        except KeyboardInterrupt:
            run.refresh()  # the interrupt may have come between a row's line and its place in `run`
            raise KeyboardInterrupt(f"{_stored(run)}{_CONTINUES if run.rows else ''}") from None
        finally:
            model.restore()
        outcome.rate = work.rate
    return outcome


_CONTINUES = "; the same command continues from there"


def _take(
    cells: Sequence[Cell],
    run: Run,
    work: _Work,
    outcome: RunOutcome,
    is_wanted: Callable[[Cell], bool],
    then: Callable[[Cell], None],
) -> list[Cell]:
    """Measure the cells that are free and fit in the time. Returns those that other processes hold."""
    busy = []
    for cell in cells:
        if tensor_parallel.broadcast_from_rank0(work.is_too_late(cell)) or not is_wanted(cell):
            outcome.left_out.append(cell)
            work.drop(cell)
            continue
        with run.claim(recipe_key(cell.row_recipes()[0])) as is_ours:
            if not (is_ours and cell.is_ready(run)):
                busy.append(cell)
            elif cell.is_done(run):
                outcome.already_done.append(cell)
                work.drop(cell)
            else:
                try:
                    work.do(cell)
                except TimeUp:
                    outcome.left_out.append(cell)
                    continue
                outcome.measured.append(cell)
                then(cell)
    if busy and len(busy) == len(cells):
        work.wait()
    return busy


def _print_already_done(already_done: Sequence[Cell], cells: Sequence[Cell], run: Run, console: Console) -> None:
    """Print which cells an earlier run has measured."""
    names = ", ".join(f"{_shown(cell)} at {cell.label}" for cell in already_done[:_NAMED])
    more = f" and {len(already_done) - _NAMED} more" if len(already_done) > _NAMED else ""
    console.print(
        f"{len(already_done)} of {len(cells)} cells were measured before, in {run.folder}: {names}{more}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


_NAMED = 6  # cells of an earlier run that are printed


def _stored(run: Run) -> str:
    count = len(run.rows)
    if not count:
        return "nothing was finished, so nothing is stored"
    return f"{count} finished row{'s are' if count > 1 else ' is'} stored in {run.folder}"


class _Work:
    """Measures cells one after the other, with a bar, and keeps the rate."""

    def __init__(
        self,
        model: MeasuredModel,
        run: Run,
        bar: RunProgress,
        cells: Sequence[Cell],
        rate: float | None,
        deadline: float | None,
        is_hard: bool,
    ) -> None:
        self._model, self._run, self._bar, self._known_rate = model, run, bar, rate
        self._cost, self._deadline, self._is_hard = model.cost, deadline, is_hard
        self._left = sum(map(self._operations, cells))
        self._done, self._spent = 0.0, 0.0  # operations, seconds

    def _operations(self, cell: Cell) -> float:
        return self._cost.passes(cell.pass_lengths)

    def is_too_late(self, cell: Cell) -> bool:
        """True if `cell` would not finish before the deadline."""
        if self._deadline is None:
            return False
        rate, now = self.rate or self._known_rate, time.monotonic()
        return now + (self._operations(cell) / rate if rate else 0.0) > self._deadline or (
            self._is_hard and now >= self._deadline
        )

    @property
    def rate(self) -> float | None:
        """Operations per second of the cells that were measured here."""
        return self._done / self._spent if self._spent else None

    def drop(self, cell: Cell) -> None:
        """Remove a cell from the remaining work: it is not measured here."""
        self._left -= self._operations(cell)
        self._show_end(0.0, 0.0)

    def wait(self) -> None:
        """Wait for other processes, which measure the remaining cells."""
        self._bar.describe("waiting for other processes")
        time.sleep(_PATIENCE)

    def do(self, cell: Cell) -> None:
        """Measure a cell.

        Raises:
            TimeUp: the deadline is hard and has passed.
        """
        self._bar.describe(f"{_shown(cell)} at {cell.label}")
        self._show_end(0.0, 0.0)
        started = last = time.monotonic()
        total, done = self._operations(cell), 0.0

        def advance(past: int, tokens: int) -> None:
            nonlocal done, last
            now = time.monotonic()
            done, step, last = done + self._cost.step(past, tokens), now - last, now
            self._show_end(done, now - started)
            is_late = self._deadline is not None and now + step > self._deadline
            if self._is_hard and is_late and done < 0.999 * total:
                raise TimeUp

        try:
            rows = cell.measure(self._model.under(cell.scaler), self._run, advance)
        finally:
            seconds = time.monotonic() - started
            self._left -= total
            self._spent, self._done = self._spent + seconds, self._done + min(done, total)
        self._bar.print(f"  {_shown(cell):<18} {cell.label:>6}  {cell.outcome(rows)}  [dim]{seconds:.0f} s[/dim]")

    def _show_end(self, done: float, seconds: float) -> None:
        """Show when all cells will be done, after `done` operations of the current cell in
        `seconds`."""
        spent = self._spent + seconds
        rate = (self._done + done) / spent if spent and self._done + done else self._known_rate
        self._bar.expect(time.monotonic() + (self._left - done) / rate if rate else None)


def _shown(cell: Cell) -> str:
    """The scaler of a cell, cut to one line. A spec with a list of factors can be wider than the
    screen."""
    spec = str(cell.scaler)
    return spec if len(spec) <= _WIDEST else spec[: _WIDEST - 3] + "..."


def forward_rate(model: MeasuredModel, tokens: int) -> float:
    """Operations per second of one forward pass over `tokens` tokens, the last of them scored."""
    model.time_forward(2)  # what is done once only
    started = time.monotonic()
    model.time_forward(tokens)
    return model.cost.step(0, tokens - 1) / (time.monotonic() - started)


def print_plan(model: MeasuredModel, cells: Sequence[Cell], console: Console) -> None:
    """Print the cells, and about how long they would take, estimated from one short forward pass."""
    cost = model.cost
    rate = forward_rate(model, min(1024, model.trained_length or 1024))
    table = Table("scaler", "context", "windows", "tokens fed", "about")
    for cell in cells:
        seconds = cost.passes(cell.pass_lengths) / rate
        table.add_row(
            str(cell.scaler),
            cell.label,
            str(len(cell.pass_lengths)),
            str(sum(cell.pass_lengths)),
            f"{seconds:.0f} s",
        )
    console.print(table)
    total = sum(cost.passes(c.pass_lengths) for c in cells) / rate
    longest = max(max(cell.pass_lengths) for cell in cells)
    console.print(
        f"{len(cells)} cells, about {total / 60:.1f} minutes; {model.needs(longest)}. Nothing was measured (--dry-run)."
    )
