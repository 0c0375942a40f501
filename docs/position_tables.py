"""The tables and the plot of README.md and docs/results.md from passes over long texts, by position."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ropewalk.engine.auto import self_extend
from ropewalk.evals.protocols.whole_text import ByPosition, Sliding
from ropewalk.evals.reports import style
from ropewalk.evals.runs.compare import UNTOUCHED, Difference, column_name
from ropewalk.evals.runs.result import Losses, Row, Run
from ropewalk.evals.statistics import paired_difference
from ropewalk.scaling import RopeSpec, format_length, parse

RUN = Path(__file__).resolve().parent / "results" / "positions"
FOUR_TIMES = RUN.with_name("positions-4x")
QWEN = RUN.with_name("positions-qwen")

SMOLLM2_LENGTH = 8192


def auto(trained_length: int, times: int) -> str:
    """What `auto` is, untuned, at a multiple of the trained length."""
    rope = RopeSpec(dim=64, base=10_000.0, trained_length=trained_length)
    return str(self_extend(rope, trained_length, times * trained_length))


def relative(rope: str, trained_length: int) -> str:
    """A spec with its lengths as multiples of the trained one, which is the same for every model."""
    return re.sub(r"\b(\d+)k\b", lambda found: f"{int(found[1]) * 1024 / trained_length:g}x", rope)


README_METHODS = {
    UNTOUCHED: "the model as it was trained",
    relative(auto(SMOLLM2_LENGTH, 2), SMOLLM2_LENGTH): "`auto`",
    "dual-chunk": "",
    "rerope:0.5x|logn": "",
    "yarn:2": "for a served engine",
}
"""The methods of the README's table and plot, with what is said of each."""

_BLOCK = 1024  # positions of a point of the plot

Bucket = dict[str, Row]
"""The rows of one range of positions in one text, by scaler."""


def within() -> str:
    """What each scaler costs in the second half of the trained length: the paired difference to the untouched model."""
    run = Run(RUN)
    buckets = [rows for rows in _buckets(run) if _first(rows)["bucket_end"] == _first(rows)["trained_length"]]
    lines = [_cells("untouched", [f"loss {_cut(run, rows[UNTOUCHED]).mean():.3f}" for rows in buckets])]
    for rope in _ropes(buckets):
        if rope != UNTOUCHED:
            lines.append(_cells(code(rope), [changed(_difference(run, rows[rope])) for rows in buckets]))
    return _table(buckets, lines)


def beyond(folder: Path = RUN) -> str:
    """The loss beyond the trained length, and the paired difference to the untouched model that reads less of the text:
    windows of the trained length."""
    run = Run(folder)
    buckets = _beyond(run)
    lines = [_cells("untouched, cut to the trained length", _cut_losses(run, buckets))]
    for rope in _ropes(buckets):
        cells = [_beside(run, rows[rope]) for rows in buckets]
        lines.append(_cells("untouched" if rope == UNTOUCHED else code(rope), cells))
    return _table(buckets, lines)


def costs(folder: Path) -> list[tuple[Row, Difference]]:
    """The rows beyond the trained length, each with its paired difference to the untouched model that reads less."""
    run = Run(folder)
    return [(row, _difference(run, row)) for rows in _beyond(run) for row in rows.values()]


def readme_table() -> str:
    """The plot and the table of the README: the losses of `README_METHODS` beyond the trained length."""
    run = Run(RUN)
    buckets = _beyond(run)
    lines = [
        "![Loss by position, compared with the untouched model on a cut text](docs/positions.svg)",
        "",
        _cells("method", [*(rows[UNTOUCHED]["text"] for rows in buckets), "passkeys found"]),
        "|---" * (len(buckets) + 2) + "|",
        _cells("untouched, text cut to 8k", [*_cut_losses(run, buckets), ""]),
    ]
    passkeys = _passkeys()
    for method, remark in README_METHODS.items():
        rope = _absolute(method, SMOLLM2_LENGTH)
        name = code(rope) + (f" ({remark})" if remark else "")
        lines.append(_cells(name, [*(_beside(run, rows[method]) for rows in buckets), passkeys[rope]]))
    return "\n".join(lines)


def _passkeys() -> dict[str, str]:
    """How many passkeys each method found at twice the trained length."""
    found: dict[str, list[Row]] = {}
    for row in Run(RUN.parent / "retrieval").rows:
        if (row["model"], row["task"], row["context"]) == ("smollm2-135m", "passkey", 2 * SMOLLM2_LENGTH):
            found.setdefault(row["rope"], []).append(row)
    return {rope: f"{round(sum(row['correct'] for row in rows))} of {len(rows)}" for rope, rows in found.items()}


def draw() -> None:
    """The plot of the README: what reading on costs or gains, by position, beside the untouched model on a text that
    is cut to its trained length; means over the texts."""
    run = Run(RUN)
    texts = list(dict.fromkeys(row["text"] for row in run.rows))
    looks = style.line_styles(list(README_METHODS))
    names = {method: _absolute(method, SMOLLM2_LENGTH) for method in README_METHODS}
    with style.figure(style.WIDTH, 4.9, "SmolLM2-135M reads 16k tokens of three texts") as fig:
        axes = fig.add_subplot()
        style.style_axes(axes, x="position in the text (tokens)", y="loss, less that on the cut text (nats)")
        axes.set_ylim(-0.1, 0.5)
        ends = {}
        for method, look in looks.items():
            apart = np.mean([_apart(run, method, text) for text in texts], axis=0)
            edges = range(_BLOCK - 1, len(apart), _BLOCK)  # the first token is not scored
            means = np.array([block.mean() for block in np.split(apart, edges)])
            centres = (np.arange(len(means)) + 0.5) * _BLOCK
            axes.plot(centres, means, color=look.color, ls=look.dashes, lw=look.width, marker=look.marker, ms=4)
            ends[method] = float(apart[SMOLLM2_LENGTH - 1 :].mean())
        ticks = range(0, 2 * SMOLLM2_LENGTH + 1, 2048)
        axes.set_xticks(list(ticks), [format_length(tick) if tick else "0" for tick in ticks])
        axes.axvline(SMOLLM2_LENGTH, color=style.MUTED, linewidth=1.1, linestyle=":", zorder=1)
        axes.annotate("trained length", (SMOLLM2_LENGTH - 150, 0.46), ha="right", color=style.MUTED, fontsize=9)
        labels = {
            method: f"{names[method]}  {ends[method]:+.3f} beyond 8k"
            for method in sorted(ends, key=lambda one: -ends[one])
        }
        style.legend_below(axes, labels, looks)
        png, _ = style.save(fig, RUN.parent.parent / "positions")
    png.unlink()


def _apart(run: Run, method: str, text: str) -> Losses:
    """The losses at every position of one text under one method, less those of the model on the cut text."""
    rows = [rows[method] for rows in _buckets(run) if _first(rows)["text"] == text]
    return np.concatenate([_stored(run, row) - _cut(run, row) for row in rows])


def _beyond(run: Run) -> list[Bucket]:
    return [rows for rows in _buckets(run) if _first(rows)["bucket_start"] >= _first(rows)["trained_length"]]


def _cut_losses(run: Run, buckets: Sequence[Bucket]) -> list[str]:
    return [f"{_cut(run, _nearest(rows)).mean(dtype=np.float64):.3f}" for rows in buckets]


def _stored(run: Run, row: Row) -> Losses:
    losses = run.losses(row)
    assert losses is not None
    return losses


def _beside(run: Run, row: Row) -> str:
    return f"{row['loss']:.3f}, {changed(_difference(run, row))}"


def _difference(run: Run, row: Row) -> Difference:
    """How a row differs from the model on the cut text, in pairs of tokens."""
    mean, low, high = paired_difference(_stored(run, row), _cut(run, row))
    return Difference(mean=mean, low=low, high=high)


def _cut(run: Run, row: Row) -> Losses:
    """The losses of the untouched model on the tokens of a row, in windows of the trained length that slide over the
    text, computed in the same number formats."""
    shared = ("model", "text_sha256", "dtype", "weights")
    (cut,) = (
        other
        for other in run.rows
        if other["protocol"] == Sliding.name and all(other[name] == row[name] for name in shared)
    )
    assert cut["text_tokens"] >= row["bucket_end"], "the windows end before the pass"
    losses = _stored(run, cut)
    _check_alignment(run, losses, row)
    return losses[row["bucket_start"] - 1 : row["bucket_end"] - 1]  # the first token is not scored


def _check_alignment(run: Run, losses: Losses, pass_row: Row) -> None:
    """The first window is the beginning of the pass, so its losses are those of the untouched model there, or near
    those of a scaler."""
    checked = 0
    for row in map(_nearest, _buckets(run)):
        if row["bucket_end"] <= row["trained_length"] and _same_pass(row, pass_row):
            found = losses[row["bucket_start"] - 1 : row["bucket_end"] - 1]
            assert np.corrcoef(found, _stored(run, row))[0, 1] > 0.95, "windows and pass score different tokens"
            checked += 1
    assert checked, "nothing shows that windows and pass score the same tokens"


def _same_pass(a: Row, b: Row) -> bool:
    return all(a[name] == b[name] for name in ("model", "text_sha256", "context", "places"))


def _buckets(run: Run) -> list[Bucket]:
    """Every range of positions of every text and model, in order."""
    found: dict[tuple[object, ...], Bucket] = {}
    for row in run.rows:
        if row["protocol"] == ByPosition.name and row["loss"] is not None:
            key = (row["model"], row["text"], row["context"], row["bucket_start"])
            found.setdefault(key, {})[relative(row["rope"], row["trained_length"])] = row
    return list(found.values())


def _absolute(rope: str, trained_length: int) -> str:
    """A spec with its lengths in tokens."""
    return str(parse(rope, trained_length))


def _ropes(buckets: Sequence[Bucket]) -> list[str]:
    return list(dict.fromkeys(rope for rows in buckets for rope in rows))


def _nearest(rows: Bucket) -> Row:
    """The row of the untouched model, or if it was not measured, of the first scaler."""
    return rows.get(UNTOUCHED, _first(rows))


def _first(rows: Bucket) -> Row:
    return next(iter(rows.values()))


def _table(buckets: Sequence[Bucket], lines: Sequence[str]) -> str:
    heads = []
    for rows in buckets:
        row = _first(rows)
        heads.append(f"{row['model']} ({format_length(row['trained_length'])}), {row['text']}, {column_name(row)}")
    return "\n".join([_cells("method", heads), "|---" * (len(buckets) + 1) + "|", *lines])


def _cells(name: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([name, *cells])} |"


def code(rope: str) -> str:
    """A spec in a cell of a table."""
    return f"`{rope.replace('|', chr(92) + '|')}`"


def changed(change: Difference) -> str:
    """A difference with its interval."""
    return f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
