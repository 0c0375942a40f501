"""The verdict of a run: what the model does beyond its trained length, what repairs it, and by how
much."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...scaling import format_length
from ..protocols.effective_length import TOLERANCE, remedy, samples_to_decide
from ..protocols.fixed_target import FixedTarget
from ..runs import compare
from ..runs.compare import UNTOUCHED, Difference
from ..runs.result import Row, Run


def verdicts(run: Run) -> list[str]:
    """One verdict for each group of fixed-target rows that has a loss, in order of appearance.

    Differences are paired, with 95% intervals. "Undecided" is a verdict of its own, and names the
    `--samples N` that would decide it.
    """
    groups = [
        group
        for group in compare.comparable_groups(row for row in run.rows if row.get("loss") is not None)
        if group[0]["protocol"] == FixedTarget.name and group[0]["trained_length"]
    ]
    texts = [compare.short(group[0]["text"]) for group in groups]
    return [
        (f"[{text}] " if len(groups) > 1 else "") + _Verdict(run, group).text()
        for text, group in zip(texts, groups, strict=True)
    ]


class _Verdict:
    """The rows of one group at the longest context beyond the trained length.

    All numbers are nats per token on the same tokens.
    """

    def __init__(self, run: Run, rows: Sequence[Row]) -> None:
        self.run, self.rows = run, rows
        self.model = compare.short(rows[0]["model"])
        self.trained_length: int = rows[0]["trained_length"]
        self.trained = format_length(self.trained_length)
        self.scalers = [rope for rope in compare.methods(rows) if rope != UNTOUCHED]
        self.reference = compare.reference(rows)
        self.context = max((row["context"] for row in rows if row["context"] > self.trained_length), default=None)

    def text(self) -> str:
        """The verdict in one to three sentences."""
        if self.context is None:
            return " ".join(self._within_only())
        plain, best = self._row(UNTOUCHED, self.context), self._best()
        if plain is None:
            return " ".join(self._without_untouched(best))
        sentences = [self._untouched(plain)]
        if best is None:
            sentences.append("No scaler was measured there; add --rope auto.")
        else:
            sentences += [self._scaled(best, plain), *self._cost(best["rope"])]
        return " ".join(sentences)

    def _row(self, rope: str, context: int) -> Row | None:
        return compare.row_with_loss(self.rows, rope, (0, context))

    def _difference(self, row: Row | None, other: Row | None) -> Difference | None:
        return compare.difference(self.run, row, other)

    def _best(self) -> Row | None:
        """The scaler with the lowest loss at the longest context."""
        assert self.context is not None
        rows = [row for rope in self.scalers if (row := self._row(rope, self.context)) is not None]
        return min(rows, key=lambda row: float(row["loss"]), default=None)

    def _within_only(self) -> Iterable[str]:
        longest = format_length(max(row["context"] for row in self.rows))
        yield (
            f"What {self.model} does beyond its trained length {self.trained} was not measured: the longest context "
            f"was {longest}. --lengths 1x,2x measures it."
        )
        for rope in self.scalers:
            yield from self._cost(rope)

    def _without_untouched(self, best: Row | None) -> Iterable[str]:
        assert self.context is not None
        at = format_length(self.context)
        yield f"The untouched model was not measured at {at}, so the gain of scaling is not known; add --rope none."
        change = self._difference(best, self.reference)
        if best is not None and change is not None:
            yield f"{_capital(self._against_trained(change, best, best['rope']))}."

    def _untouched(self, plain: Row) -> str:
        """What the untouched model does at the longest context."""
        assert self.context is not None
        at = format_length(self.context)
        change = self._difference(plain, self.reference)
        if self.reference is None:
            return (
                f"Untouched, {self.model} has a loss of {plain['loss']:.3f} at {at}; it was not measured at its "
                f"trained length {self.trained}, so whether it fails is not known. Add {self.trained} to --lengths."
            )
        if change is None or not change.has_interval:
            rise = plain["loss"] - self.reference["loss"]
            return (
                f"Whether {self.model} untouched fails at {at} is undecided: {rise:+.3f} nats per token against itself "
                f"at its trained length {self.trained}, {_NO_INTERVAL}."
            )
        if change.low > TOLERANCE:
            return (
                f"Untouched, {self.model} reads its trained length {self.trained} and fails at {at}: its loss rises by "
                f"{_amount(change)} nats per token."
            )
        if change.high <= TOLERANCE:
            return (
                f"{self.model} reaches {at} without scaling: {_signed(change)} nats per token against itself at its "
                f"trained length {self.trained}."
            )
        return (
            f"Whether {self.model} untouched fails at {at} is undecided: {_signed(change)} nats per token against "
            f"itself at its trained length {self.trained}; {_remedy(change, plain, TOLERANCE)}."
        )

    def _scaled(self, best: Row, plain: Row) -> str:
        """What the best scaler does there, against the untouched model there and at its trained
        length."""
        assert self.context is not None
        at, rope = format_length(self.context), best["rope"]
        gain, remaining = self._difference(best, plain), self._difference(best, self.reference)
        if gain is None or not gain.has_interval:
            change = best["loss"] - plain["loss"]
            against = f"{change:+.3f} against the untouched model"
            return f"Whether {rope} helps there is undecided: {against}, {_NO_INTERVAL}."
        if gain.low >= 0:
            least = f"the best of them, {rope}," if len(self.scalers) > 1 else rope
            return f"No scaler that was measured helps there: {least} has {_signed(gain)} against the untouched model."
        if gain.high >= 0:
            return (
                f"Whether {rope} helps there is undecided: {_signed(gain)} against the untouched model; "
                f"{_remedy(gain, best, 0.0)}."
            )
        sentence = f"With {rope} the loss at {at} is lower by {_amount(gain)}"
        if remaining is None:
            return f"{sentence}."
        return f"{sentence}; {self._against_trained(remaining, best, 'it')}."

    def _against_trained(self, change: Difference, row: Row, subject: str) -> str:
        """`it reaches 16k: -0.014 (...) against the untouched model at 8k`."""
        at = format_length(row["context"])
        against = f"{_signed(change)} against the untouched model at {self.trained}"
        if not change.has_interval:
            return f"whether {subject} reaches {at} is undecided: {against}, {_NO_INTERVAL}"
        if change.high <= TOLERANCE:
            return f"{subject} reaches {at}: {against}"
        if change.low > TOLERANCE:
            return f"{subject} does not reach {at}: {against}"
        return f"whether {subject} reaches {at} is undecided: {against}; {_remedy(change, row, TOLERANCE)}"

    def _cost(self, rope: str) -> Iterable[str]:
        """What a scaler costs within the trained length, where it costs most."""
        contexts = sorted({row["context"] for row in self.rows if row["context"] <= self.trained_length})
        pairs = {at: self._difference(self._row(rope, at), self._row(UNTOUCHED, at)) for at in contexts}
        changes = {at: change for at, change in pairs.items() if change is not None and change.has_interval}
        if not changes:
            return
        at = max(changes, key=lambda at: changes[at].mean)
        worst = changes[at]
        if all(change.mean == change.low == change.high == 0 for change in changes.values()):
            yield f"Within {self.trained} {rope} is the untouched model."
        elif worst.low > 0:
            yield f"Within {self.trained} {rope} costs {_amount(worst)} (at {format_length(at)})."
        elif worst.high <= TOLERANCE:
            yield f"Within {self.trained} {rope} costs nothing that shows: {_signed(worst)} (at {format_length(at)})."
        else:
            yield (
                f"Whether {rope} costs anything within {self.trained} is undecided: {_signed(worst)} at "
                f"{format_length(at)}."
            )


_NO_INTERVAL = "from too few tokens for an interval (more --samples or --target)"


def _amount(change: Difference) -> str:
    """`2.585 (95% interval 2.310 to 2.860)`, the size of a change whose interval lies on one side of zero."""
    low, high = sorted((abs(change.low), abs(change.high)))
    return f"{abs(change.mean):.3f} (95% interval {low:.3f} to {high:.3f})"


def _signed(change: Difference) -> str:
    if not change.has_interval:
        return f"{change.mean:+.3f}"
    return f"{change.mean:+.3f} (95% interval {change.low:+.3f} to {change.high:+.3f})"


def _remedy(change: Difference, row: Row, limit: float) -> str:
    return remedy(samples_to_decide(change, row["documents"], limit))


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
