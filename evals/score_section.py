"""The report's section on retrieval rows of one setting."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..scaling import format_length
from .grid import NOTHING, Grid, Section, Shown, interval, span
from .retrieval_score import Score, Setting

_SUITES = {
    "passkey": "A number of five digits stands in a long text of the same few sentences, and is asked for at its end.",
    "niah": "A sentence with a number stands in a real text, and the number is asked for at its end.",
    "kv": "One of many random pairs of a JSON object is asked for.",
    "ruler-11-offline": "Eleven tasks of RULER (arXiv 2404.06654) that need no download, on another text: the scores "
    "are not RULER's. Every task counts alike.",
}


def score_section(setting: Setting) -> Section:
    """Right answers and log-probabilities by method and length, and by task where there are several."""
    by_method = [(rope, setting.scores(rope)) for rope in setting.methods]
    grids = [
        _grid(
            "Right answers",
            "Share of the trials whose written answer is right, with 95% intervals; trials below.",
            setting,
            [(rope, [_share(found.get(length)) for length in setting.lengths]) for rope, found in by_method],
        ),
        _grid(
            "Log-probability of the right answer, nats a token",
            "Of the right answer's own tokens behind the prompt: a graded signal where no answer is right yet.",
            setting,
            [(rope, [_nats(found.get(length)) for length in setting.lengths]) for rope, found in by_method],
        ),
    ]
    if len(setting.tasks) > 1:
        for rope in setting.methods:
            scores = [
                (task, [_share(setting.score(rope, length, task=task)) for length in setting.lengths])
                for task in setting.tasks
            ]
            grids.append(_grid(f"Right answers by task, {rope}", "Parts of an answer count.", setting, scores, "task"))
    return Section(caption=f"{setting.name}: {setting.measured_on}.", grids=grids, method=_method(setting))


def _grid(title: str, note: str, setting: Setting, rows: list[tuple[str, list[Shown]]], corner: str = "method") -> Grid:
    return Grid(title=title, note=note, columns=tuple(map(format_length, setting.lengths)), rows=rows, corner=corner)


def _share(score: Score | None) -> Shown:
    if score is None:
        return NOTHING
    small = (f"{100 * score.low:.0f} to {100 * score.high:.0f} %",) if math.isfinite(score.low) else ()
    return Shown(main=f"{100 * score.mean:.0f} %", small=(*small, f"n = {score.trials}"))


def _nats(score: Score | None) -> Shown:
    if score is None:
        return NOTHING
    low, high = score.nats_interval
    small = (interval(low, high),) if math.isfinite(low) else ()
    return Shown(main=f"{score.nats:.3f}".replace("-", "−"), small=small)


def _method(setting: Setting) -> dict[str, str]:
    row, rows = setting.rows[0], setting.rows
    depths = ", ".join(f"{depth:g}" for depth in setting.depths) or "chosen by the seed"
    return {
        "Task": _SUITES[setting.suite],
        "Trials": f"{len(rows)} in all, {_range([one['prompt_tokens'] for one in rows])} tokens of prompt",
        "Depths": depths,
        **({"Text": f"{row['text']}, sha256 {row['text_sha256']}"} if row.get("text") else {}),
        "Model": f"{row['model']}, trained length {row['trained_length']:,} tokens, {row['dtype']} on {row['device']}",
        "Intervals": "95%: Wilson's for answers that are right or wrong, bootstrap over trials for the others.",
    }


def _range(values: Sequence[int]) -> str:
    return span([min(values), max(values)] if min(values) < max(values) else [min(values)])
