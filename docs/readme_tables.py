"""The tables of README.md, from docs/speed.jsonl and runs in docs/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from ropewalk.evals.continuation.methods import EXACT, HEALING, OFF, ONE_BACK, STEPS
from ropewalk.evals.continuation.table import OVER_EXACT, summarize
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import format_length

DOCS = Path(__file__).resolve().parent


MAPS = {
    "smollm2": {
        "none": "",
        "yarn:4": "",
        "ntk-mixed:4": "",
        "rerope:2k": " (L/4)",
        "rerope:4k": " (L/2)",
        "self-extend:8,window=2k": "",
        "dual-chunk": "",
    },
    "maps-tiny": {
        "none": "",
        "yarn:4": "",
        "ntk-mixed:4": "",
        "rerope:64": " (L/4)",
        "rerope:128": " (L/2)",
        "self-extend:8,window=64": "",
        "dual-chunk": "",
    },
}
"""The methods of the README's tables by run, with what is said of their windows."""


class Column(NamedTuple):
    """A column: its title, the places of the scored tokens where a run has several, and the context."""

    title: str
    places: str | None
    context: int
    has_logn: bool


MAP_COLUMNS = {
    "smollm2": (
        Column("Dream: 8k", "0:32207", 8192, False),
        Column("16k", "0:32207", 16384, False),
        Column("with log n: 16k", "0:32207", 16384, True),
        Column("As You Like It: 8k", "1:41813", 8192, False),
        Column("32k", "1:41813", 32768, False),
        Column("with log n: 32k", "1:41813", 32768, True),
    ),
    "maps-tiny": (
        Column("256", None, 256, False),
        Column("512", None, 512, False),
        Column("1k", None, 1024, False),
        Column("with log n: 512", None, 512, True),
        Column("1k", None, 1024, True),
    ),
}


CUTS = {
    "shakespeare, any character": "Shakespeare, any character",
    "code, any character": "code, any character",
    "shakespeare, after a space": "Shakespeare, after a space",
    "code, word border in a token": "code, word border in a token",
    "chinese, word border in a token": "Chinese, word border in a token",
}
"""The columns of the table of continuations, by the names of their cuts."""

WAYS = {
    OFF: "off",
    HEALING: "transformers' `token_healing`",
    ONE_BACK: "one token back",
    STEPS: "step-by-step mask",
    EXACT: "**exact**",
}
"""Its rows."""


def tables() -> dict[str, str]:
    """Every table by the name of its block."""
    return {"speed": _speeds(), **{name: _maps(name) for name in MAPS}, "continuation": _continuation()}


def _speeds() -> str:
    """The measurements in docs/speed.jsonl, lines that `ropewalk speed --against` printed, as one table."""
    parts = []
    for line in (DOCS / "speed.jsonl").read_text(encoding="utf-8").splitlines():
        run = json.loads(line)
        cells = {(t["engine"], t["what"], t["length"]): t for t in run["timings"]}
        lengths = sorted({length for _, _, length in cells})
        columns = [(what, length) for what in ("decode", "prefill") for length in lengths]
        engines = list(dict.fromkeys(engine for engine, _, _ in cells))
        titles = [f"{what} at {format_length(length)}" for what, length in columns]
        parts += [f"| tokens a second | {' | '.join(titles)} |", "|---" * (len(columns) + 1) + "|"]
        for engine in engines:
            found = [cells.get((engine, *column)) for column in columns]
            shown = ["" if t is None else _speed(t, engine == engines[0]) for t in found]
            parts.append(f"| {engine} | {' | '.join(shown)} |")
        parts += [
            "",
            f"{run['cpu']}, {run['threads']} threads, memory reads {run['bandwidth_gb_s']:.0f} GB/s; {run['model']}; "
            f"transformers {run['versions']['transformers']}, llama-cpp-python {run['versions']['llama-cpp-python']}. "
            "In brackets: how many times as fast ropewalk is, medians of ratios taken in the same turn.",
            "",
        ]
    return "\n".join(parts).strip()


def _speed(timing: dict[str, Any], is_ours: bool) -> str:
    share, speed = timing["memory_share"], f"{timing['speed']['median']:.3g}"
    if is_ours:
        return f"**{speed}**" + (f" ({share:.0%} of what memory allows)" if share is not None else "")
    return f"{speed} ({timing['ratio']['median']:.2g}x)"


def _maps(name: str) -> str:
    """A table of the README: what position maps do, from the run docs/results/NAME."""
    methods, columns = MAPS[name], MAP_COLUMNS[name]
    found = {
        (place, row["context"], row["rope"]): row["loss"]
        for row in Run(DOCS / "results" / name).rows
        for place in (row["places"], None)
    }

    def loss(rope: str, column: Column, has_logn: bool) -> float | None:
        with_logn = "logn" if rope == "none" else f"{rope}|logn"
        return found.get((column.places, column.context, with_logn if has_logn else rope))

    def cell(rope: str, column: Column) -> str:
        value = loss(rope, column, column.has_logn)
        if value is not None:
            best = min(other for one in methods if (other := loss(one, column, column.has_logn)) is not None)
            return f"**{value:.3f}**" if value == best else f"{value:.3f}"
        instead = loss(rope, column, True) if column.context == columns[0].context else None
        return "" if instead is None else f"{instead:.3f} (log n)"

    lines = [f"| method | {' | '.join(column.title for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for rope, remark in methods.items():
        lines.append(f"| `{rope}`{remark} | {' | '.join(cell(rope, column) for column in columns)} |")
    return "\n".join(lines)


def _continuation() -> str:
    """Ways of going on from a cut prompt, from the run docs/results/continuation."""
    summaries = summarize(Run(DOCS / "results" / "continuation").rows)
    values = {(summary.name, summary.method): summary.values for summary in summaries}
    counts = sorted({summary.cuts for summary in summaries if summary.name in CUTS})
    lines = [f"| | {' | '.join(CUTS.values())} |", "|---" * (len(CUTS) + 1) + "|"]
    for method, title in WAYS.items():
        cells = []
        for name in CUTS:
            found = [values[name, method].get(field) for field in ("next_byte_bits", "finished")]
            cells.append(", ".join(f"{value.mean:.2f}" for value in found if value is not None))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    lines += [
        "",
        f"{' to '.join(map(str, (counts[0], counts[-1])))} cuts of each kind. Bits that the next byte takes more than "
        "under exact, cut by cut, with 95 % intervals:",
        "",
        f"| | {' | '.join(CUTS.values())} |",
        "|---" * (len(CUTS) + 1) + "|",
    ]
    for method in (ONE_BACK, STEPS):
        more = [values[name, method][OVER_EXACT] for name in CUTS]
        cells = [f"{_plain(one.mean)} ({_plain(one.low)} to {_plain(one.high)})" for one in more]
        lines.append(f"| {WAYS[method]} | {' | '.join(cells)} |")
    runs = ", ".join(_plain(values[name, EXACT]["extra_forwards"].mean) for name in CUTS)
    lines += ["", f"Runs of the model that exact takes more than off, by column: {runs}."]
    return "\n".join(lines)


def _plain(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
