"""Tables of what some protocols measure beside the loss: `harm` and `repeat`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..protocols.harm import Harm
from ..protocols.repeat import Repeat
from ..runs import compare
from ..runs.result import Row
from .grid import NOTHING, Grid, Shown

Show = Callable[[Row], Shown]


def extra_grids(group: Sequence[Row]) -> list[Grid]:
    """Methods down and contexts across, for everything that a protocol tells beside the loss."""
    tables = _TABLES.get(group[0]["protocol"], {})
    return [_grid(group, title, note, show) for title, (note, show) in tables.items()]


def _grid(group: Sequence[Row], title: str, note: str, show: Show) -> Grid:
    columns = compare.columns(group)
    rows = []
    for rope in compare.methods(group):
        found = [compare.measured(group, rope, at) for at in columns]
        rows.append((rope, [NOTHING if row is None else show(row) for row in found]))
    return Grid(title=title, note=note, columns=tuple(columns.values()), rows=rows)


def _value(field: str, digits: str) -> Show:
    """The field of a row, and its interval below where there is one."""

    def show(row: Row) -> Shown:
        low, high = row.get(f"{field}_low"), row.get(f"{field}_high")
        small = () if low is None or high is None else (f"{low:{digits}} to {high:{digits}}",)
        return Shown(main=f"{row[field]:{digits}}", small=small)

    return show


_TABLES: dict[str, dict[str, tuple[str, Show]]] = {
    Harm.name: {
        "KL divergence from the untouched model, nats": (
            "Of the law of the next token; 0 is no harm.",
            _value("kl", ".4f"),
        ),
        "Same likeliest token": (
            "Share of the tokens at which both models would write the same.",
            lambda row: Shown(main=f"{row['same_top1']:.1f} %"),
        ),
        "Loss difference to the untouched model, nats": ("Paired, token by token.", _value("difference", "+.4f")),
    },
    Repeat.name: {
        "Gain from the repetition, nats": (
            "Loss on a passage after other text, less the loss on it where it stood before; paired.",
            _value("gain", "+.3f"),
        ),
        "Loss after other text, nats": (
            "Of the same tokens.",
            lambda row: Shown(main=f"{row['fresh_loss']:.3f}"),
        ),
    },
}
