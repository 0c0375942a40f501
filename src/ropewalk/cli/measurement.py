"""What a measuring command was asked, where its model runs, and the way from cells to a report."""

from __future__ import annotations

import contextlib
import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import ConfigError
from .messages import print_json
from .waiting import fetch_model, load_model, waiting

if TYPE_CHECKING:
    from rich.console import Console

    from ..evals.models.local import LocalModel
    from ..evals.models.measured import MeasuredModel
    from ..evals.runs.cell import Cell
    from ..evals.runs.measure import RunOutcome
    from ..evals.runs.result import Run
    from ..scaling.rope import Scaler

    Work = Callable[[Run, Console, float | None], RunOutcome]


def named_rope(name: str) -> str | None:
    """The scaler that the folder of a model names; None if it names none.

    Raises:
        RopewalkError: as `load`.
    """
    fetch_model(name)
    with waiting(f"reading the config of {Path(name).name}"):
        from ..engine.checkpoints.config import named_scaler
        from ..engine.checkpoints.source import resolve

        named = named_scaler(resolve(name))
    return None if named is None else str(named.scaler)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What every measuring command is asked.

    Args:
        model: built-in name, hub id or folder.
        ropes: specs of the scalers, as they were written.
        adds_named: whether the scaler that the model's folder names is added to them.
        out: the run's folder; None for the command's own.
        max_minutes: leave out what would not finish in this time; None for what the command takes.
        dry_run: print the plan, and measure nothing.
        as_json: print the rows as JSON in place of tables; progress is on standard error then.
    """

    model: str
    ropes: tuple[str, ...]
    adds_named: bool
    out: Path | None
    max_minutes: float | None
    dry_run: bool
    as_json: bool

    def scalers(self) -> list[Scaler]:
        """Of `ropes`, in their order, and then the one that the folder names.

        Raises:
            ConfigError: a spec names no scaler, or one with values that it cannot have.
        """
        with waiting("starting"):  # importing torch and transformers takes seconds
            importlib.import_module("ropewalk.engine.load")
        scalers = [self.scaler(rope) for rope in self.ropes]
        named = named_rope(self.model) if self.adds_named else None
        if named is not None:
            click.echo(f"{self.model} names {named}, which is measured too; --rope measures others", err=True)
            scalers.append(self.scaler(named))
        return scalers

    def scaler(self, spec: str) -> Scaler:
        """One scaler; multiples in its lengths are of the model's trained length."""
        from ..engine.checkpoints.config import trained_length
        from ..scaling import parse

        return parse(spec, lambda: trained_length(self.model))

    def carry_out(
        self,
        model: MeasuredModel,
        cells: Sequence[Cell],
        *,
        name: str,
        title: str,
        deadline: float | None,
        work: Work | None = None,
    ) -> None:
        """Measure `cells` and publish the run; of several processes the first one publishes.

        Args:
            model: the loaded model, ready to be measured.
            cells: in the order of measuring.
            name: of the run where no folder was given: runs/MODEL-NAME.
            title: the report's heading.
            deadline: `time.monotonic()` value; what would not finish before it is left out. None for no limit.
            work: measures in another way than all cells in their order; `cells` are then the most that it measures.
        """
        from ..evals.reports.report import print_results, publish

        def finish(run: Run, left_out: Sequence[Cell], console: Console) -> None:
            print_results(run, publish(run, title=title), left_out, console)

        self.measure(model, cells, finish, name=name, deadline=deadline, work=work)

    def measure(
        self,
        model: MeasuredModel,
        cells: Sequence[Cell],
        finish: Callable[[Run, Sequence[Cell], Console], None],
        *,
        name: str,
        deadline: float | None,
        work: Work | None = None,
    ) -> None:
        """Measure `cells` as `carry_out` does; `finish` then gets the run and the cells left out for lack of time."""
        from rich.console import Console

        from ..engine import tensor_parallel
        from ..evals.runs.measure import measure_all, new_console, print_plan
        from ..evals.runs.result import open_run_of_rank

        console = Console(stderr=True, quiet=not tensor_parallel.is_first()) if self.as_json else new_console()
        if self.dry_run:
            print_plan(model, cells, console)
            return
        run = open_run_of_rank(self.out or Path("runs") / f"{Path(self.model).name}-{name}")
        run.write_environment()
        if work is None:
            outcome = measure_all(model, cells, run, console, deadline=deadline)
        else:
            outcome = work(run, console, deadline)
        if tensor_parallel.is_first():
            finish(run, outcome.left_out, Console(quiet=True) if self.as_json else console)
        if self.as_json:
            print_run(run, outcome.left_out)


def print_run(run: Run, left_out: Sequence[Cell] = ()) -> None:
    """A run as one line of JSON. Runs of other kinds than perplexity and retrieval have no verdict."""
    from ..evals.reports.report import verdict_and_findings

    has_verdict = any(row.get("task") == "ppl" or "suite" in row for row in run.rows)
    print_json(
        {
            "folder": run.folder,
            "verdict": verdict_and_findings(run)[0] if has_verdict else [],
            "rows": run.rows,
            "left_out": [{"rope": str(cell.scaler), "length": cell.label} for cell in left_out],
        }
    )


@contextlib.contextmanager
def printed(as_json: bool, out: Path) -> Iterator[list[Cell]]:
    """Where a measurement prints: on standard output; for JSON on standard error, and its rows follow. The block
    appends what it left out for lack of time.

    Args:
        out: the run's folder.
    """
    left_out: list[Cell] = []
    with contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
        yield left_out
    if as_json:
        from ..evals.runs.result import Run

        print_run(Run(out), left_out)


def load_measured(model: str, **loading: Any) -> LocalModel:
    """A model to be measured, also beyond its scaler's reach."""
    loaded = load_model(model, **loading, max_length=2**31)
    from ..evals.models.local import LocalModel

    return LocalModel(loaded)


def deadline_in(minutes: float | None) -> float | None:
    """The `time.monotonic()` value so many minutes from now; None for no limit."""
    return None if minutes is None else time.monotonic() + 60 * minutes


@dataclass(frozen=True, kw_only=True)
class ModelTarget:
    """Where a model is measured: here, or at a server.

    Args:
        endpoint: address of a server; None is here.
        served_as: the model's name there.
        loading: keywords for `load`.
    """

    endpoint: str | None
    served_as: str | None
    loading: dict[str, Any]

    def open(self, model: str) -> MeasuredModel:
        """The model, loaded here or found at its server; standard error says what was found there.

        Raises:
            AssetError: there is no such model.
            ConfigError: an option has no effect here.
            EndpointError: the server cannot be used.
        """
        if self.endpoint is None:
            if self.served_as is not None:
                raise ConfigError("--served-as has no effect without --endpoint; leave it out")
            return load_measured(model, **self.loading)
        from ..evals.models.served import ServedModel

        if given := [name for name, value in self.loading.items() if value not in ("auto", None)]:
            option = "--no-compile" if self.loading[given[0]] is False else f"--{given[0].replace('_', '-')}"
            raise ConfigError(f"{option} has no effect on a model that is served; leave it out, or --endpoint")
        served = ServedModel(model, self.endpoint, self.served_as)
        click.echo(served.describe(), err=True)
        return served
