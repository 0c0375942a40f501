"""Tables of what some protocols measure beside the loss: `harm` and `repeat`."""

from __future__ import annotations

from collections.abc import Sequence

from . import compare
from .harm import Harm
from .repeat import Repeat
from .result import Row


def extra_table(group: Sequence[Row]) -> str:
    """The Markdown table of one setting, a line for every method and context; empty where there is nothing to tell."""
    protocol = group[0]["protocol"]
    if protocol == Harm.name:
        title = "What scaling costs: the law of the next token, and the loss, against the untouched model."
        head: tuple[str, ...] = ("KL, nats", "same likeliest token", "loss difference, nats")
    elif protocol == Repeat.name:
        title = "What a repetition gives: loss on a passage after other text, and what it gains from having been there."
        head = ("loss after other text, nats", "gain, nats")
    else:
        return ""
    lines = [title, "", f"| method | context | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for rope in compare.methods(group):
        for at, name in compare.columns(group).items():
            row = compare.measured(group, rope, at)
            if row is not None:
                cells = _harm(row) if protocol == Harm.name else _repeat(row)
                lines.append(f"| `{rope.replace('|', chr(92) + '|')}` | {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _harm(row: Row) -> tuple[str, ...]:
    return (
        _with_interval(row, "kl", ".4f"),
        f"{row['same_top1']:.1f} %",
        _with_interval(row, "difference", "+.4f"),
    )


def _repeat(row: Row) -> tuple[str, ...]:
    return f"{row['fresh_loss']:.3f}", _with_interval(row, "gain", "+.3f")


def _with_interval(row: Row, field: str, digits: str) -> str:
    """`+0.022 (-0.006 to +0.054)`, or the value alone where there is no interval."""
    low, high = row.get(f"{field}_low"), row.get(f"{field}_high")
    interval = "" if low is None or high is None else f" ({low:{digits}} to {high:{digits}})"
    return f"{row[field]:{digits}}{interval}"
