"""What the rows of retrieval runs say, in plain sentences."""

from __future__ import annotations

from collections.abc import Iterable

from ...scaling import format_length
from ..protocols.effective_length import LEAST_FOUND, LEAST_KEPT, by_lower_bounds, length_or_more, reaches
from ..retrieval.score import ENOUGH, ScoreGroup, settings
from ..retrieval.tasks import RULER
from ..runs.compare import method_name
from ..runs.result import Row
from .score_grids import share


def retrieval_findings(rows: Iterable[Row]) -> list[str]:
    """Sentences computed from the retrieval rows, setting by setting.

    The best method at the longest length, effective lengths with their rule, and how few trials there were.
    """
    found = settings(rows)
    sentences = []
    for setting in found:
        prefix = f"[{setting.name}, {setting.measured_on}] " if len(found) > 1 else f"{setting.name}: "
        sentences += [prefix + sentence for sentence in (*_longest(setting), *_reaches(setting), *_few(setting))]
    return sentences


def _longest(setting: ScoreGroup) -> list[str]:
    at = next((n for n in reversed(setting.lengths) if any(setting.score(rope, n) for rope in setting.methods)), None)
    if at is None:
        return ["no method has every task measured at any length."]
    scores = {rope: own for rope in setting.methods if (own := setting.score(rope, at)) is not None}
    best = max(scores, key=lambda rope: scores[rope].mean)
    parts = [
        f"at {format_length(at)}, the longest measured, {method_name(best)} is right in {share(scores[best]).text} of "
        f"{scores[best].trials} trials"
    ]
    if len(scores) > 1:
        apart = [rope for rope in scores if rope != best and scores[rope].high < scores[best].low]
        level = [rope for rope in scores if rope not in (best, *apart)]
        if apart:
            parts.append(f"intervals of {_names(apart)} lie below")
        if level:
            parts.append(f"intervals overlap with {_names(level)}")
    return [f"{'; '.join(parts)}."]


def _reaches(setting: ScoreGroup) -> list[str]:
    parts = []
    for rope, found in reaches(setting).items():
        part = f"{method_name(rope)} {length_or_more(found.length, found.longest)}"
        if found.certain != found.length:
            part += f" ({by_lower_bounds(found.certain, found.longest)})"
        parts.append(part)
    if not parts:
        return []
    own = f"{LEAST_KEPT:.0%} of the method's own score at {format_length(setting.trained_length)}"
    least = own if setting.suite == RULER else f"{LEAST_FOUND:.0%}"
    rule = f"largest measured length that scores at least {least}, as do all measured below it"
    return [f"effective length ({rule}): {'; '.join(parts)}."]


def _few(setting: ScoreGroup) -> list[str]:
    """A warning where a cell of the heat map, or of a task, has fewer trials than `ENOUGH`."""
    cells = [
        found
        for rope in setting.methods
        for length in setting.lengths
        for task in setting.tasks
        for depth in (setting.depths or (None,))
        if (found := setting.score(rope, length, task=task, depth=depth)) is not None
    ]
    fewest = min(cell.trials for cell in cells)
    if fewest >= ENOUGH:
        return []
    wide = "the interval of 50% is 24% to 76% with 10 trials and 30% to 70% with 20"
    return [f"warning: cells of one length and depth or task have as few as {fewest} trials; {wide}."]


def _names(ropes: Iterable[str]) -> str:
    return ", ".join(map(method_name, ropes))
