"""The text of a tuning run, and the cells that skim it or read it whole."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ...engine.model import Model
from ...engine.runners.decoder_runner import DecoderRunner
from ...engine.runners.skim import Sample
from ...errors import DataError
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..data import Text
from ..models.local import LocalModel
from ..models.measured import Advance, MeasuredModel
from ..protocols.fixed_target import FixedTarget
from ..protocols.longppl import JudgeCell
from ..protocols.perplexity_cell import PerplexityCell, Source
from ..protocols.protocol import Window, tokens_sha256
from ..runs.cell import Cell, shared_recipe
from ..runs.result import Losses, Row, Run, loss_text
from . import key_tokens
from .candidates import Objective


def can_skim(model: Model) -> bool:
    """True if an engine of our own runs the model. Only these can skim."""
    return model.is_compiled


@dataclass(frozen=True, kw_only=True)
class SkimCell(Cell):
    """The loss of the last tokens of a window, predicted from a sample of its tokens.

    Args:
        window: of `context` tokens.
        sample: positions of the tokens that are read. The last ones are scored.
        recipe: the recipe of its row.
    """

    scaler: Scaler
    context: int
    window: Window
    sample: Sample
    recipe: dict[str, Any]

    @property
    def label(self) -> str:
        return f"{format_length(len(self.sample.positions))} of {format_length(self.context)}"

    @property
    def pass_lengths(self) -> list[int]:
        return [len(self.sample.positions)]

    def row_recipes(self) -> list[dict[str, Any]]:
        return [self.recipe]

    def measure(self, model: MeasuredModel, run: Run, advance: Advance) -> list[Row]:
        assert isinstance(model, LocalModel), "only a local model can skim"
        started = time.perf_counter()
        ids = [self.window.ids[place] for place in self.sample.positions.tolist()]
        scored = ids[self.window.first - len(self.window.ids) :]
        with model.running(self.context) as runner:
            assert isinstance(runner, DecoderRunner)
            logits = runner.skim(ids, self.sample, len(scored) + 1)[:-1]
        targets = torch.tensor(scored, device=logits.device)[:, None]
        losses = (logits.logsumexp(-1) - logits.gather(-1, targets)[:, 0]).cpu().numpy()
        advance(0, len(ids))
        measured = {
            "loss": float(losses.mean(dtype="float64")),
            "tokens_sha256": tokens_sha256(scored),
            "seconds": time.perf_counter() - started,
        }
        return [run.add(self.recipe, measured, losses)]

    def outcome(self, rows: Sequence[Row]) -> str:
        return f"{loss_text(rows[0])}, skimmed"


MOST_PLACES = 9
"""The number of places that the last round reads."""

_READ_SHARE = 8  # a skim reads one token in this many, but not less than it needs
_SEARCHED = 2048  # tokens scored in each evaluation of a search, at least this many
_SEARCHED_PLACES = (2, 16)


class TuneText:
    """Windows of `target` tokens of a text, for a model.

    Args:
        objective: which of the tokens that are read whole count.
        searches: also provide places for a search of factors. They differ from the places that are
            read whole.

    Raises:
        DataError: the text is too short.
    """

    def __init__(self, model: Model, text: Text, target: int, *, searches: bool, objective: Objective = "loss") -> None:
        self._model, self._target = model, target
        self._scored = min(1024, target // 4)
        if objective == "key-tokens":  # few tokens are key tokens, so more are scored
            self._scored = min(4096, target // 4, model.trained_length // 2)
        self._recipe_model = LocalModel(model)
        self._protocol = self._places(MOST_PLACES)
        protocol = self._places(MOST_PLACES + self._search_places) if searches else self._protocol
        self.source = Source.of(text, model.tokenizer, protocol)
        self.windows = self._windows(self._protocol)
        self.judge = self._judge() if objective == "key-tokens" else None
        self._keys: key_tokens.Keys | None = None
        self.searched = self._unread_windows(self._windows(protocol)) if searches else []

    @cached_property
    def sample(self) -> Sample:
        """The positions to skim. Half of them are the end of the window; its last three quarters
        have the scored tokens."""
        read = max(min(self._target // _READ_SHARE, 4096), min(self._target // 2, 1024))
        local = read // 2
        stretch = max(8, min(64, (read - local) // 8))
        return Sample.of(self._target, local=local, far=read - local, stretch=stretch)

    def skim(self, scaler: Scaler, window: Window) -> SkimCell:
        """The cell that skims `window`."""
        scored = self._skim_scored
        recipe = self._shared(scaler, window) | {
            "task": "skim",
            "target": scored,
            "read": len(self.sample.positions),
            "local": self._local,
        }
        cut = Window(ids=window.ids, first=len(window.ids) - scored, place=window.place)
        return SkimCell(scaler=scaler, context=self._target, window=cut, sample=self.sample, recipe=recipe)

    def read(self, scaler: Scaler, window: Window) -> PerplexityCell:
        """The cell that reads `window` whole."""
        recipe = self._shared(scaler, window) | {"task": "tune", "protocol": FixedTarget.name, "target": self._scored}
        return PerplexityCell(
            scaler=scaler, context=self._target, protocol=self._protocol, windows=(window,), recipe=recipe
        )

    def choose_keys(self, run: Run) -> None:
        """Choose the tokens that count, from the losses of `judge`. Places with too few are left out."""
        if self.judge is not None:
            self._keys = key_tokens.choose(self.judge, self.windows, run)
            self.windows = [window for window in self.windows if window.place in self._keys]

    def counted(self, losses: Losses, place: str) -> Losses:
        """Of the losses of a reading, those of the tokens that count."""
        return losses if self._keys is None else losses[self._keys[place]]

    def _judge(self) -> JudgeCell:
        recipe = shared_recipe(self._recipe_model, self.source) | {"target": self._scored}
        return key_tokens.judge(self.windows, self._model.trained_length, self.source.start.prefix, recipe)

    @property
    def _local(self) -> int:
        return int((self.sample.stretches == self.sample.stretches[-1]).sum())

    @property
    def _skim_scored(self) -> int:
        return min(self._scored, 3 * self._local // 4)

    @property
    def _search_places(self) -> int:
        """The number of places for a search."""
        fewest, most = _SEARCHED_PLACES
        return min(max(math.ceil(_SEARCHED / self._skim_scored), fewest), most)

    def _places(self, samples: int) -> FixedTarget:
        return FixedTarget(contexts=(self._target,), target=self._scored, samples=samples)

    def _windows(self, protocol: FixedTarget) -> list[Window]:
        return protocol.windows(self.source.documents, self._target, self.source.start)

    def _unread_windows(self, windows: list[Window]) -> list[Window]:
        """The last windows whose scored tokens are not scored in the windows that are read whole."""
        read = [window.place.split(":") for window in self.windows]

        def is_unread(window: Window) -> bool:
            document, end = window.place.split(":")
            return all(document != other or abs(int(end) - int(place)) >= self._scored for other, place in read)

        unread = [window for window in reversed(windows) if is_unread(window)][: self._search_places]
        if not unread:
            raise DataError(
                f"the text {self.source.name!r} has {len(self.windows)} places with {self._target} tokens before "
                "them, and all of them are read; a search needs others: give a longer text"
            )
        return unread

    def _shared(self, scaler: Scaler, window: Window) -> dict[str, Any]:
        return shared_recipe(self._recipe_model, self.source) | {
            "rope": str(scaler),
            "context": self._target,
            "places": window.place,
        }
