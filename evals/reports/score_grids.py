"""Tables of retrieval: scores by method and length, by task and length, and the answers' log-probabilities."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from ...scaling import format_length
from ..retrieval.score import Score, ScoreGroup
from .grid import NOT_RUN, NOTHING, Grid, Shown

Line = tuple[str, list[Score | None]]
"""A method or task, and its scores by length."""


def score_grids(setting: ScoreGroup) -> list[Grid]:
    """Right answers and, where they are known, their log-probabilities by method and length; where there are several
    tasks, right answers by task and length for each method."""
    lines = [(rope, [setting.score(rope, length) for length in setting.lengths]) for rope in setting.methods]
    depths = f", depths {', '.join(f'{depth:g}' for depth in setting.depths)} together" if setting.depths else ""
    alike = ", each task counting alike" if len(setting.tasks) > 1 else ""
    what = f"Share of the trials whose written answer is right{depths}{alike}"
    tokens = f"Of the right answer's own tokens behind the prompt{depths}: a graded signal where no answer is right yet"
    grids = [_shares(setting, "Right answers", what, lines)]
    if any(row["answer_logprob_per_token"] is not None for row in setting.rows):
        title = "Log-probability of the right answer, nats a token"
        grids.append(_grid(setting, title, f"{tokens}; 95% intervals.", lines, nats))
    if len(setting.tasks) > 1:
        for rope in setting.methods:
            lines = [(task, [setting.score(rope, n, task=task) for n in setting.lengths]) for task in setting.tasks]
            grids.append(_shares(setting, f"Right answers by task, {rope}", "Parts of an answer count", lines, "task"))
    return grids


def share(score: Score) -> Shown:
    """`85% (64-95)`; without the interval where there are too few trials."""
    interval = (f"{100 * score.low:.0f}-{100 * score.high:.0f}",) if math.isfinite(score.low) else ()
    return Shown(main=f"{100 * score.mean:.0f}%", small=interval)


def nats(score: Score) -> Shown:
    """`-1.204 (-1.310 to -1.101)`; without the interval where there are too few trials."""
    if not score.logprobs:
        return NOTHING
    low, high = score.nats_interval
    return Shown(main=f"{score.nats:.3f}", small=(f"{low:.3f} to {high:.3f}",) if math.isfinite(low) else ())


def _shares(setting: ScoreGroup, title: str, what: str, lines: Sequence[Line], corner: str = "method") -> Grid:
    """Right answers. The number of trials is said in the note if it is the same in all cells, else in each."""
    trials = {score.trials for _, scores in lines for score in scores if score is not None}
    if len(trials) == 1:
        note = f"{what}; 95% intervals, n={trials.pop()} trials in each cell."
        return _grid(setting, title, note, lines, share, corner)
    return _grid(setting, title, f"{what}; 95% intervals, n trials.", lines, _share_of_trials, corner)


def _share_of_trials(score: Score) -> Shown:
    shown = share(score)
    return Shown(main=shown.main, small=(*shown.small, f"n={score.trials}"))


def _grid(
    setting: ScoreGroup,
    title: str,
    note: str,
    lines: Sequence[Line],
    show: Callable[[Score], Shown],
    corner: str = "method",
) -> Grid:
    rows = [(name, [NOT_RUN if score is None else show(score) for score in scores]) for name, scores in lines]
    return Grid(title=title, note=note, columns=tuple(map(format_length, setting.lengths)), rows=rows, corner=corner)
