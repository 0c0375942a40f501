"""`tune`: which scaler works best on this model at a given length? Measured by successive halving.

Each round takes the best of the previous round, best first:

    skim 1      every starting point, at one place of the text
    near        neighbours of the best three, the same way
    skim 3      the best third, at two more places
    factors     if asked for: the factors of every rotary pair, searched from the best scaler that a config can hold,
                at places that no other round uses (`factor_search`)
    judge       for the objective `key-tokens`, before all others: the untouched model reads all places within the
                trained length, and chooses the tokens that count when the text is read whole (`key_tokens`)
    read 1      the best four, and two that a config can hold; the text read whole, at another place
    read 3, 9   the best three, and two, at more places
    near        neighbours of the leader, skimmed; the better two read; again while the leader changes
    read        the simplest tie and the best that a config can hold, at all places
    harm        the best, on short texts
    passkeys    passkeys at the target length, for the best three

Skimming costs a tenth of reading and ranks scalers nearly as reading does
(`engine.runners.skim`). If the model is not compiled it cannot skim, and every starting point
is read whole. A budget can end the search at any time. Every measurement is stored, and the same
call continues from there.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import get_args

from rich.console import Console

from ...engine import tensor_parallel
from ...engine.model import Model
from ...errors import ConfigError, Setting
from ...scaling.lengths import format_length, parse_length
from ...scaling.rope import Scaler
from ...scaling.spec import Auto
from ..data import Text, load_text
from ..runs.result import Run
from .candidates import Objective, Tuned
from .factor_search import FactorSpace
from .rounds import Progress, Rounds, Search
from .text import TuneText, can_skim

__all__ = ["Progress", "tune"]


def tune(
    model: Model,
    target: int | str = "2x",
    *,
    text: str | Path | Text = "shakespeare",
    budget: float | None = None,
    objective: Objective = "loss",
    search: Search = "methods",
    largest_factor: float | None = None,
    keep_short: bool = False,
    ropes: Sequence[str | Scaler] | str | Scaler = (),
    out: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    console: Console | None = None,
) -> Tuned:
    """Find the scaler with the lowest loss for `model` at `target` tokens.

        tuned = rw.tune(model, "2x", text="book.txt", budget=1200)
        model.rope = tuned.winner.scaler

    Args:
        target: tokens, or "32k", or "2x" the trained length.
        text: the name of a built-in text, a file or folder, or a loaded text, with documents of
            `target` tokens.
        budget: seconds for measuring. None: no limit.
        objective: "loss" ranks readings by the loss on all scored tokens, "key-tokens" by that on
            the tokens that need far context.
        search: "methods" measures closed forms and their neighbours. "factors" also searches one
            LongRoPE factor for every rotary pair; it needs a compiled model.
        largest_factor: upper bound of those factors, above 1. None: the ratio of target and trained
            length, or the largest factor of the start if that is more.
        keep_short: if True, a scaler that may cost short texts more than 0.02 nats cannot win.
        ropes: further starting points, tried first.
        out: a folder. A search that was ended continues from its rows. None: nothing is stored.
        progress: called after every measurement.
        console: where a bar is drawn. None: no bar.

    Raises:
        ConfigError: the target is not beyond the trained length, or the search is unknown or
            impossible.
        DataError: the text is too short.
    """
    tensor_parallel.refuse("tune")
    if not isinstance(model, Model):
        raise ConfigError(f"tune needs a model that ropewalk.load gave, not {model!r:.100}")
    tokens = parse_length(str(target), model.trained_length)
    if tokens <= model.trained_length:
        raise ConfigError(
            f"target {format_length(tokens)} is not beyond the trained length {format_length(model.trained_length)}, "
            "which the untouched model reads; give a longer one, such as 2x"
        )
    _check_objective(objective, search)
    _check_search(model, tokens, search, largest_factor)
    ropes = (ropes,) if isinstance(ropes, str | Scaler) else ropes
    if any(str(rope).strip() == Auto.name for rope in ropes):
        raise ConfigError(
            "auto is no scaler but chooses among tuned ones; leave it out of ",
            Setting("rope", form="name", python="ropes"),
        )
    console = console or Console(quiet=True)
    document = text if isinstance(text, Text) else load_text(text)
    before = model.rope
    try:
        with nullcontext(out) if out is not None else tempfile.TemporaryDirectory(prefix="ropewalk-") as folder:
            run = Run(Path(folder))
            measured = TuneText(model, document, tokens, objective=objective, searches=search == "factors")
            rounds = Rounds(model, tokens, measured, run, budget, objective, keep_short, progress, console)
            return rounds.run(ropes, search, largest_factor)
    finally:
        model.rope = before


def _check_objective(objective: str, search: str) -> None:
    if objective not in get_args(Objective):
        raise ConfigError(f"unknown objective {objective!r}; choose one of {', '.join(get_args(Objective))}")
    if objective == "key-tokens" and search == "factors":
        raise ConfigError(
            Setting("search", "factors"),
            " ranks by skims, which leave out most of the text that key tokens need; use ",
            Setting("search", "methods"),
            " or ",
            Setting("objective", "loss"),
        )


def _check_search(model: Model, target: int, search: str, largest_factor: float | None) -> None:
    if search not in get_args(Search):
        raise ConfigError(f"unknown search {search!r}; choose one of {', '.join(get_args(Search))}")
    if search == "factors" and not can_skim(model):
        raise ConfigError(
            Setting("search", "factors"),
            " needs skimming, and only compiled models can skim; load the model on the CPU with ",
            Setting("compile", True),
            ", or use ",
            Setting("search", "methods"),
        )
    if search == "methods" and largest_factor is not None:
        raise ConfigError(
            Setting("largest_factor", f"{largest_factor:g}", "given"),
            " bounds searched factors, and ",
            Setting("search", "methods"),
            " searches none; use ",
            Setting("search", "factors"),
        )
    FactorSpace.around(Scaler(), model.spec, target, largest_factor)
