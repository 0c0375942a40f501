"""Which rows may be compared, and the paired difference of the losses of two rows."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...scaling import format_length
from ..statistics import paired_difference
from .result import Row, Run

UNTOUCHED = "none"
"""The rope spec of the model as it was trained."""

MEASURED = frozenset(
    (
        *("key", "tokens", "tokens_sha256", "loss", "loss_low", "loss_high", "perplexity", "bits_per_byte", "reason"),
        *("documents", "candidates", "seconds", "tokens_per_second", "peak_memory_mb", "run_started"),
        *("fresh_loss", "gain", "gain_low", "gain_high"),
        *("base_loss", "difference", "difference_low", "difference_high", "kl", "kl_low", "kl_high", "same_top1"),
    )
)
"""Fields of a perplexity row that are not part of its recipe."""

METHOD = frozenset(("rope", "chosen"))
"""Fields that name the scaler, and the choice of `auto`."""

_COLUMN = METHOD | {"context", "bucket_start", "bucket_end", "places"}

# These protocols score the same tokens at every context; `places` names them.
_SAME_TOKENS = ("fixed-target", "longppl", "repeat")

# In by-position, one pass is one context.
_KEY_COLUMN_OF_PROTOCOL = {**dict.fromkeys((*_SAME_TOKENS, "harm"), "places"), "by-position": "context"}


def method_name(rope: str) -> str:
    """A method in a sentence: its spec, or `the untouched model`."""
    return "the untouched model" if rope == UNTOUCHED else rope


def short(name: str) -> str:
    """A model or text in a caption: the last part of a path; names and hub ids stay whole."""
    return Path(name).name if name.startswith(("/", ".", "~")) else name


Column = tuple[int, int]
"""A column of a table: (0, context), or (bucket start, bucket end) for by-position."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference of two mean losses over the same tokens, nats per token, with its 95%
    interval."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """False if there were too few tokens for an interval; the bounds are then NaN."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def is_distinguishable(self) -> bool:
        """True if the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0

    @property
    def is_exactly_zero(self) -> bool:
        """True if the losses of all tokens are the same."""
        return self.mean == self.low == self.high == 0

    @property
    def is_tie(self) -> bool:
        """True if there is an interval and it contains zero."""
        return self.has_interval and not self.is_distinguishable

    def __str__(self) -> str:
        if not self.has_interval:
            return f"{self.mean:+.3f} (too few for an interval)"
        return f"{self.mean:+.3f} (95% interval {self.low:+.3f} to {self.high:+.3f})"


def comparable_groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Perplexity rows in groups that differ only in method and column, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.get("task") == "ppl":
            ignoring = MEASURED | (_COLUMN - {_KEY_COLUMN_OF_PROTOCOL.get(row["protocol"])})
            groups.setdefault(group_key(row, ignoring), []).append(row)
    return list(groups.values())


def group_rows(rows: Iterable[Row], ignoring: Collection[str]) -> list[list[Row]]:
    """Rows in groups that differ only in the fields `ignoring`, in order of appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group_key(row, ignoring), []).append(row)
    return list(groups.values())


def group_key(row: Row, ignoring: Collection[str]) -> str:
    """All fields of a row except those in `ignoring`, as JSON. Null fields are left out."""
    fields = {field: value for field, value in row.items() if field not in ignoring and value is not None}
    return json.dumps(fields, sort_keys=True)


def methods(rows: Iterable[Row]) -> list[str]:
    """The rope specs of `rows`: the untouched model first, the others in order of appearance."""
    return sorted(dict.fromkeys(str(row["rope"]) for row in rows), key=lambda rope: rope != UNTOUCHED)


def column(row: Row) -> Column:
    """The column of a row. Columns sort by length."""
    if row["protocol"] == "by-position":
        return row["bucket_start"], row["bucket_end"]
    return 0, row["context"]


def column_name(row: Row) -> str:
    """`8k`, or `4k-8k` for by-position."""
    start, end = column(row)
    if row["protocol"] == "by-position":
        return f"{format_length(start)}-{format_length(end)}"
    return format_length(end)


def columns(rows: Iterable[Row]) -> dict[Column, str]:
    """Every column of `rows` in order, with its name."""
    return dict(sorted({column(row): column_name(row) for row in rows}.items()))


def find_row(rows: Iterable[Row], rope: str, at: Column) -> Row | None:
    """The row of a method in a column, with or without a loss; None if there is no row."""
    return next((row for row in rows if row["rope"] == rope and column(row) == at), None)


def row_with_loss(rows: Iterable[Row], rope: str, at: Column) -> Row | None:
    """Like `find_row`, but None if the row has no loss."""
    row = find_row(rows, rope, at)
    return row if row is not None and row.get("loss") is not None else None


def reason(row: Row | None) -> str:
    """Why a row has no loss; empty if there is no row."""
    return "" if row is None else str(row.get("reason") or "loss is not finite")


def reference(rows: Sequence[Row]) -> Row | None:
    """The row of the untouched model at its trained length, on the tokens that every row of the
    group scores.

    None if it was not measured, or if the protocol scores different tokens at different contexts.
    """
    if not rows or rows[0]["protocol"] not in _SAME_TOKENS:
        return None
    return row_with_loss(rows, UNTOUCHED, (0, rows[0]["trained_length"]))


def difference(run: Run, a: Row | None, b: Row | None) -> Difference | None:
    """Loss of `a` minus loss of `b`, paired token by token; None if a row has no stored losses."""
    if a is None or b is None:
        return None
    losses_a, losses_b = run.losses(a), run.losses(b)
    if losses_a is None or losses_b is None or losses_a.shape != losses_b.shape:
        return None
    mean, low, high = paired_difference(losses_a, losses_b)
    return Difference(mean=mean, low=low, high=high) if math.isfinite(mean) else None


def deltas(run: Run, rows: Sequence[Row]) -> dict[str, Difference]:
    """The difference of each row to the untouched model at its trained length, by row key, if there
    is one."""
    base = reference(rows)
    differences = {row["key"]: difference(run, row, base) for row in rows}
    return {key: delta for key, delta in differences.items() if delta is not None}
