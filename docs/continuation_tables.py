"""The tables of docs/continuation.md, from the run docs/results/continuation."""

from __future__ import annotations

from pathlib import Path

from ropewalk.evals.continuation.methods import EXACT, HEALING, OFF, ONE_BACK, STEPS
from ropewalk.evals.continuation.report import OVER_EXACT, Value, summarize
from ropewalk.evals.runs.result import Run

DOCS = Path(__file__).resolve().parent

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
    """The block of docs/continuation.md."""
    return {"continuation": _continuation()}


def values() -> dict[tuple[str, str], dict[str, Value]]:
    """What was measured, by the name of the cuts and the method."""
    summaries = summarize(Run(DOCS / "results" / "continuation").rows)
    return {(summary.name, summary.method): summary.values for summary in summaries}


def _continuation() -> str:
    """Ways of going on from a cut prompt, from the run docs/results/continuation."""
    found, summaries = values(), summarize(Run(DOCS / "results" / "continuation").rows)
    counts = sorted({summary.cuts for summary in summaries if summary.name in CUTS})
    lines = [f"| | {' | '.join(CUTS.values())} |", "|---" * (len(CUTS) + 1) + "|"]
    for method, title in WAYS.items():
        cells = []
        for name in CUTS:
            known = [found[name, method].get(field) for field in ("next_byte_bits", "finished")]
            cells.append(", ".join(f"{value.mean:.2f}" for value in known if value is not None))
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
        more = [found[name, method][OVER_EXACT] for name in CUTS]
        cells = [f"{_plain(one.mean)} ({_plain(one.low)} to {_plain(one.high)})" for one in more]
        lines.append(f"| {WAYS[method]} | {' | '.join(cells)} |")
    runs = ", ".join(_plain(found[name, EXACT]["extra_forwards"].mean) for name in CUTS)
    lines += ["", f"Runs of the model that exact takes more than off, by column: {runs}."]
    return "\n".join(lines)


def _plain(value: float) -> str:
    return f"{value:.2f}".replace("-0.00", "0.00")
