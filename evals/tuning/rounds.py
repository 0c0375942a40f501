"""The rounds of `tune`, and the measurements so far."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from rich.console import Console

from ...engine.model import Model
from ...engine.rotary_site import primary_rotary
from ...errors import ConfigError, DataError, UnsupportedModel
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..models.local import LocalModel
from ..protocols.harm import Harm
from ..protocols.perplexity_cell import plan
from ..retrieval.cells import cells as retrieval_cells
from ..retrieval.tasks import TASKS
from ..runs.cell import Cell
from ..runs.compare import Difference
from ..runs.measure import measure_all
from ..runs.progress import RunProgress
from ..runs.result import Row, Run
from .candidates import Candidate, Objective, Tuned, by_skimming, fits_config, neighbours, ranked, starting_points
from .factor_search import FactorSpace, FoundFactors, search_factors
from .text import TuneText, can_skim

_LOG = logging.getLogger(__name__)

SEARCHED = "longrope (searched)"
"""The name of the scaler with searched factors, whose spec is too long."""

Search = Literal["methods", "factors"]

_SKIMMED = 3  # places that the last skimming round uses
_FINALISTS, _SERVABLE = 4, 2
_CLIMBS = 4
_STARTS = 4  # number of closed forms; the search starts from the best of them
_DEPTHS = (0.1, 0.5, 0.9)
_SHARES = {"skim": 0.45, "near": 0.15, "skim more": 0.15, "factors": 0.5}  # largest share of the remaining budget


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `tune` passes to its caller after every measurement.

    Attributes:
        round: `judge`, `skim`, `near`, `skim more`, `factors`, `read`, `harm` or `passkeys`.
        scaler: the scaler that was measured.
        candidates: all candidates so far, best first.
    """

    round: str
    scaler: Scaler
    candidates: tuple[Candidate, ...]


class Rounds:
    """A running search."""

    def __init__(
        self,
        model: Model,
        target: int,
        text: TuneText,
        run: Run,
        budget: float | None,
        objective: Objective,
        keep_short: bool,
        progress: Callable[[Progress], None],
        console: Console,
    ) -> None:
        self._model, self._target, self._text, self._run, self._console = model, target, text, run, console
        self._local = LocalModel(model)
        self._objective, self._keep_short, self._progress = objective, keep_short, progress
        self._deadline = None if budget is None else time.monotonic() + budget
        self._bar = RunProgress(console, self._deadline)
        self._rate: float | None = None
        self._complete = True
        short = min(1024, max(model.trained_length // 8, 2))
        self._harm = Harm(contexts=(2 * short,), target=short, samples=math.ceil(512 / short))
        self._candidates: dict[str, Candidate] = {}

    def run(self, ropes: Sequence[str | Scaler], search: Search, largest_factor: float | None) -> Tuned:
        """Run all rounds, or as many as the budget allows."""
        if self._run.rows:
            count, folder = len(self._run.rows), self._run.folder
            self._console.print(f"{count} measurements of an earlier search are in {folder}.", highlight=False)
        with self._bar:
            self._run_rounds(ropes, search, largest_factor)
        tuned = self._tuned()
        if not tuned.eligible:
            why = "every measured scaler harms short texts" if tuned.ranking else "nothing was measured"
            raise ConfigError(
                f"{why}; allow harm, or add rope 'none'" if self._complete else f"{why} within the budget; raise it"
            )
        return tuned

    def _run_rounds(self, ropes: Sequence[str | Scaler], search: Search, largest_factor: float | None) -> None:
        L = self._model.trained_length
        given = [parse(rope, L) if isinstance(rope, str) else rope for rope in ropes]
        for scaler in given:
            self._require(scaler)
        start = [*given, *starting_points(self._model.spec, self._target)]
        if self._text.judge is not None:
            self._carry_out("judge", [self._text.judge], lambda row: None)
            if not self._text.judge.is_done(self._run):
                return  # no time was left
            self._text.choose_keys(self._run)
        if can_skim(self._model):
            self._skim("skim", self._new(start), 1)
            best = self._ranking()[:3]
            self._skim("near", self._new([scaler for c in best for scaler in neighbours(c.scaler)]), 1)
            self._skim("skim more", self._ranking()[: len(self._candidates) // 3], _SKIMMED)
            if search == "factors":
                self._search_factors(largest_factor)
            best = self._pick_finalists()
            first = [*best[:1], *self._servable(best)[:1]]  # the most important two, if time is short
            self._read([*dict.fromkeys([*first, *best])], 1)
        else:
            self._read(self._new(start), 1)
            best = self._ranking()[:3]
            self._read(self._new([scaler for c in best for scaler in neighbours(c.scaler)]), 1)
        self._read(self._pick_finalists()[:3], 3)
        self._read(self._pick_finalists()[:2], len(self._text.windows))
        self._climb()
        while self._complete and (named := self._named_candidates()):
            self._read(named, len(self._text.windows))
        best = self._pick_finalists()
        self._measure_harm(best)
        self._measure_passkeys(best[:3])
        self._load_earlier_readings()

    def _load_earlier_readings(self) -> None:
        """Use what an earlier search in this folder, perhaps with another budget, has read of the
        candidates."""
        for candidate in self._candidates.values():
            for window in self._text.windows:
                row = self._run.find(self._text.read(candidate.scaler, window).row_recipes()[0])
                if row is not None and (losses := self._run.losses(row)) is not None:
                    candidate.read[window.place] = self._text.counted(losses, window.place)

    def _climb(self) -> None:
        """Measure the neighbours of the leader. Repeat while the leader changes."""
        for _ in range(_CLIMBS):
            leader = self._pick_finalists()[:1]
            near = self._new([scaler for c in leader for scaler in neighbours(c.scaler)])
            if can_skim(self._model):
                self._skim("near", near, _SKIMMED)
                near = by_skimming(near)
            self._read(near[:2], len(self._text.windows))
            if self._pick_finalists()[:1] == leader:
                break

    def _named_candidates(self) -> list[Candidate]:
        """Candidates that the result names, but that were not read at all places. They must be
        known as well as the winner."""
        tuned = self._tuned()
        if not tuned.eligible:
            return []
        named = [tuned.simplest, *([tuned.servable] if tuned.servable else [])]
        return [candidate for candidate in named if 0 < candidate.places < len(self._text.windows)]

    def _tuned(self) -> Tuned:
        return Tuned(
            target=self._target,
            rope=self._model.spec,
            ranking=tuple(self._ranking()),
            keep_short=self._keep_short,
            complete=self._complete,
            objective=self._objective,
        )

    def _ranking(self) -> list[Candidate]:
        return ranked(list(self._candidates.values()))

    def _pick_finalists(self) -> list[Candidate]:
        """The best candidates, the best that other engines can serve, and the searched one; best
        first."""
        order = self._ranking()
        servable = self._servable(order)
        if self._keep_short:  # measured first, so that no time is spent on reading what cannot win
            self._measure_harm([*order[: 2 * _FINALISTS], *servable[: 2 * _SERVABLE]])
            order, servable = ([c for c in some if c.is_harmless] for some in (order, servable))
        chosen = {*order[:_FINALISTS], *servable[:_SERVABLE], *(c for c in order if c.name == SEARCHED)}
        return [c for c in order if c in chosen]

    def _servable(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Candidates that change something and that a config can hold."""
        return [c for c in candidates if c.scaler.parts and fits_config(c.scaler, self._model.spec)]

    def _new(self, scalers: Sequence[Scaler]) -> list[Candidate]:
        """Candidates for those scalers that work on this model and reach the target."""
        candidates = []
        for scaler in scalers:
            if str(scaler) in self._candidates:
                continue
            try:
                self._require(scaler)
            except (ConfigError, UnsupportedModel):
                continue
            candidates.append(Candidate(scaler=scaler))
            self._candidates[str(scaler)] = candidates[-1]
        return candidates

    def _require(self, scaler: Scaler) -> None:
        """Raise ConfigError or UnsupportedModel if a scaler does not work on this model, or if it has a position map
        and does not reach the target."""
        self._model.rope = scaler
        reach = primary_rotary(self._model.sites).configured.reach(scaler)
        if scaler.member("positions") and reach < self._target:
            raise ConfigError(
                f"{scaler} reaches {format_length(int(reach))} tokens, fewer than the target, "
                f"{format_length(self._target)}; give it another window or group, or leave it out"
            )

    # Rounds

    def _skim(self, name: str, candidates: Sequence[Candidate], places: int) -> None:
        windows = list(reversed(self._text.windows))[:places]  # reading begins at the other end
        cells = [self._text.skim(c.scaler, window) for window in windows for c in candidates]

        def store(row: Row) -> None:
            if (losses := self._run.losses(row)) is not None:
                self._candidates[row["rope"]].skimmed[row["places"]] = losses

        self._carry_out(name, cells, store)

    def _read(self, candidates: Sequence[Candidate], places: int) -> None:
        cells = [self._text.read(c.scaler, window) for window in self._text.windows[:places] for c in candidates]

        def store(row: Row) -> None:
            if (losses := self._run.losses(row)) is not None:
                self._candidates[row["rope"]].read[row["places"]] = self._text.counted(losses, row["places"])

        self._carry_out("read", cells, store)

    def _search_factors(self, largest: float | None) -> None:
        """Search LongRoPE factors around the best scaler that a config can hold, and add the
        best."""
        until = self._share("factors")
        starts = self._servable(self._ranking())[:_STARTS]

        def measure(scalers: Sequence[Scaler]) -> list[float] | None:
            return self._search_losses(scalers, until)

        def report(generation: int, factors: FoundFactors) -> None:
            self._console.print(f"  factors: generation {generation}, {factors}", highlight=False)

        losses = measure([c.scaler for c in starts])  # so far one or three places have ranked them
        if not losses:
            return
        start = starts[losses.index(min(losses))]
        self._console.print(f"  factors: the search starts from {start.label}", highlight=False)
        space = FactorSpace.around(start.scaler, self._model.spec, self._target, largest)
        factors = search_factors(space, measure, report=report)
        if factors is None:
            return
        for candidate in self._new([factors.scaler]):
            candidate.name = SEARCHED
            self._skim("factors", [start, candidate], _SKIMMED)
            if self._keep_short:
                self._measure_harm([candidate])

    def _search_losses(self, scalers: Sequence[Scaler], until: float | None) -> list[float] | None:
        """Mean losses over the places of a search; None if there was no time for all of them."""
        losses: dict[tuple[str, str], float] = {}

        def store(row: Row) -> None:
            losses[row["rope"], row["places"]] = math.inf if row["loss"] is None else row["loss"]

        windows = self._text.searched
        cells = [self._text.skim(scaler, window) for scaler in scalers for window in windows]
        self._carry_out("factors", cells, store, until)
        needed = [[(str(scaler), window.place) for window in windows] for scaler in scalers]
        if any(key not in losses for keys in needed for key in keys):
            return None
        return [fmean(losses[key] for key in keys) for keys in needed]

    def _measure_harm(self, candidates: Sequence[Candidate]) -> None:
        scalers = [*{str(c.scaler): c.scaler for c in candidates if c.scaler.parts}.values()]

        def store(row: Row) -> None:
            mean, low, high = (
                math.nan if row[name] is None else row[name]
                for name in ("difference", "difference_low", "difference_high")
            )
            self._candidates[row["rope"]].harm = Difference(mean=mean, low=low, high=high)

        self._carry_out("harm", plan(self._local, self._text.source, scalers, self._harm), store)

    def _measure_passkeys(self, candidates: Sequence[Candidate]) -> None:
        scalers, task = [c.scaler for c in candidates], TASKS["passkey"]
        try:
            cells = retrieval_cells(self._local, [task], scalers, contexts=[self._target], depths=_DEPTHS, trials=1)
        except DataError as error:
            _LOG.warning("passkeys were left out: %s", error)
            return

        def store(row: Row) -> None:
            self._candidates[row["rope"]].passkeys[row["depth"]] = float(row["correct"])

        self._carry_out("passkeys", cells, store)

    def _share(self, name: str) -> float | None:
        """The time at which a round that begins now has used its share of the budget."""
        now = time.monotonic()
        return None if self._deadline is None else now + (self._deadline - now) * _SHARES.get(name, 1)

    def _ends_before(self, deadline: float, cell: Cell) -> bool:
        seconds = self._local.cost.passes(cell.pass_lengths) / self._rate if self._rate else 0.0
        return time.monotonic() + seconds <= deadline

    def _carry_out(
        self,
        name: str,
        cells: Sequence[Cell],
        store: Callable[[Row], None],
        until: float | None = None,
    ) -> None:
        """Measure what is not in the run yet, as far as time allows, and store all rows in the
        candidates.

        Args:
            until: when the round must end. None: when it has used its share of the budget.
        """

        def load_rows(cell: Cell) -> bool:
            rows = [self._run.find(recipe) for recipe in cell.row_recipes()]
            for row in rows:
                if row is not None:
                    store(row)
            return None not in rows

        def report(cell: Cell) -> None:
            load_rows(cell)
            self._progress(Progress(round=name, scaler=cell.scaler, candidates=tuple(self._ranking())))

        todo = [cell for cell in cells if not load_rows(cell)]
        deadline = self._share(name) if until is None else until
        if todo and deadline is not None and not any(self._ends_before(deadline, cell) for cell in todo):
            self._complete = False
            return
        self._bar.begin_stage(name, is_quiet=name == "factors")  # whose cells would be hundreds of lines
        outcome = measure_all(
            self._local,
            todo,
            self._run,
            self._console,
            deadline=deadline,
            rate=self._rate,
            then=report,
            progress=self._bar,
        )
        self._rate = outcome.rate or self._rate
        self._complete &= not outcome.left_out
        for cell in outcome.already_done:  # meanwhile measured by another process
            load_rows(cell)
