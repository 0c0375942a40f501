"""What `ropewalk demo` measures in its time, and in which order."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..engine.storage import write_atomic
from ..errors import DataError
from .models.measured import ForwardCost
from .protocols.perplexity_cell import PerplexityCell
from .runs.result import Run

_RATIOS = (2.0, 1.75, 1.5)  # longest context over trained length; the untouched model fails from about 1.4 on
_RATIOS_OF_ONE = (1.5, 1.375)  # where there is no time for a second scaler
_RATIOS_ALONE = (1.5, 1.25, 1.125)  # where there is none for the untouched model at the trained length either
_MOST_SAMPLES = 8
_MAP_TIME = 1.15  # of a scaler over that of the untouched model: a position map takes longer


@dataclass(frozen=True, kw_only=True)
class DemoPlan:
    """What is measured.

    Attributes:
        contexts: tokens, ascending; the trained length is the last but one, in a full plan the third.
        samples: places in the text.
    """

    contexts: tuple[int, ...]
    samples: int

    @classmethod
    def full(cls, trained_length: int) -> DemoPlan:
        """Up to four times the trained length, at one place."""
        return cls(contexts=tuple(trained_length * n // 4 for n in (1, 2, 4, 8, 16)), samples=1)

    @classmethod
    def sized(cls, trained_length: int, cost: ForwardCost, rate: float, seconds: float, first: float) -> DemoPlan:
        """The longest context, then the most places, that a machine has time for.

        The longest context is the same for all scalers. A slow machine gets one for which there is time for the
        untouched model and one scaler there, if possible beside the untouched model at the trained length; the rest is
        for the next run.

        Args:
            rate: operations a second.
            seconds: for the cells that tell most.
            first: seconds in which the curve of the untouched model must be measured where there are several places.
        """

        def plan(ratio: float, samples: int = 1) -> DemoPlan:
            contexts = (trained_length // 4, trained_length // 2, trained_length, int(ratio * trained_length))
            return cls(contexts=contexts, samples=samples)

        def beyond(ratio: float, scalers: int = 2) -> float:
            """Seconds for the untouched model and for scalers at the longest context."""
            return (1 + scalers * _MAP_TIME) * cost.passes([plan(ratio).longest]) / rate

        # seconds for the rest of the untouched model's curve
        within = cost.passes((trained_length // 4, trained_length)) / rate
        ratio = next((ratio for ratio in _RATIOS if within + beyond(ratio) <= seconds), None)
        if ratio is None:
            one = (ratio for ratio in _RATIOS_OF_ONE if within + beyond(ratio, scalers=1) <= seconds)
            alone = (ratio for ratio in _RATIOS_ALONE if beyond(ratio, scalers=1) <= seconds)
            return plan(next(itertools.chain(one, alone), _RATIOS_ALONE[-1]))
        to_curve = within + cost.passes([plan(ratio).longest]) / rate
        samples = min(_MOST_SAMPLES, int(seconds / (within + beyond(ratio))), int(first / to_curve))
        return plan(ratio, max(1, samples))

    @property
    def longest(self) -> int:
        """The longest context."""
        return self.contexts[-1]

    def store(self, run: Run) -> None:
        """Keep it in the run's folder, so that the same command goes on with it."""
        write_atomic(_plan_file(run), (json.dumps(asdict(self)) + "\n").encode())

    @classmethod
    def stored(cls, run: Run) -> DemoPlan | None:
        """The plan of an earlier run in this folder that has measured its longest context. Another had too little time,
        perhaps on a busy machine."""
        file = _plan_file(run)
        if not file.exists():
            return None
        try:
            fields = json.loads(file.read_bytes())
            plan = cls(contexts=tuple(map(int, fields["contexts"])), samples=int(fields["samples"]))
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{file} is damaged; delete it, or name another folder with --out") from None
        return plan if any(row["context"] == plan.longest for row in run.rows) else None


def _plan_file(run: Run) -> Path:
    return run.folder / "plan.json"


def needed(cells: Iterable[PerplexityCell], plan: DemoPlan, trained_length: int) -> list[PerplexityCell]:
    """The cells that tell most: the untouched model's curve, and every scaler at the longest context."""
    return [cell for cell in cells if cell.context == plan.longest or curve([cell], plan, trained_length)]


def curve(cells: Iterable[PerplexityCell], plan: DemoPlan, trained_length: int) -> list[PerplexityCell]:
    """The untouched model at the shortest context, at its trained length and at the longest."""
    contexts = (plan.contexts[0], trained_length, plan.longest)
    return [cell for cell in cells if not cell.scaler.parts and cell.context in contexts]


def in_order(
    cells: Iterable[PerplexityCell], plan: DemoPlan, trained_length: int, *, is_tight: bool
) -> list[PerplexityCell]:
    """The order in which cells earn their time: a curve of the untouched model, every scaler at the longest context,
    then what is left, short contexts first. Where time is short: the untouched model and `auto` at the longest context,
    the trained length that they are compared with, then the other scalers at the longest."""

    def place(cell: PerplexityCell) -> tuple[int, int]:
        if cell.context == plan.longest:
            return (1, 0) if not cell.scaler.parts else (2, 0) if str(cell.scaler) == "auto" else (4, 0)
        if curve([cell], plan, trained_length):
            return (3 if cell.context == trained_length else 5, 0) if is_tight else (0, cell.context)
        return 6, cell.context

    return sorted(cells, key=place)


def seconds_for(cells: Iterable[PerplexityCell], cost: ForwardCost, rate: float) -> float:
    """About how long cells take at `rate` operations a second."""
    return sum((_MAP_TIME if cell.scaler.parts else 1) * cost.passes(cell.pass_lengths) for cell in cells) / rate
