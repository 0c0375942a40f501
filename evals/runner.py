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

from ..engine.api import Model
from .cell import Cell, Cost
from .result import Run


@dataclass(kw_only=True)
class Outcome:
    """What a run did: cells measured now, found done before, and left out for lack of time."""

    measured: list[Cell] = field(default_factory=list)
    found: list[Cell] = field(default_factory=list)
    left_out: list[Cell] = field(default_factory=list)


def measure_all(
    model: Model,
    cells: Sequence[Cell],
    run: Run,
    console: Console,
    *,
    deadline: float | None = None,
    is_essential: Callable[[Cell], bool] = lambda cell: False,
) -> Outcome:
    """Measure `cells` in order, with a progress bar.

    Args:
        model: the model; its scaler is put back at the end.
        cells: finished ones are skipped.
        run: where rows go, each as soon as it is finished.
        console: where the bar is drawn.
        deadline: `time.monotonic()` value; a cell that would not finish before it, at the rate measured so far, is
            left out. The first cell always runs.
        is_essential: cells that run whatever the time.
    """
    cost, outcome, original = Cost.of(model), Outcome(found=[c for c in cells if c.is_done(run)]), model.rope
    todo = [c for c in cells if c not in outcome.found]
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    done, spent = 0.0, 0.0
    try:
        with Progress(*columns, console=console, speed_estimate_period=300) as bar:
            task = bar.add_task("", total=sum(cost.cell(c) for c in todo))
            for cell in todo:
                expected = cost.cell(cell) * spent / done if done else 0.0
                if deadline is not None and not is_essential(cell) and time.monotonic() + expected > deadline:
                    outcome.left_out.append(cell)
                    bar.update(task, total=(bar.tasks[0].total or 0) - cost.cell(cell))
                    continue
                bar.update(task, description=f"{cell.scaler} at {cell.label}")
                started = time.monotonic()
                model.rope = cell.scaler
                rows = cell.measure(model, run, lambda past, n: bar.advance(task, cost.step(past, n)))
                seconds = time.monotonic() - started
                spent, done = spent + seconds, done + cost.cell(cell)
                outcome.measured.append(cell)
                bar.console.print(
                    f"  {cell.scaler!s:<18} {cell.label:>6}  {cell.outcome(rows)}  [dim]{seconds:.0f} s[/dim]"
                )
    finally:
        model.rope = original
    return outcome


def print_plan(model: Model, cells: Sequence[Cell], console: Console) -> None:
    """The cells, and about how long they would take, from one short forward pass."""
    cost = Cost.of(model)
    probe = min(1024, model.trained_length)
    started = time.monotonic()
    model.score_ids([0] * probe)
    rate = cost.step(0, probe - 1) / (time.monotonic() - started)
    table = Table("scaler", "context", "windows", "tokens fed", "about")
    for cell in cells:
        seconds = cost.cell(cell) / rate
        table.add_row(
            str(cell.scaler),
            cell.label,
            str(len(cell.windows)),
            str(sum(cell.windows)),
            f"{seconds:.0f} s",
        )
    console.print(table)
    total = sum(cost.cell(c) for c in cells) / rate
    longest = max(max(cell.windows) for cell in cells)
    cache_mb = model.network.bytes_per_token * longest / 1e6
    weights_mb = model.hf.get_memory_footprint() / 1e6
    console.print(
        f"{len(cells)} cells, about {total / 60:.1f} minutes; memory about {weights_mb:.0f} MB of weights and "
        f"{cache_mb:.0f} MB of cache at the longest context. Nothing was measured: this was --dry-run."
    )
