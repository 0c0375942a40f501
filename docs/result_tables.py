"""The tables and plots of docs/results.md and docs/contexts.md, from the runs in docs/results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import position_tables
from across_tables import across
from position_tables import changed, code

from ropewalk.evals.contexts.report import facts_markdown, plot_endless, plot_facts
from ropewalk.evals.continuation.report import plot_continuation, summarize
from ropewalk.evals.protocols.fixed_target import Repeat
from ropewalk.evals.protocols.harm import Harm
from ropewalk.evals.reports.grid import Shown
from ropewalk.evals.reports.loss_plots import named_groups, plot_run
from ropewalk.evals.reports.tables import extra_grids, loss_table, nats, reach_table, share
from ropewalk.evals.retrieval.score import score
from ropewalk.evals.runs.compare import UNTOUCHED, difference
from ropewalk.evals.runs.result import Run
from ropewalk.scaling import format_length

RESULTS = Path(__file__).resolve().parent / "results"
RUNS = ("tiny", "smollm2")

PUBLISHED = {
    "none": (49.41, 24.17, 23.16),
    "linear:8": (None, 15.04, 13.54),
    "ntk:8": (None, 51.28, 39.27),
    "ntk-fixed:8": (None, 51.86, 39.61),
    "ntk-mixed:8": (None, 53.09, 40.12),
    "ntk-mixed:8|logn": (None, 59.11, 42.38),
    "rerope:128": (None, 77.90, 48.48),
    "rerope:128|logn": (None, 82.40, 48.85),
}
"""kexue.fm 9675, 9706 and 9708: percent within the trained length of 512, and at 4096, repeated and fresh."""


MAPS_TINY = {
    "none": "",
    "yarn:4": "",
    "ntk-mixed:4": "",
    "rerope:64": " (L/4)",
    "rerope:128": " (L/2)",
    "self-extend:8,window=64": "",
    "dual-chunk": "",
}
"""The methods of the table with and without log n, with what is said of their windows."""


ONE_SINK = "sink-window:128,sinks=1"
"""A pass of the tiny model that docs/contexts.md tells in a sentence."""


def tables() -> dict[str, str]:
    """Every table of docs/results.md by the name of its block."""
    return {
        **{name: _run(name) for name in RUNS},
        "across": across(),
        "models": _models(),
        "retrieval": _retrieval(),
        "positions-within": position_tables.within(),
        "positions-beyond": position_tables.beyond(),
        "positions-four": position_tables.beyond(position_tables.FOUR_TIMES),
        "positions-qwen": position_tables.beyond(position_tables.QWEN),
        "maps-tiny": _maps_tiny(),
        "repetition": _repetition(),
    }


def contexts_tables() -> dict[str, str]:
    """Those of docs/contexts.md."""
    facts = facts_markdown(Run(RESULTS / "facts").rows).splitlines()
    return {"facts": "\n".join(line for line in facts if line.startswith("|")), "endless": _endless()}


def draw() -> None:
    """Every plot of a run in docs/results."""
    drawn = [plot for name in RUNS for plot in plot_run(_shown(name))]
    drawn += plot_facts(Run(RESULTS / "facts").rows, RESULTS / "facts" / "facts")
    endless = RESULTS / "endless-tiny"
    drawn += plot_endless(Run(endless).rows, endless / "endless")
    summaries = summarize(Run(RESULTS / "continuation").rows)
    drawn += plot_continuation(summaries, "smollm2-135m", RESULTS.parent / "continuation")
    for plot in drawn:
        if plot.suffix == ".png":
            plot.unlink()


def _shown(name: str) -> Run:
    """The run docs/results/NAME, without the fingerprints of weights: older rows have none, and would be in tables of
    their own. The weights are the same: both models are pinned by their sha256."""
    run = Run(RESULTS / name)
    for row in run.rows:
        row.pop("weights", None)
    return run


def _run(name: str) -> str:
    """The tables of the run docs/results/NAME, each below its plot."""
    run = _shown(name)
    parts = []
    for stem, group in named_groups(run.rows):
        protocol = group[0]["protocol"]
        parts.append(f"![{protocol}](results/{name}/{stem}.svg)\n")
        if protocol not in (Harm.name, Repeat.name):
            parts.append(loss_table(group).to_markdown())
        parts += [grid.to_markdown() for grid in extra_grids(group)[:1]]
    reaches = reach_table(run)
    if reaches:
        reaches.rows[:] = [(name, cells) for name, cells in reaches.rows if any(_is_length(cell) for cell in cells)]
        parts.append("Effective length by loss; methods without one are left out.\n")
        parts += [line for line in reaches.to_markdown().splitlines() if line.startswith("|")]
    return "\n".join(parts).strip().replace("not run", "")


def _is_length(cell: Shown) -> bool:
    return cell.main[:1].isdigit()


def _endless() -> str:
    """A pass of each model by position: loss, and how much more than recomputation; how much one sink differs."""
    passes: dict[str, dict[str, dict[str, Any]]] = {}
    for folder in ("endless-tiny", "endless-smollm2"):
        for row in Run(RESULTS / folder).rows:
            title = f"{Path(row['model']).name}, `{row['rope']}`"
            passes.setdefault(title, {})[f"{row['start']:,} to {row['end']:,}"] = row
    one_sink = passes.pop(f"tiny-llama, `{ONE_SINK}`")
    positions = list(dict.fromkeys(position for rows in passes.values() for position in rows))
    lines = [f"| position | {' | '.join(passes)} |", "|---" * (len(passes) + 1) + "|"]
    for position in positions:
        cells = [_beside_recomputation(rows.get(position)) for rows in passes.values()]
        lines.append(f"| {position} | {' | '.join(cells)} |")
    caches = [f"{max(row['cache_mb'] for row in rows.values()):.1f}" for rows in passes.values()]
    four_sinks = next(iter(passes.values()))
    apart = max(abs(four_sinks[position]["loss"] - row["loss"]) for position, row in one_sink.items())
    return "\n".join(
        [
            *lines,
            f"| cache at most, MB | {' | '.join(caches)} |",
            "",
            f"With one sink instead of four tiny-llama's losses differ by at most {apart:.3f}.",
        ]
    )


def _beside_recomputation(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    difference, low, high = (f"{row[key]:+.3f}" for key in ("difference", "difference_low", "difference_high"))
    return f"{row['loss']:.3f}, {difference} ({low} to {high})"


def _models() -> str:
    """What each method costs each model of docs/results/models: the paired difference to the untouched model at the
    same context, or at the trained length if the context is beyond it."""
    run = Run(RESULTS / "models")
    rows = {(row["model"], row["tokens_sha256"], row["context"], row["rope"]): row for row in run.rows}

    def cell(model: str, scored: str, context: int, rope: str) -> str:
        row = rows.get((model, scored, context, rope))
        if row is None:
            return ""
        base = rows[model, scored, min(context, row["trained_length"]), UNTOUCHED]
        change = None if base is row else difference(run, row, base)
        return f"loss {row['loss']:.3f}" if change is None else changed(change)

    columns = sorted({key[:3] for key in rows}, key=lambda column: (column[0], column[2]))
    heads = [f"{model}, {format_length(context)}" for model, _, context in columns]
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(columns) + 1) + "|"]
    for rope in dict.fromkeys(row["rope"] for row in run.rows):
        cells = [cell(*column, rope) for column in columns]
        lines.append(f"| {code(rope)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _retrieval() -> str:
    """The trials of docs/results/retrieval by model, task, length and method."""
    found: dict[tuple[str, str, int, str], list[dict[str, Any]]] = {}
    for row in Run(RESULTS / "retrieval").rows:
        found.setdefault((row["model"], row["task"], row["context"], row["rope"]), []).append(row)
    lines = ["| model | task | length | method | trials | right | log-probability, nats a token |", "|---" * 7 + "|"]
    for (model, task, length, rope), rows in sorted(found.items()):
        told = score(rows)
        cells = [model, task, format_length(length), code(rope), str(told.trials), share(told).text, nats(told).text]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _repetition() -> str:
    """Our accuracies beside the published ones."""
    found = json.loads((RESULTS / "repetition.json").read_text(encoding="utf-8"))
    lines = [
        "| method | ours: 256 | 2k, repeated | 2k, fresh | published: 512 | 4k, repeated | 4k, fresh |",
        "|---" * 7 + "|",
    ]
    for one in found:
        ours = [f"{100 * one[kind]['mean']:.1f}" for kind in ("within", "repeated", "fresh")]
        theirs = ["" if value is None else f"{value:.1f}" for value in PUBLISHED[one["rope"]]]
        lines.append(f"| {code(one['rope'])} | {' | '.join([*ours, *theirs])} |")
    return "\n".join(lines)


def _maps_tiny() -> str:
    """What log n changes, from the run docs/results/maps-tiny."""
    losses = {(row["context"], row["rope"]): row["loss"] for row in Run(RESULTS / "maps-tiny").rows}
    columns = ((256, False), (512, False), (1024, False), (512, True), (1024, True))

    def loss(rope: str, context: int, has_logn: bool) -> float:
        with_logn = "logn" if rope == "none" else f"{rope}|logn"
        return float(losses[context, with_logn if has_logn else rope])

    best = {column: min(loss(rope, *column) for rope in MAPS_TINY) for column in columns}
    lines = ["| method | 256 | 512 | 1k | with log n: 512 | 1k |", "|---" * (len(columns) + 1) + "|"]
    for rope, remark in MAPS_TINY.items():
        values = {column: loss(rope, *column) for column in columns}
        shown = [f"**{value:.3f}**" if value == best[column] else f"{value:.3f}" for column, value in values.items()]
        lines.append(f"| `{rope}`{remark} | {' | '.join(shown)} |")
    return "\n".join(lines)
