"""What the rows of a run say, in plain sentences, whatever they say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...scaling import format_length
from ..protocols.effective_length import TOLERANCE, EffectiveLength, effective_length
from ..protocols.harm import Harm
from ..protocols.repeat import Repeat
from ..runs import compare
from ..runs.compare import UNTOUCHED, Column, Difference, method_name
from ..runs.result import Row, Run
from .extra_findings import harm_findings, repeat_findings


def findings(run: Run) -> list[str]:
    """Sentences computed from the perplexity rows of `run`, setting by setting.

    How far the untouched model goes, the best method at the longest context, effective lengths, what each
    method costs within the trained length, and what was not run. Differences are paired, with 95%
    intervals; where the interval holds zero the sentence says that the two cannot be told apart.
    """
    groups = compare.settings(run.rows)
    if not groups:
        return ["No perplexity row has been measured yet."]
    sentences = []
    for rows in groups:
        view = _View(run, rows)
        prefix = f"[{_setting_name(rows)}] " if len(groups) > 1 else ""
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
    """The rows of one setting, their names, and their differences to the untouched model, computed once."""

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, rows
        self.protocol: str = rows[0]["protocol"]
        self.trained_length: int = rows[0]["trained_length"]
        self.methods = compare.methods(rows)
        self.scalers = [rope for rope in self.methods if rope != UNTOUCHED]
        self.columns = compare.columns(rows)
        self.delta = compare.deltas(run, rows)

    def row(self, rope: str, at: Column) -> Row | None:
        return compare.measured(self.rows, rope, at)

    def difference(self, a: Row | None, b: Row | None) -> Difference | None:
        return compare.difference(self.run, a, b)

    def place(self, at: Column) -> str:
        """`at 8k`, or `in positions 4k-8k`."""
        return f"{'in positions' if self.protocol == 'by-position' else 'at'} {self.columns[at]}"


def _setting_name(rows: Sequence[Row]) -> str:
    row = rows[0]
    context = f" over {format_length(row['context'])}" if row["protocol"] == "by-position" else ""
    target = f", last {row['target']} tokens" if row.get("target") else ""
    return f"{row['protocol']}{context}{target}, {compare.short(row['model'])} on {compare.short(row['text'])}"


def _untouched(view: _View) -> list[str]:
    """The untouched model at its trained length and at twice that (or the next context beyond)."""
    trained = format_length(view.trained_length)
    rows = {at: row for at in view.columns if (row := view.row(UNTOUCHED, at))}
    if not rows:
        return ["The untouched model was not run, so there is nothing to hold the methods against."]
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
    """The best method in the longest column, against the untouched model and the other methods there."""
    if not view.scalers:
        return ["No method was run, only the untouched model."]
    at = next((at for at in reversed(view.columns) if any(view.row(rope, at) for rope in view.scalers)), None)
    if at is None:
        return ["No method has a result, only the untouched model."]
    where = _capital(view.place(at))
    where += ", the longest measured," if at == max(view.columns) else ", the longest that a method was run at,"
    found = {rope: row for rope in view.methods if (row := view.row(rope, at))}
    best = min(found, key=lambda rope: found[rope]["loss"])
    winner, plain = found[best], found.get(UNTOUCHED)
    change = view.difference(winner, plain)
    if best == UNTOUCHED:
        sentence = f"{where} no method helped: the untouched model has the lowest loss, {_loss(winner)}"
    else:
        sentence = f"{where} {best} has the lowest loss, {_loss(winner)}"
        if plain is None:
            sentence += "; the untouched model was not run there"
        else:
            sentence += f", against {plain['loss']:.3f} untouched" + (f": {change}" if change else "")
            sentence += "; the two are not distinguishable" if change and change.is_tie else ""
    sentences = [f"{sentence}."]
    # The sentence above has held the winner against the untouched model already.
    pairs = {rope: view.difference(row, winner) for rope, row in found.items() if rope not in (best, UNTOUCHED)}
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
    found = {rope: effective_length(view.rows, view.delta, rope) for rope in view.methods}
    known = {rope: reach for rope, reach in found.items() if reach is not None}
    if not known:
        return []
    parts = []
    for rope, reach in known.items():
        part = f"{method_name(rope)} {format_length(reach.length) if reach.length else 'at no measured context'}"
        if reach.breaks:
            part += f" (but not at {_lengths(reach.breaks)})"
        if reach.undecided:
            part += f" ({_lengths(reach.undecided)} undecided: {reach.remedy})"
        parts.append(part)
    rule = (
        "largest context whose difference to the untouched model at "
        f"{format_length(view.trained_length)} has an upper bound of at most +{TOLERANCE:g} nats"
    )
    sentences = [f"Effective length ({rule}): {'; '.join(parts)}."]
    plain = known.get(UNTOUCHED)
    limit = max(view.trained_length, (plain.length or 0) if plain else 0)
    reaches = [known[rope] for rope in view.scalers if rope in known]
    if view.scalers and not any((reach.length or 0) > limit for reach in reaches):
        sentences.append(_beyond(known, view.scalers, limit))
    return sentences


def _beyond(known: dict[str, EffectiveLength], scalers: Sequence[str], limit: int) -> str:
    """What can be said of lengths beyond `limit` where no method is certain to reach one."""
    open_ = [rope for rope in scalers if rope in known and any(at > limit for at in known[rope].undecided)]
    if not open_:
        return f"By this rule no method extends the effective length beyond {format_length(limit)}."
    return (
        f"Undecided is whether {', '.join(open_)} extend{'s' if len(open_) == 1 else ''} the effective length beyond "
        f"{format_length(limit)}: the interval holds +{TOLERANCE:g}, and more samples would narrow it."
    )


def _costs(view: _View) -> list[str]:
    """The largest difference of each method to the untouched model in the same column, within training."""
    within = [at for at in view.columns if at[1] <= view.trained_length]
    parts = []
    for rope in view.scalers:
        pairs = {at: view.difference(view.row(rope, at), view.row(UNTOUCHED, at)) for at in within}
        known = {at: pair for at, pair in pairs.items() if pair is not None}
        if not known:
            parts.append(f"{rope} not measured")
            continue
        at = max(known, key=lambda at: known[at].mean)
        if all(pair.mean == pair.low == pair.high == 0 for pair in known.values()):
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
                why = compare.reason(compare.cell(view.rows, rope, at))
                parts.append(f"{method_name(rope)} at {name}" + (f" ({why})" if why else ""))
    return [f"Not run: {', '.join(parts)}."] if parts else []


def _loss(row: Row) -> str:
    return f"{row['loss']:.3f} nats per token (perplexity {row['perplexity']:.4g})"


def _lengths(lengths: Iterable[int]) -> str:
    return ", ".join(map(format_length, lengths))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
