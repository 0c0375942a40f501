"""What the rows of `harm` and `repeat` say beside the loss, in plain sentences."""

from __future__ import annotations

from collections.abc import Sequence

from ...scaling import format_length
from ..runs import compare
from ..runs.compare import Difference
from ..runs.result import Row


def harm_findings(rows: Sequence[Row]) -> list[str]:
    """For every method, what it costs at the context where it costs most."""
    parts = []
    for rope in compare.methods(rows):
        own = [row for row in rows if row["rope"] == rope and row.get("loss") is not None]
        if own:
            worst = max(own, key=lambda row: float(row["kl"]))
            parts.append(
                f"{rope} moves the law of the next token by {worst['kl']:.4f} nats (KL) at "
                f"{format_length(worst['context'])}, keeps the likeliest one in {worst['same_top1']:.1f} % of the "
                f"places, and changes the loss by {_difference(worst, 'difference')}"
            )
    return [f"Harm within the trained length, where it is largest: {'; '.join(parts)}."] if parts else []


def repeat_findings(rows: Sequence[Row]) -> list[str]:
    """For every method, what a repetition gives at the longest context."""
    measured = [row for row in rows if row.get("loss") is not None]
    if not measured:
        return []
    longest = max(row["context"] for row in measured)
    parts = [
        f"{compare.method_name(row['rope'])} {_difference(row, 'gain')}, of {row['fresh_loss']:.3f}"
        for row in measured
        if row["context"] == longest
    ]
    return [
        f"What it gains, at {format_length(longest)}, from a passage that it has read before, nats per token of that "
        f"passage: {'; '.join(parts)}."
    ]


def _difference(row: Row, field: str) -> Difference:
    low, high = (row.get(f"{field}_{bound}") for bound in ("low", "high"))
    unknown = float("nan")
    return Difference(mean=row[field], low=unknown if low is None else low, high=unknown if high is None else high)
