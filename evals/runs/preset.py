"""The presets of `ropewalk all`: what is measured in about 1 minute, 10 minutes, or without a
limit."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import DataError
from ...scaling.lengths import format_length, parse_length
from ...scaling.rope import Scaler
from ..data import Text
from ..models.local import LocalModel
from ..protocols.by_name import protocol
from ..protocols.fixed_target import usual_target
from ..protocols.perplexity_cell import cells as perplexity_cells
from ..retrieval.cells import cells as retrieval_cells
from ..retrieval.tasks import RULER, SUITES, TASKS
from .cell import Cell

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What `ropewalk all` measures. Lengths are written as in the shell: `512`, `8k`, or `2x` the
    trained length.

    Args:
        minutes: time for measuring. The last cells that do not fit are left out. None: no limit.
        loss: contexts of the fixed-target curve.
        target: tokens scored at the end of each context, at most half of the shortest.
        samples: places in the text.
        by_position: length of the one long pass.
        harm: contexts of the harm within the trained length. Longer ones are cut to the trained
            length.
        passkey: lengths of the passkey prompts.
        passkey_trials: trials at each of three depths.
        ruler: lengths of the RULER-11 prompts.
        ruler_trials: trials of each task.
        ruler_tasks: tasks of RULER-11.
    """

    minutes: float | None
    loss: tuple[str, ...]
    target: int
    samples: int
    by_position: tuple[str, ...]
    harm: tuple[str, ...]
    passkey: tuple[str, ...]
    passkey_trials: int
    ruler: tuple[str, ...]
    ruler_trials: int
    ruler_tasks: tuple[str, ...] = SUITES[RULER]

    def cells(self, model: LocalModel, text: Text, scalers: Sequence[Scaler]) -> list[Cell]:
        """The cells in the order of measuring: the loss first, and each kind for all scalers before
        the next kind."""
        L = model.trained_length

        def lengths(texts: Sequence[str]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(parse_length(text, L) for text in texts))

        planned: list[Cell] = []
        within = tuple(dict.fromkeys(min(length, L) for length in lengths(self.harm)))
        curves = (
            ("fixed-target", lengths(self.loss), scalers),
            ("harm", within, [scaler for scaler in scalers if scaler.parts]),
        )
        for name, contexts, chosen in curves:
            target = usual_target(contexts, self.target)
            curve = protocol(name, contexts, target=target, samples=self.samples)
            planned += perplexity_cells(model, text, chosen, curve)

        def retrieval(tasks: Sequence[str], length_texts: Sequence[str], trials: int, **settings: Any) -> list[Cell]:
            """Cells of the tasks at the lengths that hold their prompts. A short model holds few."""
            cells, unfit, why = [], [], ""
            for length in lengths(length_texts):
                for task in tasks:
                    try:
                        cells += retrieval_cells(
                            model, [TASKS[task]], scalers, contexts=[length], trials=trials, **settings
                        )
                    except DataError as error:
                        why = why or str(error)
                        unfit.append(f"{task} at {format_length(length)}")
            if unfit:
                _LOG.warning("left out because their prompts do not fit: %s (%s)", ", ".join(unfit), why)
            return sorted(cells, key=lambda cell: scalers.index(cell.scaler))

        planned += retrieval(["passkey"], self.passkey, self.passkey_trials, depths=_DEPTHS)
        planned += retrieval(self.ruler_tasks, self.ruler, self.ruler_trials, text=text)
        if self.by_position:
            planned += perplexity_cells(model, text, scalers, protocol("by-position", lengths(self.by_position)))
        return planned


_DEPTHS = (0.1, 0.5, 0.9)

PRESETS = {
    "smoke": Preset(
        minutes=1,
        loss=("256", "512"),
        target=128,
        samples=1,
        by_position=(),
        harm=("512",),
        passkey=("512",),
        passkey_trials=1,
        ruler=("512",),
        ruler_trials=1,
        ruler_tasks=("niah_single_2", "niah_multikey_1"),
    ),
    "quick": Preset(
        minutes=10,
        loss=("0.25x", "1x", "1.5x"),
        target=1024,
        samples=1,
        by_position=(),
        harm=("0.25x",),
        passkey=("0.125x", "0.25x"),
        passkey_trials=2,
        ruler=("0.125x",),
        ruler_trials=2,
    ),
    "full": Preset(
        minutes=None,
        loss=("0.25x", "0.5x", "1x", "2x", "4x"),
        target=1024,
        samples=8,
        by_position=("2x",),
        harm=("0.25x", "1x"),
        passkey=("0.5x", "1x", "2x", "4x"),
        passkey_trials=20,
        ruler=("0.5x", "1x", "2x"),
        ruler_trials=20,
    ),
}
"""About 1 minute, 10 minutes and many hours on two cores, with SmolLM2-135M and two scalers."""
