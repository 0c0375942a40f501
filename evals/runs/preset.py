"""What `ropewalk all` measures, by the time there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ...scaling.lengths import parse_length
from ...scaling.rope import Scaler
from ..data import Text
from ..protocols.by_name import protocol
from ..protocols.perplexity_cell import cells as perplexity_cells
from ..retrieval.cells import cells as retrieval_cells
from ..retrieval.tasks import RULER, SUITES, TASKS
from ..subjects.subject import Subject
from .cell import Cell


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Lengths are as in the shell: `512`, `8k`, or `2x` the trained length.

    Args:
        minutes: for measuring; what does not fit is left out, the last things first. None takes what it takes.
        loss: contexts of the fixed-target curve.
        target, samples: tokens scored at the end of each context, and places in the text.
        by_position: length of the one long pass.
        harm: contexts at which the harm within the trained length is measured; longer ones are cut to it.
        passkey, passkey_trials: lengths, and trials at each of three depths.
        ruler, ruler_trials: lengths, and trials of each task.
        ruler_tasks: of RULER-11.
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

    def cells(self, subject: Subject, text: Text, scalers: Sequence[Scaler]) -> list[Cell]:
        """The cells in the order of measuring: the loss first, and every kind for all scalers before the next."""
        L = subject.trained_length

        def lengths(asked: Sequence[str]) -> tuple[int, ...]:
            return tuple(dict.fromkeys(parse_length(one, L) for one in asked))

        found: list[Cell] = []
        curve = protocol("fixed-target", lengths(self.loss), target=self.target, samples=self.samples)
        found += perplexity_cells(subject, text, scalers, curve)
        within = tuple(dict.fromkeys(min(length, L) for length in lengths(self.harm)))
        harm = protocol("harm", within, target=self.target, samples=self.samples)
        found += perplexity_cells(subject, text, [one for one in scalers if one.parts], harm)
        found += retrieval_cells(
            subject,
            [TASKS["passkey"]],
            scalers,
            contexts=lengths(self.passkey),
            depths=_DEPTHS,
            trials=self.passkey_trials,
        )
        tasks = [TASKS[name] for name in self.ruler_tasks]
        found += retrieval_cells(
            subject, tasks, scalers, contexts=lengths(self.ruler), trials=self.ruler_trials, text=text
        )
        if self.by_position:
            found += perplexity_cells(subject, text, scalers, protocol("by-position", lengths(self.by_position)))
        return found


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
"""About 1 minute, 10 minutes and many hours on two cores with SmolLM2-135M and two scalers."""
