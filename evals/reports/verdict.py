"""The verdict of a run: what the model does beyond its trained length, what repairs it, and by how
much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ...scaling import format_length
from ..protocols.effective_length import TOLERANCE, is_used_up, remedy, samples_to_decide
from ..protocols.fixed_target import FixedTarget
from ..runs import compare
from ..runs.compare import UNTOUCHED, Difference
from ..runs.result import Row, Run


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What one group of fixed-target rows shows, and what would decide the rest.

    Args:
        text: one to four sentences. "Undecided" is an answer of its own.
        samples: about how many places in the text would decide what is undecided, as far as any number below 1000
            does for which the text may have room; None if nothing is.
        ropes: the scalers to measure for that.
        contexts: the contexts to measure for that, tokens.
    """

    text: str
    samples: int | None
    ropes: tuple[str, ...]
    contexts: tuple[int, ...]


def verdicts(run: Run) -> list[Verdict]:
    """One verdict for each group of fixed-target rows that has a loss, in order of appearance.

    Differences are paired, with 95% intervals.
    """
    groups = [
        group
        for group in compare.comparable_groups(run.rows)
        if group[0]["protocol"] == FixedTarget.name
        and group[0]["trained_length"]
        and any(row.get("loss") is not None for row in group)
    ]
    texts = [compare.short(group[0]["text"]) for group in groups]
    return [
        _Writer(run, group).verdict(f"[{text}] " if len(groups) > 1 else "")
        for text, group in zip(texts, groups, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _Open:
    """A question that is undecided: how many samples would decide it (None is too many, for the text too), under which
    scalers, where."""

    samples: int | None
    ropes: tuple[str, ...]
    contexts: tuple[int, ...]


class _Writer:
    """Writes the verdict on the rows of one group: at the longest context beyond the trained length where the
    untouched model and a scaler were measured.

    All numbers are nats per token on the same tokens.
    """

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, rows
        self.model = compare.short(rows[0]["model"])
        self.trained_length: int = rows[0]["trained_length"]
        self.trained = format_length(self.trained_length)
        self.scalers = [rope for rope in compare.methods(rows) if rope != UNTOUCHED]
        self.reference = compare.reference(rows)
        self.beyond = sorted(
            {row["context"] for row in rows if row["context"] > self.trained_length and row.get("loss") is not None}
        )
        both = [context for context in self.beyond if self._row(UNTOUCHED, context) and self._scaled_rows(context)]
        self.context: int | None = max(both or self.beyond, default=None)
        self.open: list[_Open] = []

    def verdict(self, prefix: str) -> Verdict:
        """The verdict, its text after `prefix`."""
        text = prefix + " ".join(self._sentences())
        decidable = [question for question in self.open if question.samples is not None]
        return Verdict(
            text=text,
            samples=max((question.samples or 0 for question in decidable), default=None),
            ropes=tuple(dict.fromkeys(rope for question in decidable for rope in question.ropes)),
            contexts=tuple(sorted({context for question in decidable for context in question.contexts})),
        )

    def _sentences(self) -> Iterable[str]:
        if self.context is None:
            yield from self._within_only()
            return
        plain, best = self._row(UNTOUCHED, self.context), self._best()
        if plain is None:
            yield from self._without_untouched(best)
        else:
            yield self._untouched(plain)
            if best is None:
                yield self._no_scaler()
            else:
                yield self._scaled(best, plain)
                yield from self._cost(best["rope"])
        if self.context < self.beyond[-1]:
            names = [rope for rope in compare.methods(self.rows) if self._row(rope, self.beyond[-1])]
            only = f"{', '.join(map(compare.method_name, names))} {'was' if len(names) == 1 else 'were'} measured"
            yield f"At {format_length(self.beyond[-1])} only {only}."

    def _row(self, rope: str, context: int) -> Row | None:
        return compare.row_with_loss(self.rows, rope, (0, context))

    def _scaled_rows(self, context: int) -> list[Row]:
        return [row for rope in self.scalers if (row := self._row(rope, context)) is not None]

    def _why_no_loss(self, rope: str) -> str:
        """Why a cell that was measured there has no loss; empty where it was not measured."""
        return compare.reason(compare.find_row(self.rows, rope, (0, self.context or 0)))

    def _difference(self, row: Row | None, other: Row | None) -> Difference | None:
        return compare.difference(self.run, row, other)

    def _best(self) -> Row | None:
        """The scaler with the lowest loss there. Those that are shown to help come before those that may, and of those
        the ones that are shown to reach the context."""
        assert self.context is not None
        plain, rows = self._row(UNTOUCHED, self.context), self._scaled_rows(self.context)
        helping = [row for row in rows if (gain := self._difference(row, plain)) is not None and gain.high < 0]
        reaching = [
            row
            for row in (helping if plain is not None else rows)
            if (rest := self._difference(row, self.reference)) is not None and rest.high <= TOLERANCE
        ]
        return min(reaching or helping or rows, key=lambda row: float(row["loss"]), default=None)

    def _within_only(self) -> Iterable[str]:
        longest = format_length(max(row["context"] for row in self.rows if row.get("loss") is not None))
        failed = [
            f"{row['rope']} at {format_length(row['context'])} ({compare.reason(row)})"
            for row in self.rows
            if row["context"] > self.trained_length
        ]
        why = f"no loss of {', '.join(failed)}" if failed else f"the longest context was {longest}"
        yield f"What {self.model} does beyond its trained length {self.trained} was not measured: {why}."
        for rope in self.scalers:
            yield from self._cost(rope)

    def _without_untouched(self, best: Row | None) -> Iterable[str]:
        assert self.context is not None and best is not None, "some row has a loss there"
        at, reason = format_length(self.context), self._why_no_loss(UNTOUCHED)
        missing = f"has no loss at {at} ({reason})" if reason else f"(none) was not measured at {at}"
        yield f"The untouched model {missing}, so the gain of scaling is not known."
        change, name = self._difference(best, self.reference), _name(best)
        if change is None:
            yield f"With {name} the loss there is {best['loss']:.3f}."
        else:
            yield f"{_capital(self._against_trained(change, best, f'with {name} {self.model}'))}."

    def _no_scaler(self) -> str:
        failed = [f"{rope} ({reason})" for rope in self.scalers if (reason := self._why_no_loss(rope))]
        return f"No scaler has a loss there: {', '.join(failed)}." if failed else "No scaler was measured there."

    def _untouched(self, plain: Row) -> str:
        """What the untouched model does there."""
        at, trained = format_length(plain["context"]), self.trained
        if self.reference is None:
            return (
                f"Untouched, {self.model} has a loss of {plain['loss']:.3f} at {at}; it was not measured at its "
                f"trained length {trained}, so whether it fails is not known."
            )
        change = self._difference(plain, self.reference)
        if change is None or not change.has_interval:
            rise = plain["loss"] - self.reference["loss"]
            return (
                f"Whether {self.model} untouched fails at {at} is undecided: {rise:+.3f} nats per token against itself "
                f"at its trained length {trained}, {_no_interval(change)}."
            )
        if change.low > TOLERANCE:
            return (
                f"Untouched, {self.model} reads its trained length {trained} and fails at {at}: its loss rises by "
                f"{_amount(change)} nats per token."
            )
        if change.high <= TOLERANCE:
            return (
                f"{self.model} reaches {at} without scaling: {_signed(change)} nats per token against itself at its "
                f"trained length {trained}."
            )
        return (
            f"Whether {self.model} untouched fails at {at} is undecided: {_signed(change)} nats per token against "
            f"itself at its trained length {trained}; {self._remedy(change, plain, [TOLERANCE], self.trained_length)}."
        )

    def _scaled(self, best: Row, plain: Row) -> str:
        """What the best scaler does there, against the untouched model there and at its trained
        length."""
        at, name = format_length(best["context"]), _name(best)
        gain, remaining = self._difference(best, plain), self._difference(best, self.reference)
        if gain is None or not gain.has_interval:
            change = best["loss"] - plain["loss"]
            against = f"{change:+.3f} against the untouched model"
            return f"Whether {name} helps there is undecided: {against}, {_no_interval(gain)}."
        if gain.is_exactly_zero:
            return f"There {best['rope']} is the untouched model."
        if gain.low >= 0:
            least = f"the best of them, {name}," if len(self.scalers) > 1 else name
            return f"No scaler that was measured helps there: {least} has {_signed(gain)} against the untouched model."
        if gain.high >= 0:
            return (
                f"Whether {name} helps there is undecided: {_signed(gain)} against the untouched model; "
                f"{self._remedy(gain, best, [0.0])}."
            )
        sentence = f"With {name} the loss at {at} is lower by {_amount(gain)}"
        if remaining is None:
            return f"{sentence}."
        return f"{sentence}; {self._against_trained(remaining, best, 'it')}."

    def _against_trained(self, change: Difference, row: Row, subject: str) -> str:
        """`it reaches 16k: -0.014 (...) against the untouched model at 8k`."""
        at = format_length(row["context"])
        against = f"{_signed(change)} against the untouched model at {self.trained}"
        if not change.has_interval:
            return f"whether {subject} reaches {at} is undecided: {against}, {_no_interval(change)}"
        if change.high <= TOLERANCE:
            return f"{subject} reaches {at}: {against}"
        if change.low > TOLERANCE:
            return f"{subject} does not reach {at}: {against}"
        needed = self._remedy(change, row, [TOLERANCE], self.trained_length)
        return f"whether {subject} reaches {at} is undecided: {against}; {needed}"

    def _cost(self, rope: str) -> Iterable[str]:
        """What a scaler costs within the trained length, where it costs most."""
        contexts = sorted({row["context"] for row in self.rows if row["context"] <= self.trained_length})
        pairs = {at: self._difference(self._row(rope, at), self._row(UNTOUCHED, at)) for at in contexts}
        changes = {at: change for at, change in pairs.items() if change is not None and change.has_interval}
        costly = {at: change for at, change in changes.items() if change.low > 0}
        if not changes:
            return
        if all(change.is_exactly_zero for change in changes.values()):
            yield f"Within {self.trained} {rope} is the untouched model."
        elif costly:
            at = max(costly, key=lambda at: costly[at].mean)
            yield f"Within {self.trained} {rope} costs {_amount(costly[at])} (at {format_length(at)})."
        else:
            at = max(changes, key=lambda at: changes[at].high)
            worst, row = changes[at], self._row(rope, at)
            assert row is not None, "there is a difference"
            if worst.high <= TOLERANCE:
                shown = f"costs nothing that shows: {_signed(worst)} (at {format_length(at)})"
                yield f"Within {self.trained} {rope} {shown}."
            else:
                yield (
                    f"Whether {rope} costs anything within {self.trained} is undecided: {_signed(worst)} at "
                    f"{format_length(at)}; {self._remedy(worst, row, [0.0, TOLERANCE])}."
                )

    def _remedy(self, change: Difference, row: Row, limits: Sequence[float], *contexts: int) -> str:
        """What would decide a question, kept in `open`.

        Args:
            change: an interval that holds the limits.
            row: what was measured.
            limits: the question is decided once the interval lies beside one of them.
            contexts: to measure besides the row's.
        """
        samples = [samples_to_decide(change, row["documents"], limit) for limit in limits]
        fewest = min((count for count in samples if count is not None), default=None)
        ropes = tuple(dict.fromkeys((UNTOUCHED, str(row["rope"]))))
        samples_here = None if is_used_up(row) else fewest
        self.open.append(_Open(samples=samples_here, ropes=ropes, contexts=(row["context"], *contexts)))
        return remedy(fewest, is_used_up(row))


def _name(row: Row) -> str:
    """The scaler of a row; of `auto` with what it chose."""
    chosen = row.get("chosen")
    return f"{row['rope']} ({chosen})" if chosen else str(row["rope"])


def _no_interval(change: Difference | None) -> str:
    if change is None:
        return "without an interval, since the losses of the tokens are not stored"
    return "from too few tokens for an interval (more samples, or a longer target)"


def _amount(change: Difference) -> str:
    """`2.585 (95% interval 2.310 to 2.860)`, the size of a change whose interval lies on one side of zero."""
    low, high = sorted((abs(change.low), abs(change.high)))
    return f"{abs(change.mean):.3f} (95% interval {low:.3f} to {high:.3f})"


def _signed(change: Difference) -> str:
    if not change.has_interval:
        return f"{change.mean:+.3f}"
    return f"{change.mean:+.3f} (95% interval {change.low:+.3f} to {change.high:+.3f})"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
