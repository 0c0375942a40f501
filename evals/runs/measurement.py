"""A measurement as the shell asks for it: the options that such commands share, and the way from cells to a report."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

    from ...scaling.rope import Scaler
    from ..models.subject import Subject
    from .cell import Cell
    from .result import Run


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every measuring command is asked.

    Args:
        model: built-in name, hub id or folder.
        ropes: specs of the scalers, as they were written.
        out: the run's folder; None for the command's own.
        max_minutes: leave out what would not finish in this time; None for what the command takes.
        dry_run: print the plan, and measure nothing.
    """

    model: str
    ropes: tuple[str, ...]
    out: Path | None
    max_minutes: float | None
    dry_run: bool

    def scalers(self) -> list[Scaler]:
        """Of `ropes`, in their order.

        Raises:
            ConfigError: a spec names no scaler, or one with values that it cannot have.
        """
        return [self.scaler(rope) for rope in self.ropes]

    def scaler(self, spec: str) -> Scaler:
        """One scaler; multiples in its lengths are of the model's trained length."""
        from ...engine.checkpoints.config import trained_length
        from ...scaling import parse

        return parse(spec, lambda: trained_length(self.model))

    def carry_out(
        self, subject: Subject, cells: Sequence[Cell], *, name: str, title: str, deadline: float | None
    ) -> None:
        """Measure `cells` and publish the run; of several processes the first one publishes.

        Args:
            subject: `self.model`, ready to be measured.
            cells: in the order of measuring.
            name: of the run where no folder was given: runs/MODEL-NAME.
            title: the report's heading.
            deadline: `time.monotonic()` value; what would not finish before it is left out. None for no limit.
        """
        from ..reports.publish import print_results, publish

        def finish(run: Run, left_out: Sequence[Cell], console: Console) -> None:
            print_results(run, publish(run, title=title), left_out, console)

        self.measure(subject, cells, finish, name=name, deadline=deadline)

    def measure(
        self,
        subject: Subject,
        cells: Sequence[Cell],
        finish: Callable[[Run, Sequence[Cell], Console], None],
        *,
        name: str,
        deadline: float | None,
    ) -> None:
        """Measure `cells` as `carry_out` does; `finish` then gets the run and the cells left out for lack of time."""
        from ...engine import tensor_parallel
        from . import runner
        from .follower import open_run

        console = runner.new_console()
        if self.dry_run:
            runner.print_plan(subject, cells, console)
            return
        run = open_run(self.out or Path("runs") / f"{Path(self.model).name}-{name}")
        run.write_environment()
        outcome = runner.measure_all(subject, cells, run, console, deadline=deadline)
        if tensor_parallel.is_first():
            finish(run, outcome.left_out, console)


def deadline_in(minutes: float | None) -> float | None:
    """The `time.monotonic()` value so many minutes from now; None for no limit."""
    return None if minutes is None else time.monotonic() + 60 * minutes


def measures(
    *own: Callable[[Any], Any],
    out: str,
    ropes: tuple[str, ...] = ("none",),
    lengths: tuple[str, str] | None = None,
    max_minutes: str = "Leave out what would not finish in this time.",
) -> Callable[[Any], Any]:
    """Add the shared options to a command, which gets them as `asked`, a `Measurement`, and --lengths as `lengths`.

    Args:
        own: the command's own options, which stand between --lengths and --out.
        out: the run's folder by default, for the help.
        ropes: the default of --rope.
        lengths: default and help of --lengths; None for a command without.
        max_minutes: help of --max-minutes.
    """
    head = [
        click.argument("model"),
        click.option(
            "--rope", "ropes", multiple=True, default=ropes, show_default=True, help="Scaler; may be repeated."
        ),
    ]
    if lengths is not None:
        head.append(click.option("--lengths", default=lengths[0], show_default=True, help=lengths[1]))
    tail = (
        click.option(
            "--out",
            type=click.Path(file_okay=False, path_type=Path),
            help=f"Folder for the results  [default: {out}]",
        ),
        click.option("--max-minutes", type=float, help=max_minutes),
        click.option("--dry-run", is_flag=True, help="Print what would be measured, and how long it would take."),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(
            *,
            model: str,
            ropes: tuple[str, ...],
            out: Path | None,
            max_minutes: float | None,
            dry_run: bool,
            **rest: Any,
        ) -> None:
            asked = Measurement(model=model, ropes=ropes, out=out, max_minutes=max_minutes, dry_run=dry_run)
            command(asked=asked, **rest)

        for option in reversed((*head, *own, *tail)):
            wrapped = option(wrapped)
        return wrapped

    return decorate
