"""Runs cells: skips what is done, shows time left, keeps what is finished, stops in time."""

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
from .progress import RunProgress, StopNotice
from .result import Run, recipe_key

_PATIENCE = 0.5  # seconds between two looks at what other processes have done
_WIDEST = 48  # letters of a spec on the screen


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


class TimeUp(Exception):
    """A hard time limit has ended a cell."""


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
    is_hard: bool = False,
    rate: float | None = None,
    then: Callable[[Cell], None] = lambda cell: None,
    progress: RunProgress | None = None,
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
            measured so far, is left out. Without a `rate` the first cell always begins.
        is_hard: a cell that is still being measured at the deadline is given up.
        rate: operations a second, as an earlier outcome tells it.
        then: called with each cell that has been measured here.
        progress: the bar of a longer search, on which this is one part; None draws one.

    Raises:
        KeyboardInterrupt: Ctrl-C; its text says what is stored.
    """
    outcome = RunOutcome(found=[c for c in cells if c.is_done(run)])
    todo = [c for c in cells if c not in outcome.found]
    if outcome.found and progress is None:
        _print_found(outcome.found, cells, run, console)
    if not todo:
        return outcome
    with (
        nullcontext(progress) if progress is not None else RunProgress(console, deadline) as bar,
        StopNotice(console, lambda: f"stopping; {_stored(run)}"),
    ):
        work = _Work(model, run, bar, todo, rate, deadline, is_hard)
        try:
            while todo:
                todo = _take(todo, run, work, outcome, then)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{_stored(run)}{_GOES_ON if run.rows else ''}") from None
        finally:
            model.restore()
        outcome.rate = work.rate
    return outcome


_GOES_ON = "; the same command goes on from there"


def _take(
    cells: Sequence[Cell], run: Run, work: _Work, outcome: RunOutcome, then: Callable[[Cell], None]
) -> list[Cell]:
    """Measure the cells that are free and fit in the time; returns those that other processes hold."""
    busy = []
    for cell in cells:
        if tensor_parallel.broadcast_from_rank0(work.is_too_late(cell)):
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


def _print_found(found: Sequence[Cell], cells: Sequence[Cell], run: Run, console: Console) -> None:
    """What an earlier run has measured."""
    names = ", ".join(f"{_shown(cell)} at {cell.label}" for cell in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    console.print(
        f"{len(found)} of {len(cells)} cells were measured before, in {run.folder}: {names}{more}.",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


_NAMED = 6  # cells of an earlier run that are named


def _stored(run: Run) -> str:
    count = len(run.rows)
    if not count:
        return "nothing was finished, so nothing is stored"
    return f"{count} finished row{'s are' if count > 1 else ' is'} stored in {run.folder}"


class _Work:
    """Cells measured one after the other, with a bar, and the rate at which it goes."""

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
        return self._cost.passes(cell.windows)

    def is_too_late(self, cell: Cell) -> bool:
        """True if `cell` would not be done before the deadline."""
        if self._deadline is None:
            return False
        rate, now = self.rate or self._known_rate, time.monotonic()
        return now + (self._operations(cell) / rate if rate else 0.0) > self._deadline or (
            self._is_hard and now >= self._deadline
        )

    @property
    def rate(self) -> float | None:
        """Operations a second of what was measured here."""
        return self._done / self._spent if self._spent else None

    def drop(self, cell: Cell) -> None:
        """Count a cell out that is not measured here."""
        self._left -= self._operations(cell)
        self._show_end(0.0, 0.0)

    def wait(self) -> None:
        """What is left is in the hands of other processes."""
        self._bar.describe("waiting for other processes")
        time.sleep(_PATIENCE)

    def do(self, cell: Cell) -> None:
        """Measure a cell.

        Raises:
            TimeUp: the deadline is hard and has come.
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
        """Show when all would be done, after `done` operations of the present cell in `seconds`."""
        spent = self._spent + seconds
        rate = (self._done + done) / spent if spent and self._done + done else self._known_rate
        self._bar.expect(time.monotonic() + (self._left - done) / rate if rate else None)


def _shown(cell: Cell) -> str:
    """Its scaler in one line: lists of factors make a spec far longer than a screen is wide."""
    spec = str(cell.scaler)
    return spec if len(spec) <= _WIDEST else spec[: _WIDEST - 3] + "..."


def forward_rate(model: MeasuredModel, tokens: int) -> float:
    """Operations a second of one forward pass over `tokens` tokens."""
    started = time.monotonic()
    model.time_forward(tokens)
    return model.cost.step(0, tokens - 1) / (time.monotonic() - started)


def print_plan(model: MeasuredModel, cells: Sequence[Cell], console: Console) -> None:
    """The cells, and about how long they would take, from one short forward pass."""
    cost = model.cost
    rate = forward_rate(model, min(1024, model.trained_length or 1024))
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
