"""`tune`: which scaler carries this model to a length? Measured, by successive halving.

Rounds, each with the best of the one before, best first:

    skim 1      every starting point, at one place of the text
    near        scalers next to the best three, the same way
    skim 3      the best third, at two places more
    read 1      the best four, and two that a config can hold; the text read whole, at another place
    harm        those, on short texts
    read 3, 9   the best three, and two, at more places
    read        the simplest tie and the best that a config can hold, at all places
    passkeys    the best three, asked for numbers hidden at the target length

Skimming costs a tenth of reading, and ranks scalers nearly as reading does (`engine.skim`). Where it cannot be done
(a network that is not compiled) every starting point is read whole at once. A budget ends the search wherever it is;
every measurement is kept, and the same call again goes on from there.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from ..engine.api import Model
from ..engine.rotary import headline
from ..engine.skim import Sample
from ..errors import ConfigError, DataError, UnsupportedModel
from ..scaling.auto import Auto
from ..scaling.lengths import format_length, parse_length
from ..scaling.rope import Scaler
from .candidates import fits_config, neighbours, starting_points
from .cell import Cell
from .compare import Difference
from .data import Text, load_text
from .fixed_target import FixedTarget
from .harm import Harm
from .perplexity_cell import PerplexityCell, Source, plan
from .protocol import Window
from .reader import ModelReader
from .result import Row, Run
from .retrieval import cells as retrieval_cells
from .runner import measure_all
from .skim_cell import SkimCell, can_skim
from .tasks import TASKS
from .tuned import Candidate, Tuned, ranked

MOST_PLACES = 9
"""Places of the text that are read in the last round."""

_SKIMMED = 3  # places
_READ_SHARE = 8  # a skim reads one in so many tokens, but no fewer than it needs
_FINALISTS, _SERVABLE = 4, 2
_DEPTHS = (0.1, 0.5, 0.9)
_SHARES = {"skim": 0.45, "near": 0.15, "skim more": 0.15}  # of the budget that is left, at most


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What `tune` tells its caller after every measurement.

    Attributes:
        round: `skim`, `near`, `skim more`, `read`, `harm` or `passkeys`.
        scaler: what was measured.
        candidates: all so far, best first.
    """

    round: str
    scaler: Scaler
    candidates: tuple[Candidate, ...]


def tune(
    model: Model,
    target: int | str = "2x",
    *,
    text: str | Path | Text = "shakespeare",
    budget: float | None = None,
    keep_short: bool = False,
    ropes: Sequence[str | Scaler] = (),
    out: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    console: Console | None = None,
) -> Tuned:
    """Find the scaler that carries `model` to `target` tokens with the least loss.

        found = rw.tune(model, "2x", text="book.txt", budget=1200)
        model.rope = found.winner.scaler

    Args:
        target: tokens, or "32k", or "2x" the trained length.
        text: a built-in text's name, a file or folder, or a loaded text, with documents of `target` tokens.
        budget: seconds for measuring; None is as long as it takes.
        keep_short: a scaler that may cost short texts more than 0.02 nats cannot win.
        ropes: further starting points, tried first.
        out: a folder; a search that was ended goes on from what is there. None keeps nothing.
        progress: called after every measurement.
        console: where a bar is drawn; None draws none.

    Raises:
        ConfigError: the target is not beyond the trained length.
        DataError: the text is too short.
    """
    tokens = parse_length(str(target), model.trained_length)
    if tokens <= model.trained_length:
        raise ConfigError(
            f"target {format_length(tokens)} is not beyond the trained length {format_length(model.trained_length)}, "
            "which the untouched model reads; ask for more, such as 2x"
        )
    if any(str(rope).strip() == Auto.name for rope in ropes):
        raise ConfigError("auto is no scaler of its own, but the choice among what was tuned; leave it out of ropes")
    console = console or Console(quiet=True)
    document = text if isinstance(text, Text) else load_text(text)
    before = model.rope
    try:
        if out is not None:
            return _Search(model, tokens, document, Run(Path(out)), budget, keep_short, progress, console).run(ropes)
        with tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
            return _Search(model, tokens, document, Run(Path(folder)), budget, keep_short, progress, console).run(ropes)
    finally:
        model.rope = before


class _Search:
    """A search under way."""

    def __init__(
        self,
        model: Model,
        target: int,
        text: Text,
        run: Run,
        budget: float | None,
        keep_short: bool,
        progress: Callable[[Progress], None],
        console: Console,
    ) -> None:
        self._model, self._target, self._run, self._console = model, target, run, console
        self._keep_short, self._progress = keep_short, progress
        self._deadline = None if budget is None else time.monotonic() + budget
        self._rate: float | None = None
        self._complete = True
        L = model.trained_length
        self._scored = min(1024, target // 8)
        self._protocol = FixedTarget(contexts=(target,), target=self._scored, samples=MOST_PLACES)
        short = min(1024, max(L // 8, 2))
        self._harm = Harm(contexts=(2 * short,), target=short, samples=math.ceil(1024 / short))
        self._reader = ModelReader(model)
        self._source = Source.of(text, model.tokenizer, self._protocol)
        windows = self._protocol.windows(self._source.documents, target, self._source.start)
        self._windows = [*{window.place: window for window in windows}.values()]
        self._candidates: dict[str, Candidate] = {}

    def run(self, ropes: Sequence[str | Scaler]) -> Tuned:
        """All rounds, or as many as the budget allows."""
        from ..scaling.spec import parse

        L = self._model.trained_length
        given = [parse(rope, L) if isinstance(rope, str) else rope for rope in ropes]
        start = [*given, *starting_points(self._model.spec, self._target)]
        if can_skim(self._model):
            self._skim("skim", self._new(start), 1)
            best = self._ranking()[:3]
            self._skim("near", self._new([one for c in best for one in neighbours(c.scaler)]), 1)
            self._skim("skim more", self._ranking()[: len(self._candidates) // 3], _SKIMMED)
            if self._keep_short:
                self._measure_harm(self._ranking()[: len(self._candidates) // 3])
            self._read(self._finalists(), 1)
        else:
            self._read(self._new(start), 1)
            best = self._ranking()[:3]
            self._read(self._new([one for c in best for one in neighbours(c.scaler)]), 1)
        finalists = self._finalists()
        self._measure_harm(finalists)
        self._read(finalists[:3], 3)
        self._read(self._ranking(finalists)[:2], len(self._windows))
        while self._complete and (named := self._named()):
            self._read(named, len(self._windows))
        self._ask(self._ranking(finalists)[:3])
        found = self._tuned()
        if not found.eligible:
            why = "no scaler that was measured is harmless to short texts" if found.ranking else "nothing was measured"
            raise ConfigError(f"{why} within the budget; give more")
        return found

    def _named(self) -> list[Candidate]:
        """Those that would be named and were not read at all places yet: to be known as well as the winner."""
        found = self._tuned()
        if not found.eligible:
            return []
        named = [found.simplest, *([found.servable] if found.servable else [])]
        return [one for one in named if 0 < one.places < len(self._windows)]

    def _tuned(self) -> Tuned:
        return Tuned(
            target=self._target,
            rope=self._model.spec,
            ranking=tuple(self._ranking()),
            keep_short=self._keep_short,
            complete=self._complete,
        )

    def _ranking(self, among: Sequence[Candidate] | None = None) -> list[Candidate]:
        return ranked(list(self._candidates.values()) if among is None else among)

    def _finalists(self) -> list[Candidate]:
        """The best, and the best of those that other engines can serve."""
        order = [c for c in self._ranking() if c.is_harmless or not self._keep_short]
        servable = [c for c in order if c.scaler.parts and fits_config(c.scaler, self._model.spec)]
        return [*order[:_FINALISTS], *(c for c in servable[:_SERVABLE] if c not in order[:_FINALISTS])]

    def _new(self, scalers: Sequence[Scaler]) -> list[Candidate]:
        """Candidates of those scalers that this model takes and that reach the target."""
        found = []
        site = headline(self._model.sites)
        for scaler in scalers:
            if str(scaler) in self._candidates:
                continue
            try:
                self._model.rope = scaler
            except (ConfigError, UnsupportedModel):
                continue
            if scaler.member("positions") and site.reach(scaler) < self._target:
                continue
            found.append(Candidate(scaler=scaler))
            self._candidates[str(scaler)] = found[-1]
        return found

    # Rounds

    def _skim(self, name: str, candidates: Sequence[Candidate], places: int) -> None:
        windows = list(reversed(self._windows))[:places]  # the reading begins with the others
        sample = self._sample()
        cells = [self._skim_cell(c.scaler, window, sample) for window in windows for c in candidates]

        def keep(row: Row) -> None:
            if (losses := self._run.losses(row)) is not None:
                self._candidates[row["rope"]].skimmed[row["places"]] = losses

        self._carry_out(name, cells, keep)

    def _read(self, candidates: Sequence[Candidate], places: int) -> None:
        cells = [self._reading(c.scaler, window) for window in self._windows[:places] for c in candidates]

        def keep(row: Row) -> None:
            if (losses := self._run.losses(row)) is not None:
                self._candidates[row["rope"]].read[row["places"]] = losses

        self._carry_out("read", cells, keep)

    def _measure_harm(self, candidates: Sequence[Candidate]) -> None:
        scalers = [c.scaler for c in candidates if c.scaler.parts]

        def keep(row: Row) -> None:
            low, high = (math.nan if row[name] is None else row[name] for name in ("difference_low", "difference_high"))
            self._candidates[row["rope"]].harm = Difference(mean=row["difference"], low=low, high=high)

        self._carry_out("harm", plan(self._reader, self._source, scalers, self._harm), keep)

    def _ask(self, candidates: Sequence[Candidate]) -> None:
        scalers, task = [c.scaler for c in candidates], TASKS["passkey"]
        try:
            cells = retrieval_cells(self._model, [task], scalers, contexts=[self._target], depths=_DEPTHS, trials=1)
        except DataError:
            return  # the length does not hold the prompt

        def keep(row: Row) -> None:
            self._candidates[row["rope"]].found[row["depth"]] = float(row["correct"])

        self._carry_out("passkeys", cells, keep)

    # Cells

    def _sample(self) -> Sample:
        """The last quarter of what is skimmed lies in one piece, with the scored tokens in its second half."""
        read = max(min(self._target // _READ_SHARE, 4096), min(self._target // 2, 1024))
        local = read // 2
        stretch = max(8, min(64, (read - local) // 8))
        return Sample.of(self._target, local=local, far=read - local, stretch=stretch)

    def _shared(self, scaler: Scaler, window: Window) -> dict[str, str | int | None]:
        return {
            "rope": str(scaler),
            "context": self._target,
            "places": window.place,
            "model": self._model.name,
            "text": self._source.name,
            "text_sha256": self._source.sha256,
            "dtype": self._reader.precision,
            "device": self._reader.device,
            "trained_length": self._model.trained_length,
        }

    def _skim_cell(self, scaler: Scaler, window: Window, sample: Sample) -> SkimCell:
        read, local = len(sample.positions), int((sample.stretches == sample.stretches[-1]).sum())
        scored = min(self._scored, local // 2)
        recipe = self._shared(scaler, window) | {"task": "skim", "target": scored, "read": read, "local": local}
        cut = Window(ids=window.ids, first=len(window.ids) - scored, place=window.place)
        return SkimCell(scaler=scaler, context=self._target, window=cut, sample=sample, recipe=recipe)

    def _reading(self, scaler: Scaler, window: Window) -> PerplexityCell:
        recipe = self._shared(scaler, window) | {"task": "tune", "protocol": FixedTarget.name, "target": self._scored}
        return PerplexityCell(
            scaler=scaler, context=self._target, protocol=self._protocol, passages=(window,), recipe=recipe
        )

    def _carry_out(self, name: str, cells: Sequence[Cell], keep: Callable[[Row], None]) -> None:
        """Measure what is not in the run yet, as far as there is time, and keep the rows of all that there is."""

        def look(cell: Cell) -> bool:
            rows = [self._run.find(recipe) for recipe in cell.row_recipes()]
            for row in rows:
                if row is not None:
                    keep(row)
            return None not in rows

        def tell(cell: Cell) -> None:
            look(cell)
            self._progress(Progress(round=name, scaler=cell.scaler, candidates=tuple(self._ranking())))

        todo = [cell for cell in cells if not look(cell)]
        deadline = self._deadline
        if todo and deadline is not None and time.monotonic() > deadline:
            self._complete = False
            return
        if deadline is not None and name in _SHARES:
            now = time.monotonic()
            deadline = now + (deadline - now) * _SHARES[name]
        outcome = measure_all(
            self._model, todo, self._run, self._console, deadline=deadline, rate=self._rate, then=tell
        )
        self._rate = outcome.rate or self._rate
        self._complete &= not outcome.left_out
        for cell in outcome.found:  # measured by another process, meanwhile
            look(cell)
