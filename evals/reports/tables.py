"""Tables of losses, scores and effective lengths, as grids, Markdown and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.storage import write_atomic
from ...errors import DataError
from ...scaling import format_length
from ..protocols.by_name import PROTOCOLS
from ..protocols.effective_length import (
    LEAST_FOUND,
    LEAST_KEPT,
    TOLERANCE,
    EffectiveLength,
    Reach,
    effective_length,
    length_or_more,
    reaches,
)
from ..protocols.fixed_target import FixedTarget, Repeat
from ..protocols.harm import Harm
from ..retrieval.score import ScoreGroup, TrialScore, score_groups
from ..retrieval.tasks import RULER
from ..runs import compare
from ..runs.compare import UNTOUCHED
from ..runs.result import Row, Run
from .grid import NOT_RUN, NOTHING, Grid, Shown, markdown_table

Show = Callable[[Row], Shown]


def extra_grids(group: Sequence[Row]) -> list[Grid]:
    """Methods down and contexts across, for everything that a protocol tells beside the loss."""
    tables = _TABLES.get(group[0]["protocol"], {})
    return [_extra_grid(group, title, note, show) for title, (note, show) in tables.items()]


def _extra_grid(group: Sequence[Row], title: str, note: str, show: Show) -> Grid:
    columns = compare.columns(group)
    rows = []
    for rope in compare.methods(group):
        measured = [compare.row_with_loss(group, rope, at) for at in columns]
        rows.append((rope, [NOTHING if row is None else show(row) for row in measured]))
    return Grid(title=title, note=note, columns=tuple(columns.values()), rows=rows)


def _extra_value(field: str, digits: str) -> Show:
    """The field of a row, and its interval below where there is one."""

    def show(row: Row) -> Shown:
        low, high = row.get(f"{field}_low"), row.get(f"{field}_high")
        small = () if low is None or high is None else (f"{low:{digits}} to {high:{digits}}",)
        return Shown(main=f"{row[field]:{digits}}", small=small)

    return show


_TABLES: dict[str, dict[str, tuple[str, Show]]] = {
    Harm.name: {
        "KL divergence from the untouched model, nats": (
            "Of the distribution of the next token; 0 is no harm.",
            _extra_value("kl", ".4f"),
        ),
        "Same likeliest token": (
            "Share of the tokens at which both models would write the same.",
            lambda row: Shown(main=f"{row['same_top1']:.1f} %"),
        ),
        "Loss difference to the untouched model, nats": ("Paired, token by token.", _extra_value("difference", "+.4f")),
    },
    Repeat.name: {
        "Gain from the repetition, nats": (
            "Loss on a passage after other text, less the loss on it where it stood before; paired.",
            _extra_value("gain", "+.3f"),
        ),
        "Loss after other text, nats": (
            "Of the same tokens.",
            lambda row: Shown(main=f"{row['fresh_loss']:.3f}"),
        ),
    },
}


_LOSS_RULE = (
    f"Loss: the largest context whose difference to the untouched model at its trained length has an upper bound of "
    f"at most +{TOLERANCE:g} nats. A longer one is undecided where the interval holds that bound, and fails where it "
    "lies above."
)
_SCORE_RULE = "{}: the largest length such that its lower bound, and those of all measured below it, keep {}."


def reach_table(run: Run) -> Grid | None:
    """Methods down, rules across, with the rules that were used; None where none has what it needs."""
    columns: dict[str, dict[str, Shown]] = {}
    notes: dict[str, None] = {}
    for group in compare.comparable_groups(run.rows):
        if group[0]["protocol"] == FixedTarget.name and (lengths := _reach_by_loss(run, group)):
            columns[_unused_name(f"loss on {compare.short(group[0]['text'])}", columns)] = lengths
            notes[_LOSS_RULE] = None
    for score_group in score_groups(run.rows):
        if by_score := reaches(score_group):
            columns[_unused_name(score_group.name, columns)] = {
                rope: _score_state(entry) for rope, entry in by_score.items()
            }
            notes[_score_rule(score_group)] = None
    if not columns:
        return None
    methods = sorted(dict.fromkeys(rope for entry in columns.values() for rope in entry), key=lambda r: r != UNTOUCHED)
    return Grid(
        title="Effective length" + (" by rule" if len(columns) > 1 else ""),
        note=" ".join([*notes, "Only measured lengths count."]),
        columns=tuple(columns),
        rows=[(rope, [entry.get(rope, NOTHING) for entry in columns.values()]) for rope in methods],
    )


def _score_state(entry: Reach) -> Shown:
    notes = [] if entry.state == "fails" else entry.notes
    return Shown(main=entry.state, small=tuple(notes), css="" if entry.length else "none")


def _score_rule(group: ScoreGroup) -> str:
    if group.suite == RULER:
        return _SCORE_RULE.format(group.name, f"{LEAST_KEPT:.0%} of the method's own score at the trained length")
    return _SCORE_RULE.format(group.name, f"{LEAST_FOUND:.0%}")


def _unused_name(name: str, taken: dict[str, dict[str, Shown]]) -> str:
    number = sum(title == name or title.startswith(f"{name} (") for title in taken) + 1
    return name if number == 1 else f"{name} ({number})"


def _reach_by_loss(run: Run, group: Sequence[Row]) -> dict[str, Shown]:
    delta = compare.deltas(run, group)
    lengths = {rope: effective_length(group, delta, rope) for rope in compare.methods(group)}
    longest = max(row["context"] for row in group)
    return {rope: _reach_state(reach, longest) for rope, reach in lengths.items() if reach is not None}


def _reach_state(reach: EffectiveLength, longest: int) -> Shown:
    """Reached, undecided or failed, and below it what is said of longer contexts."""
    small = [f"but not {_format_lengths(reach.breaks)}"] if reach.breaks else []
    if reach.undecided:
        small.append(f"{_format_lengths(reach.undecided)} undecided: {reach.remedy}")
    if reach.fails and (reach.length or reach.undecided):
        small.append(f"fails at {_format_lengths(reach.fails)}")
    if reach.length:
        return Shown(main=length_or_more(reach.length, longest), small=tuple(small))
    return Shown(main="undecided" if reach.undecided else "fails", small=tuple(small), css="none")


def _format_lengths(lengths: Sequence[int]) -> str:
    return ", ".join(map(format_length, lengths))


ScoreLine = tuple[str, list[TrialScore | None]]
"""A method or task, and its scores by length."""


def score_grids(group: ScoreGroup) -> list[Grid]:
    """Right answers and, where they are known, their log-probabilities by method and length; where
    there are several tasks, right answers by task and length for each method."""
    lines = [(rope, [group.score(rope, length) for length in group.lengths]) for rope in group.methods]
    depths = f", depths {', '.join(f'{depth:g}' for depth in group.depths)} together" if group.depths else ""
    alike = ", each task counting alike" if len(group.tasks) > 1 else ""
    answer = "chosen" if any("choice_margin" in row for row in group.rows) else "written"
    what = f"Share of the trials whose {answer} answer is right{depths}{alike}"
    tokens = f"Of the right answer's own tokens behind the prompt{depths}: a graded signal where no answer is right yet"
    grids = [_shares(group, "Right answers", what, lines)]
    if any(row["answer_logprob_per_token"] is not None for row in group.rows):
        title = "Log-probability of the right answer, nats a token"
        grids.append(_score_grid(group, title, f"{tokens}; 95% intervals.", lines, nats))
    if len(group.tasks) > 1:
        for rope in group.methods:
            lines = [(task, [group.score(rope, n, task=task) for n in group.lengths]) for task in group.tasks]
            grids.append(_shares(group, f"Right answers by task, {rope}", "Parts of an answer count", lines, "task"))
    return grids


def share(score: TrialScore) -> Shown:
    """`85% (64-95)`; without the interval where there are too few trials."""
    interval = (f"{100 * score.low:.0f}-{100 * score.high:.0f}",) if math.isfinite(score.low) else ()
    return Shown(main=f"{100 * score.mean:.0f}%", small=interval)


def nats(score: TrialScore) -> Shown:
    """`-1.204 (-1.310 to -1.101)`; without the interval where there are too few trials."""
    if not score.logprobs:
        return NOTHING
    low, high = score.nats_interval
    return Shown(main=f"{score.nats:.3f}", small=(f"{low:.3f} to {high:.3f}",) if math.isfinite(low) else ())


def _shares(group: ScoreGroup, title: str, what: str, lines: Sequence[ScoreLine], corner: str = "method") -> Grid:
    """Right answers. The number of trials is said in the note if it is the same in all cells, else
    in each."""
    trials = {score.trials for _, scores in lines for score in scores if score is not None}
    if len(trials) == 1:
        note = f"{what}; 95% intervals, n={trials.pop()} trials in each cell.{group.chance_note}"
        return _score_grid(group, title, note, lines, share, corner)
    return _score_grid(
        group, title, f"{what}; 95% intervals, n trials.{group.chance_note}", lines, _share_of_trials, corner
    )


def _share_of_trials(score: TrialScore) -> Shown:
    cell = share(score)
    return Shown(main=cell.main, small=(*cell.small, f"n={score.trials}"))


def _score_grid(
    group: ScoreGroup,
    title: str,
    note: str,
    lines: Sequence[ScoreLine],
    show: Callable[[TrialScore], Shown],
    corner: str = "method",
) -> Grid:
    rows = [(name, [NOT_RUN if score is None else show(score) for score in scores]) for name, scores in lines]
    return Grid(title=title, note=note, columns=tuple(map(format_length, group.lengths)), rows=rows, corner=corner)


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One method in one column.

    Args:
        row: the measured row, or None where there is no loss.
        reason: why there is none; empty where it was not tried.
        is_best: no method of the column has a lower loss to three digits, and there are others.
    """

    row: Row | None
    reason: str = ""
    is_best: bool = False

    @property
    def text(self) -> str:
        """`3.512` in nats per token, or `not run`."""
        if self.row is not None:
            return f"{self.row['loss']:.3f}"
        return f"not run ({self.reason})" if self.reason else "not run"

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% interval of the loss, where there were tokens enough for one."""
        if self.row is None or self.row.get("loss_low") is None or self.row.get("loss_high") is None:
            return None
        return self.row["loss_low"], self.row["loss_high"]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells by method and column; `caption` says what was measured on what."""

    caption: str
    methods: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[TableCell, ...], ...]

    def to_markdown(self) -> str:
        """A Markdown table under its caption, the best of each column in bold."""
        texts = [[f"**{cell.text}**" if cell.is_best else cell.text for cell in cells] for cells in self.cells]
        return markdown_table(self.caption, self.columns, zip(self.methods, texts, strict=True))


def loss_table(rows: Sequence[Row]) -> Table:
    """The table of one group: rows that differ only in method and in context or position bucket.

    Raises:
        DataError: no perplexity rows, or rows that were measured in different ways.
    """
    groups = compare.comparable_groups(rows)
    if len(groups) != 1:
        names = "; ".join(caption(group) for group in groups) or "none"
        raise DataError(f"a table needs perplexity rows of one group, not {len(groups)}: {names}")
    (group,) = groups
    methods, columns = compare.methods(group), compare.columns(group)
    grid = [[_cell(group, rope, at) for at in columns] for rope in methods]
    for index in range(len(columns)):
        texts = sorted((cells[index].text for cells in grid if cells[index].row), key=float)
        for cells in grid if len(texts) > 1 else ():
            if cells[index].text == texts[0]:
                cells[index] = TableCell(row=cells[index].row, is_best=True)
    return Table(
        caption=caption(group),
        methods=tuple(methods),
        columns=tuple(columns.values()),
        cells=tuple(tuple(cells) for cells in grid),
    )


def caption(group: Sequence[Row]) -> str:
    """What the rows of one group measured, in one line."""
    row = next((row for row in group if row.get("loss") is not None), group[0])
    scored = PROTOCOLS[row["protocol"]].scored(row) if row["protocol"] in PROTOCOLS else ""
    what = f"{row['protocol']}: {scored}" if scored else row["protocol"]
    model, text = compare.short(row["model"]), compare.short(row["text"])
    return f"Loss in nats per token, {model} ({row['dtype']}) on {text}; {what}."


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line per row with every field that any row has; nested values as `versions.torch`."""
    flat = [_flatten(row) for row in rows]
    fields = list(dict.fromkeys(field for row in flat for field in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return buffer.getvalue()


def write_tables(run: Run) -> tuple[Path, Path]:
    """Write table.md (tables of every group) and table.csv (every row, with its difference to the
    untouched model at its trained length); returns both paths."""
    groups = compare.comparable_groups(run.rows)
    markdown, csv_file = run.folder / "table.md", run.folder / "table.csv"
    texts = [
        text
        for group in groups
        for text in (loss_table(group).to_markdown(), *(grid.to_markdown() for grid in extra_grids(group)))
    ]
    for score_group in score_groups(run.rows):
        texts += [f"{score_group.caption}\n", *(grid.to_markdown() for grid in score_grids(score_group))]
    if (reaches := reach_table(run)) is not None:
        texts.append(reaches.to_markdown())
    write_atomic(markdown, ("\n".join(texts) or "Nothing has been measured yet.\n").encode())
    delta = {key: value for group in groups for key, value in compare.deltas(run, group).items()}
    long = []
    for row in run.rows:
        d = delta.get(row["key"])
        bounds = (d.mean, d.low, d.high) if d and d.has_interval else (d.mean if d else None, None, None)
        long.append({**row, **dict(zip(("delta", "delta_low", "delta_high"), bounds, strict=True))})
    write_atomic(csv_file, to_csv(long).encode())
    return markdown, csv_file


def _cell(group: Sequence[Row], rope: str, at: compare.Column) -> TableCell:
    row = compare.row_with_loss(group, rope, at)
    return TableCell(row=row, reason="" if row else compare.reason(compare.find_row(group, rope, at)))


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat
