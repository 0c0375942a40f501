"""Tables of losses: methods down, contexts across; and the long CSV with everything."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...engine.storage import write_atomic
from ...errors import DataError
from ..protocols.by_name import PROTOCOLS
from ..retrieval.score import settings
from ..runs import compare
from ..runs.result import Row, Run
from .extra_grids import extra_grids
from .grid import markdown_table
from .reach_table import reach_table
from .score_grids import score_grids


@dataclass(frozen=True, kw_only=True)
class TableCell:
    """One method in one column.

    Args:
        row: the measured row, or None where there is no loss.
        reason: why there is none; empty where nobody tried.
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
    """The table of one setting: rows that differ only in method and in context or position bucket.

    Raises:
        DataError: no perplexity rows, or rows that were measured in different ways.
    """
    groups = compare.settings(rows)
    if len(groups) != 1:
        names = "; ".join(caption(group) for group in groups) or "none"
        raise DataError(f"a table needs perplexity rows of one setting, not {len(groups)}: {names}")
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
    """What the rows of one setting measured, in one line."""
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
    """Write table.md (tables of every setting) and table.csv (every row, with its difference to the untouched model
    at its trained length); returns both paths."""
    groups = compare.settings(run.rows)
    markdown, csv_file = run.folder / "table.md", run.folder / "table.csv"
    texts = [
        text
        for group in groups
        for text in (loss_table(group).to_markdown(), *(grid.to_markdown() for grid in extra_grids(group)))
    ]
    for setting in settings(run.rows):
        texts += [f"{setting.caption}\n", *(grid.to_markdown() for grid in score_grids(setting))]
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
    row = compare.measured(group, rope, at)
    return TableCell(row=row, reason="" if row else compare.reason(compare.cell(group, rope, at)))


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.dumps(value) if isinstance(value, list) else value
    return flat
