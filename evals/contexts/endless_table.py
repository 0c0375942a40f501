"""The rows of `endless` by position, in a table and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ...scaling.lengths import format_length
from ..reports import style
from ..runs.compare import METHOD, by_setting, short
from ..runs.result import Row

LEGEND = (
    "Loss: nats a token in one pass, with its 95% interval. Over recomputation: how much more the pass takes than the "
    "untouched model with the window before the token read afresh, on the same tokens, paired."
)
"""What the columns are."""

_APART = frozenset(
    (
        *("start", "end", "key", "loss", "low", "high", "streamed", "recomputed", "recomputed_tokens"),
        *("difference", "difference_low", "difference_high", "tokens_per_second", "cache_mb", "resident_mb"),
    )
)
"""Fields of the rows of one table that differ: its lines, and what was measured."""


def endless_rows(rows: Sequence[Row]) -> list[Row]:
    """Those of such passes."""
    return [row for row in rows if row.get("experiment") == "endless"]


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for every setting, scaler and length."""
    lines = [LEGEND]
    for own in by_setting(endless_rows(rows), _APART):
        row = own[0]
        lines += [
            "",
            f"`{row['rope']}`, {short(row['model'])} ({row['dtype']}, trained at "
            f"{format_length(row['trained_length'])}) on {short(row['text'])}, {row['context']:,} tokens; "
            f"{row['places']} tokens recomputed in each row",
            "",
            "| position | loss | 95% | over recomputation | 95% | cache, MB | memory, MB | tokens/s |",
            "|---:|---:|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row['start']:,} to {row['end']:,} "
            f"| {_number(row['loss'], '.3f')} | {_range(row['low'], row['high'], '.3f')} "
            f"| {_number(row['difference'], '+.3f')} | {_range(row['difference_low'], row['difference_high'], '+.3f')} "
            f"| {row['cache_mb']:.1f} | {row['resident_mb']:.0f} | {row['tokens_per_second']:.0f} |"
            for row in own
        ]
    return "\n".join(lines) + "\n"


def _number(value: float | None, form: str) -> str:
    return "not finite" if value is None else f"{value:{form}}"


def _range(low: float | None, high: float | None, form: str) -> str:
    return "" if low is None or high is None else f"{low:{form}} to {high:{form}}"


def plot_endless(rows: Sequence[Row], out_stem: Path) -> list[Path]:
    """Loss, and loss over recomputation, by position, a line for each scaler; writes `out_stem`.png and .svg,
    `out_stem`_2 for a second setting, and so on."""
    groups = by_setting(endless_rows(rows), _APART | METHOD | {"window", "context"})
    return [path for group, stem in zip(groups, style.stems(out_stem), strict=False) for path in _plot(group, stem)]


def _plot(found: Sequence[Row], out_stem: Path) -> tuple[Path, Path]:
    ropes = list(dict.fromkeys(row["rope"] for row in found))
    drawn = style.line_styles(ropes)
    about = f"{short(found[0]['model'])} ({found[0]['dtype']}) on {short(found[0]['text'])}"
    with style.figure(8.5, 6.2, f"A text without an end: {about}") as fig:
        upper, lower = fig.subplots(2, 1, sharex=True)
        style.style_axes(upper, x="", y="loss, nats a token")
        style.style_axes(lower, x="position", y="over recomputation, nats")
        lower.axhline(0, color=style.MUTED, lw=1)
        for rope in ropes:
            longest = max(row["context"] for row in found if row["rope"] == rope)
            own = [row for row in found if (row["rope"], row["context"]) == (rope, longest)]
            at, line = [row["end"] for row in own], drawn[rope]
            look = {"color": line.color, "marker": line.marker, "linestyle": line.dashes, "lw": line.width, "ms": 4}
            upper.plot(at, [row["loss"] for row in own], label=rope, **look)
            lower.plot(at, [row["difference"] for row in own], **look)
            known = [row for row in own if row["difference_low"] is not None]
            lower.vlines(
                [row["end"] for row in known],
                [row["difference_low"] for row in known],
                [row["difference_high"] for row in known],
                color=line.color,
                lw=1,
            )
        ends = sorted({row["end"] for row in found})
        for axes in (upper, lower):
            style.length_axis(axes, ends, ends[0] / 1.2, ends[-1] * 1.2)
        style.mark_length(upper, found[0]["trained_length"], "trained length")
        upper.legend(loc="upper right", frameon=False)
        memory = max(row["cache_mb"] for row in found)
        note = f"Every point is a bucket that ends there. The cache never took more than {memory:.3g} MB."
        fig.supxlabel(note, **style.FOOTNOTE)
        return style.save(fig, out_stem)
