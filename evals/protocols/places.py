"""`fixed-target` with places added until the paired differences are known well enough.

Every place under every scaler and context is a cell of its own, whose losses are stored, so that a
place is read once, whatever the number of places in the end. The places of a count are those of
`fixed-target` with so many `samples`, and the final rows are its rows. Counts double, so that the
places of one are among those of the next.

Places share no work: their windows begin at different tokens, and so does a longer context at the
same place.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from rich.console import Console

from ...errors import ConfigError, DataError, Setting
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..models.measured import Advance, MeasuredModel
from ..runs.cell import Cell
from ..runs.compare import UNTOUCHED, Difference
from ..runs.measure import RunOutcome, measure_all
from ..runs.result import Losses, Row, Run, loss_text
from ..statistics import paired_difference
from .fixed_target import FixedTarget
from .perplexity_cell import PerplexityCell, Source, plan
from .protocol import ProtocolResult, Window

FEWEST = 4
"""The first number of places: one place says little of a text, and its interval does not tell how little."""

MOST = 64
"""The number of places that is not exceeded if none is given."""

RELATIVE = 0.1
"""A difference is known well enough, too, if its interval is at most this part of it."""


@dataclass(frozen=True, kw_only=True)
class PlaceCell(Cell):
    """One place under one scaler and context.

    Args:
        window: what is read.
        recipe: that of the row over all places, with this place only.
    """

    scaler: Scaler
    context: int
    window: Window
    recipe: dict[str, Any]

    @property
    def pass_lengths(self) -> list[int]:
        return [len(self.window.ids) - 1]

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        started = time.perf_counter()
        losses = model.losses(self.window.ids, self.window.first, advance)
        measured = {
            "tokens": len(losses),
            "loss": float(losses.mean(dtype=np.float64)),
            "seconds": time.perf_counter() - started,
            "peak_memory_mb": model.memory_mb,
        }
        return [run.add(self.recipe, measured, losses)]

    def outcome(self, rows: Sequence[Row]) -> str:
        return f"{loss_text(rows[0])} at {self.window.place}"


@dataclass(frozen=True, kw_only=True)
class JoinedCell(PerplexityCell):
    """A row over several places, from their stored losses."""

    places: tuple[PlaceCell, ...]

    @property
    def pass_lengths(self) -> list[int]:
        return []

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        rows = [run.find(place.recipe) for place in self.places]
        seconds = sum(row["seconds"] for row in rows if row is not None)
        return self.store(model, run, ProtocolResult(losses=self.stored_losses(run)), seconds)

    def stored_losses(self, run: Run) -> list[Losses]:
        """Nats of the scored tokens of each place.

        Raises:
            DataError: a place has no losses.
        """
        found = []
        for place in self.places:
            row = run.find(place.recipe)
            losses = None if row is None else run.losses(row)
            if losses is None:
                raise DataError(
                    f"{run.folder} has no losses of {place.scaler} at {place.window.place}; measure in another folder"
                )
            found.append(losses)
        return found


@dataclass(frozen=True, kw_only=True)
class Known:
    """How well the differences of a count of places are known.

    Args:
        widest: the difference whose interval is the farthest from narrow enough.
        of: its scaler and context: `yarn:2 at 16k`.
        excess: width of its interval, relative to what is wished.
    """

    widest: Difference
    of: str
    excess: float

    @property
    def is_enough(self) -> bool:
        return self.excess <= 1

    def needed(self, count: int) -> int:
        """About how many places would be enough; the width falls with the square root of their number."""
        return math.ceil(count * self.excess**2)


class GrowingPlaces:
    """The cells of `fixed-target` with 4, 8, 16 and more places, and the measurement that stops.

    Args:
        protocol: its `samples` are the most places.
        interval: the wished width of the 95 % interval of every paired difference, nats.

    Raises:
        ConfigError: nothing can be paired, or the interval is not above 0.
        DataError, ContextOverflow: as for `plan`.
    """

    def __init__(
        self,
        model: MeasuredModel,
        source: Source,
        scalers: Sequence[Scaler],
        protocol: FixedTarget,
        interval: float,
    ) -> None:
        if not 0 < interval < math.inf:
            raise ConfigError(Setting("interval", interval, "given"), " must be above 0 nats")
        self._model, self._interval, self._most = model, interval, protocol.samples
        self._rounds = [
            [_joined(cell) for cell in plan(model, source, scalers, replace(protocol, samples=count))]
            for count in _counts(source, protocol)
        ]
        cells = self._rounds[0]
        self._pairs = [(k, base) for k, cell in enumerate(cells) if (base := self._base(cells, cell)) not in (None, k)]
        if not self._pairs:
            raise ConfigError(
                "an interval is that of a difference to the untouched model; measure ",
                Setting("rope", UNTOUCHED),
                " and another scaler or length too",
            )

    @property
    def cells(self) -> list[PerplexityCell]:
        """What is measured at most, as cells without stored places."""
        return [
            PerplexityCell(
                scaler=cell.scaler,
                context=cell.context,
                protocol=cell.protocol,
                windows=cell.windows,
                recipe=cell.recipe,
            )
            for cell in self._rounds[-1]
        ]

    def measure(self, run: Run, console: Console, deadline: float | None) -> RunOutcome:
        """Measure more and more places, until every difference is known well enough, there are no more, or the time
        is up; then store the rows over all places that every cell has.

        Args:
            deadline: as for `measure_all`.
        """
        finished: list[JoinedCell] = []
        rate, seen = None, set[str]()
        for cells in self._rounds:
            count = len(cells[0].windows)
            new = [place for cell in cells for place in cell.places if place.window.place not in seen]
            seen |= {place.window.place for place in new}
            outcome = measure_all(self._model, new, run, console, deadline=deadline, rate=rate)
            rate = outcome.rate or rate
            if outcome.left_out:
                _say(console, f"There was no time for {count} places.")
                break
            finished = cells
            known = self.known(run, cells)
            if known is None:
                _say(console, f"{count} places: no difference is finite, and more places would not change that.")
                break
            _say(console, f"{count} places: {self._sentence(known, count)}")
            if known.is_enough:
                break
        else:
            _say(console, self._why_no_more(cells))
        if not finished:
            return RunOutcome(left_out=[*self._rounds[0]])
        return measure_all(self._model, finished, run, console)

    def known(self, run: Run, cells: Sequence[JoinedCell]) -> Known | None:
        """How well the differences of a round are known; None if none is finite. One that is not finite stays so."""
        losses = [np.concatenate(cell.stored_losses(run)) for cell in cells]
        found = []
        for k, base in self._pairs:
            mean, low, high = paired_difference(losses[k], losses[base])
            if not math.isfinite(mean):
                continue
            width = high - low if math.isfinite(high - low) else math.inf
            excess = width / max(self._interval, RELATIVE * abs(mean))
            of = f"{cells[k].scaler} at {format_length(cells[k].context)}"
            found.append(Known(widest=Difference(mean=mean, low=low, high=high), of=of, excess=excess))
        return max(found, key=lambda one: one.excess, default=None)

    def _base(self, cells: Sequence[JoinedCell], cell: JoinedCell) -> int | None:
        """The index of the cell that `cell` is compared with: the untouched model at its trained length, or if that is
        not measured, at the same context."""
        untouched = {c.context: k for k, c in enumerate(cells) if str(c.scaler) == UNTOUCHED}
        return untouched.get(self._model.trained_length or 0, untouched.get(cell.context))

    def _why_no_more(self, cells: Sequence[JoinedCell]) -> str:
        count, asked = len(cells[0].windows), cells[0].recipe["samples"]
        wanted = 2 * count if count == asked else asked
        if wanted > self._most:
            return f"No more places: {wanted} would come next, and at most {self._most} samples were asked for."
        return f"No more places: the text has no room for {wanted}; a longer one may have."

    def _sentence(self, known: Known, count: int) -> str:
        widest = f"{known.of} differs by {known.widest}"
        if known.is_enough:
            return f"every difference is known well enough. The least certain: {widest}."
        if not math.isfinite(known.excess):
            return f"{widest}."
        return f"{widest}; about {known.needed(count)} places would be enough."


def _counts(source: Source, protocol: FixedTarget) -> list[int]:
    """Numbers of places, each at least double the last, or all documents; the places of one are among those of the
    next."""
    documents = sum(len(document) >= protocol.longest - len(source.start.prefix) for document in source.documents)
    doubled = [2**k for k in range(protocol.samples.bit_length())]
    counts = [n for n in doubled if n < documents] + [documents * n for n in doubled if documents]
    fitting = [count for count in counts if min(FEWEST, protocol.samples) <= count <= protocol.samples]
    usable: list[int] = []
    for count in fitting or [protocol.samples]:
        if (
            usable
            and len(replace(protocol, samples=count).windows(source.documents, protocol.longest, source.start)) < count
        ):
            break  # the text has no room for so many
        usable.append(count)
    return usable


def _joined(cell: Cell) -> JoinedCell:
    assert isinstance(cell, PerplexityCell)
    return JoinedCell(
        scaler=cell.scaler,
        context=cell.context,
        protocol=cell.protocol,
        windows=cell.windows,
        recipe=cell.recipe,
        places=tuple(
            PlaceCell(
                scaler=cell.scaler,
                context=cell.context,
                window=window,
                recipe=cell.recipe | {"task": "place", "samples": None, "places": window.place},
            )
            for window in cell.windows
        ),
    )


def _say(console: Console, sentence: str) -> None:
    console.print(sentence, highlight=False, markup=False, soft_wrap=True)
