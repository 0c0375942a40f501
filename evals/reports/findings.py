"""Sentences that say what the rows of a run show."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...scaling import format_length
from ..protocols.effective_length import (
    LEAST_FOUND,
    LEAST_KEPT,
    TOLERANCE,
    effective_length,
    reaches,
)
from ..protocols.fixed_target import Repeat
from ..protocols.harm import Harm
from ..retrieval.score import ENOUGH, ScoreGroup, score_groups
from ..retrieval.tasks import RULER
from ..runs import compare
from ..runs.compare import UNTOUCHED, Column, Difference, method_name
from ..runs.result import Row, Run
from .tables import share


def findings(run: Run) -> list[str]:
    """Sentences computed from the perplexity rows of `run`, group by group.

    How far the untouched model goes, the best method at the longest context, what each method
    reaches, what it costs within the trained length, and what was not run; `verdicts` sums it up.
    Differences are paired, with 95% intervals; where the interval holds zero the sentence says that
    the two cannot be told apart.
    """
    groups = compare.comparable_groups(run.rows)
    if not groups:
        return ["No perplexity row has been measured yet."]
    sentences = []
    for rows in groups:
        view = _View(run, rows)
        prefix = f"[{_group_name(rows)}] " if len(groups) > 1 else ""
        if rows[0]["protocol"] == Harm.name:
            said = [*harm_findings(rows), *_missing(view)]
        elif rows[0]["protocol"] == Repeat.name:
            said = [*repeat_findings(rows), *_missing(view)]
        elif any(row.get("loss") is not None for row in rows):
            said = [
                *_untouched(view),
                *_longest(view),
                *_effective_lengths(view),
                *_costs(view),
                *_missing(view),
            ]
        else:
            said = _missing(view)
        sentences += [prefix + sentence for sentence in said]
    return sentences


class _View:
    """The rows of one group, their names, and their differences to the untouched model, computed
    once."""

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, rows
        self.protocol: str = rows[0]["protocol"]
        self.trained_length: int = rows[0]["trained_length"]
        self.methods = compare.methods(rows)
        self.scalers = [rope for rope in self.methods if rope != UNTOUCHED]
        self.columns = compare.columns(rows)
        self.delta = compare.deltas(run, rows)

    def row(self, rope: str, at: Column) -> Row | None:
        return compare.row_with_loss(self.rows, rope, at)

    def difference(self, a: Row | None, b: Row | None) -> Difference | None:
        return compare.difference(self.run, a, b)

    def place(self, at: Column) -> str:
        """`at 8k`, or `in positions 4k-8k`."""
        return f"{'in positions' if self.protocol == 'by-position' else 'at'} {self.columns[at]}"


def _group_name(rows: Sequence[Row]) -> str:
    row = rows[0]
    context = f" over {format_length(row['context'])}" if row["protocol"] == "by-position" else ""
    target = f", last {row['target']} tokens" if row.get("target") else ""
    return f"{row['protocol']}{context}{target}, {compare.short(row['model'])} on {compare.short(row['text'])}"


def _untouched(view: _View) -> list[str]:
    """The untouched model at its trained length and at twice that (or the next context beyond)."""
    trained = format_length(view.trained_length)
    rows = {at: row for at in view.columns if (row := view.row(UNTOUCHED, at))}
    if not rows:
        return ["The untouched model was not run, so the methods have no baseline."]
    within = [at for at in rows if at[1] <= view.trained_length]
    beyond = [at for at in rows if at[1] > view.trained_length]
    sentences = []
    if view.protocol == "fixed-target" and compare.reference(view.rows) is None:
        missing = f"The untouched model was not run at its trained length ({trained})"
        sentences.append(f"{missing}, so no difference to it can be given.")
    if within:
        note = ", its trained length" if within[-1] == (0, view.trained_length) else ""
        sentences.append(f"The untouched model has a loss of {_loss(rows[within[-1]])} {view.place(within[-1])}{note}.")
    if not beyond:
        return [*sentences, f"The untouched model was not run beyond its trained length ({trained})."]
    at = next((at for at in beyond if at[1] >= 2 * view.trained_length), beyond[-1])
    place = _capital(view.place(at))
    if view.protocol != "by-position":
        place += f" ({at[1] / view.trained_length:.3g} times the trained length)"
    loss, change = _loss(rows[at]), view.delta.get(rows[at]["key"])
    if change is None or not change.has_interval:
        return [*sentences, f"{place} the untouched model has a loss of {loss}."]
    if change.is_tie:
        return [
            *sentences,
            f"{place} the loss of the untouched model is not distinguishable from that: {loss}, {change}.",
        ]
    verb = "rises" if change.mean > 0 else "falls"
    return [*sentences, f"{place} the loss of the untouched model {verb} to {loss}, {change}."]


def _longest(view: _View) -> list[str]:
    """The best method in the longest column, against the untouched model and the other methods
    there."""
    if not view.scalers:
        return ["No method was run, only the untouched model."]
    at = next((at for at in reversed(view.columns) if any(view.row(rope, at) for rope in view.scalers)), None)
    if at is None:
        return ["No method has a result, only the untouched model."]
    where = _capital(view.place(at))
    where += ", the longest measured," if at == max(view.columns) else ", the longest that a method was run at,"
    rows = {rope: row for rope in view.methods if (row := view.row(rope, at))}
    best = min(rows, key=lambda rope: rows[rope]["loss"])
    winner, plain = rows[best], rows.get(UNTOUCHED)
    change = view.difference(winner, plain)
    if best == UNTOUCHED:
        none_helped = "no method helped: " if at[1] > view.trained_length else ""
        sentence = f"{where} {none_helped}the untouched model has the lowest loss, {_loss(winner)}"
    else:
        sentence = f"{where} {best} has the lowest loss, {_loss(winner)}"
        if plain is None:
            sentence += "; the untouched model was not run there"
        else:
            sentence += f", against {plain['loss']:.3f} untouched" + (f": {change}" if change else "")
            sentence += "; the two are not distinguishable" if change and change.is_tie else ""
    sentences = [f"{sentence}."]
    # The sentence above has held the winner against the untouched model already.
    pairs = {rope: view.difference(row, winner) for rope, row in rows.items() if rope not in (best, UNTOUCHED)}
    ties = [rope for rope, pair in pairs.items() if pair is not None and pair.is_tie]
    if ties:
        sentences.append(f"Not distinguishable from {method_name(best)} there: {', '.join(ties)}.")
    delta = view.delta.get(winner["key"])
    if best != UNTOUCHED and delta is not None and delta.has_interval:
        against = f"the untouched model at its trained length ({format_length(view.trained_length)})"
        sentences.append(f"Against {against} it is {_verdict(delta)}: {delta}.")
    return sentences


def _verdict(change: Difference) -> str:
    if change.low > 0:
        return "worse"
    return "better" if change.high < 0 else "not distinguishable"


def _effective_lengths(view: _View) -> list[str]:
    lengths = {rope: effective_length(view.rows, view.delta, rope) for rope in view.methods}
    parts = [f"{method_name(rope)} {reach}" for rope, reach in lengths.items() if reach is not None]
    if not parts:
        return []
    trained = format_length(view.trained_length)
    rule = f"the difference to the untouched model at {trained} has an upper bound of at most +{TOLERANCE:g} nats"
    return [f"Effective length ({rule}): {'; '.join(parts)}."]


def _costs(view: _View) -> list[str]:
    """The largest difference of each method to the untouched model in the same column, within
    training."""
    within = [at for at in view.columns if at[1] <= view.trained_length]
    parts = []
    for rope in view.scalers if within else ():
        pairs = {at: view.difference(view.row(rope, at), view.row(UNTOUCHED, at)) for at in within}
        known = {at: pair for at, pair in pairs.items() if pair is not None}
        if not known:
            parts.append(f"{rope} not measured")
            continue
        at = max(known, key=lambda at: known[at].mean)
        if all(pair.is_exactly_zero for pair in known.values()):
            parts.append(f"{rope} exactly nothing")
        else:
            certain = ", not distinguishable from the untouched model" if known[at].is_tie else ""
            parts.append(f"{rope} {known[at]} {view.place(at)}{certain}")
    if not parts:
        return []
    trained = format_length(view.trained_length)
    same = "in the same positions" if view.protocol == "by-position" else "at the same context"
    what = f"Cost within the trained length ({trained}), the largest difference to the untouched model {same}"
    return [f"{what}: {'; '.join(parts)}."]


def _missing(view: _View) -> list[str]:
    parts = []
    for rope in view.methods:
        for at, name in view.columns.items():
            if view.row(rope, at) is None:
                why = compare.reason(compare.find_row(view.rows, rope, at))
                parts.append(f"{method_name(rope)} at {name}" + (f" ({why})" if why else ""))
    return [f"Not run: {', '.join(parts)}."] if parts else []


def _loss(row: Row) -> str:
    return f"{row['loss']:.3f} nats per token (perplexity {row['perplexity']:.4g})"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def harm_findings(rows: Sequence[Row]) -> list[str]:
    """For every method, what it costs at the context where it costs most."""
    parts = []
    for rope in compare.methods(rows):
        measured = [row for row in rows if row["rope"] == rope and row.get("loss") is not None]
        if measured:
            worst = max(measured, key=lambda row: float(row["kl"]))
            parts.append(
                f"{rope} moves the distribution of the next token by {worst['kl']:.4f} nats (KL) at "
                f"{format_length(worst['context'])}, keeps the likeliest one in {worst['same_top1']:.1f} % of the "
                f"places, and changes the loss by {_stored_difference(worst, 'difference')}"
            )
    return [f"Harm within the trained length, where it is largest: {'; '.join(parts)}."] if parts else []


def repeat_findings(rows: Sequence[Row]) -> list[str]:
    """For every method, what a repetition gives at the longest context."""
    measured = [row for row in rows if row.get("loss") is not None]
    if not measured:
        return []
    longest = max(row["context"] for row in measured)
    parts = [
        f"{compare.method_name(row['rope'])} {_stored_difference(row, 'gain')}, of {row['fresh_loss']:.3f}"
        for row in measured
        if row["context"] == longest
    ]
    return [
        f"What it gains, at {format_length(longest)}, from a passage that it has read before, nats per token of that "
        f"passage: {'; '.join(parts)}."
    ]


def _stored_difference(row: Row, field: str) -> Difference:
    low, high = (row.get(f"{field}_{bound}") for bound in ("low", "high"))
    unknown = float("nan")
    return Difference(mean=row[field], low=unknown if low is None else low, high=unknown if high is None else high)


def retrieval_findings(rows: Iterable[Row]) -> list[str]:
    """Sentences computed from the retrieval rows, group by group.

    The best method at the longest length, effective lengths with their rule, and how few trials
    there were.
    """
    groups = score_groups(rows)
    sentences = []
    for group in groups:
        prefix = f"[{group.name}, {group.measured_on}] " if len(groups) > 1 else f"{group.name}: "
        sentences += [
            prefix + sentence for sentence in (*_longest_scores(group), *_score_reaches(group), *_few_trials(group))
        ]
    return sentences


def _longest_scores(group: ScoreGroup) -> list[str]:
    at = next((n for n in reversed(group.lengths) if any(group.score(rope, n) for rope in group.methods)), None)
    if at is None:
        return ["no method has every task measured at any length."]
    scores = {rope: score for rope in group.methods if (score := group.score(rope, at)) is not None}
    best = max(scores, key=lambda rope: scores[rope].mean)
    parts = [
        f"at {format_length(at)}, the longest measured, {method_name(best)} is right in {share(scores[best]).text} of "
        f"{scores[best].trials} trials"
    ]
    if len(scores) > 1:
        below = [rope for rope in scores if rope != best and scores[rope].high < scores[best].low]
        level = [rope for rope in scores if rope not in (best, *below)]
        if below:
            parts.append(f"intervals of {_method_names(below)} lie below")
        if level:
            parts.append(f"intervals overlap with {_method_names(level)}")
    return [f"{'; '.join(parts)}."]


def _score_reaches(group: ScoreGroup) -> list[str]:
    parts = [f"{method_name(rope)} {reach}" for rope, reach in reaches(group).items()]
    if not parts:
        return []
    share_kept = f"{LEAST_KEPT:.0%} of the method's own score at {format_length(group.trained_length)}"
    least = share_kept if group.suite == RULER else f"{LEAST_FOUND:.0%}"
    rule = f"the lower bound of the score is at least {least}, as at all measured lengths below"
    return [f"effective length ({rule}): {'; '.join(parts)}."]


def _few_trials(group: ScoreGroup) -> list[str]:
    """A warning where a cell of the heat map, or of a task, has fewer trials than `ENOUGH`."""
    cells = [
        score
        for rope in group.methods
        for length in group.lengths
        for task in group.tasks
        for depth in (group.depths or (None,))
        if (score := group.score(rope, length, task=task, depth=depth)) is not None
    ]
    fewest = min(cell.trials for cell in cells)
    if fewest >= ENOUGH:
        return []
    wide = "the interval of 50% is 24% to 76% with 10 trials and 30% to 70% with 20"
    return [f"warning: cells of one length and depth or task have as few as {fewest} trials; {wide}."]


def _method_names(ropes: Iterable[str]) -> str:
    return ", ".join(map(method_name, ropes))
