"""The report's sections on perplexity rows and on retrieval rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...scaling import format_length
from ..protocols.effective_length import TOLERANCE, is_kept
from ..retrieval.score import ScoreGroup
from ..runs import compare
from ..runs.result import Row, Run
from .grid import NOTHING, Grid, Section, Shown, interval, signed, span
from .tables import TableCell, extra_grids, loss_table, score_grids

_PROTOCOLS = {
    "fixed-target": "Windows of every context length end at the same place, and the same last tokens are scored in "
    "all of them. Only the context before those tokens differs, so a difference is the effect of context.",
    "by-position": "One long pass over the text; the loss of every token counts in a bucket of its position. Later "
    "buckets hold other tokens than earlier ones, so compare methods within a bucket.",
    "sliding": "A window moves over the text by a stride, and only the tokens new to it are scored. A token sees at "
    "least the context length less the stride.",
    "truncate": "The first tokens of each document are scored, all of them. Longer contexts score more tokens, so "
    "compare methods at one length, not lengths with each other.",
    "llamacpp": "Disjoint chunks, of which the second half is scored, as llama.cpp's perplexity tool does.",
    "disjoint": "Disjoint windows with one token of context, every token scored, as lm-evaluation-harness does.",
    "longppl": "As fixed-target, but only those tokens count that need far context: the judge, one scaler for all, "
    "predicts them far better from the longest context than from the trained length (arXiv 2410.23771).",
    "repeat": "A passage, other text, and the passage again. The loss on its second occurrence, against the loss on it "
    "where other text stood in the place of the first, tells whether far context is used.",
    "harm": "The distribution of every next token within the trained length, compared with that of the untouched "
    "model.",
}


def loss_section(run: Run, group: list[Row]) -> Section:
    """The perplexity rows of one group."""
    table = loss_table(group)
    base, delta = compare.reference(group), compare.deltas(run, group)
    trained = format_length(group[0]["trained_length"])

    def grid(title: str, note: str, show: Callable[[TableCell], Shown]) -> Grid:
        rows = [(m, [show(c) for c in cells]) for m, cells in zip(table.methods, table.cells, strict=True)]
        return Grid(title=title, note=note, columns=table.columns, rows=rows)

    def show_delta(cell: TableCell) -> Shown:
        change = delta.get(cell.row["key"]) if cell.row else None
        if change is None:
            return NOTHING
        if cell.row is base:
            return Shown(main="0", small=("reference",), css="good")
        if not change.has_interval:
            return Shown(main=signed(change.mean), small=("no interval",))
        long_enough = cell.row is not None and cell.row["context"] >= cell.row["trained_length"]
        css = "good" if is_kept(change) else "bad" if change.low > TOLERANCE and long_enough else ""
        return Shown(main=signed(change.mean), small=(interval(change.low, change.high),), css=css)

    grids = [
        grid(
            "Loss, nats per token",
            "Lower is better; the lowest of each column is bold. 95% intervals below.",
            _loss,
        )
    ]
    if delta:
        note = (
            f"Paired, token by token, with 95% intervals. Green: upper bound at most +{TOLERANCE:g}, the rule of "
            f"the effective length. Red: lower bound above +{TOLERANCE:g}. Below {trained} a model reads less, so "
            "a difference there is not the fault of the method alone."
        )
        grids.append(grid(f"Difference to the untouched model at its trained length ({trained})", note, show_delta))
    grids += extra_grids(group)
    if any(_is_long_enough(cell.row) for cells in table.cells for cell in cells):
        started = sorted({str(row.get("run_started")) for row in group if row.get("loss") is not None})
        grids.append(grid("Speed and memory", _speed_note(len(started)), lambda cell: _speed(cell, started)))
    return Section(caption=table.caption, grids=grids, method=_loss_method(group))


def _loss(cell: TableCell) -> Shown:
    if cell.row is None:
        return Shown(main="not run", small=(cell.reason,) if cell.reason else (), css="none")
    row = cell.row
    tip = f"perplexity {row['perplexity']:.4g}, {row['bits_per_byte']:.3f} bits per byte, {row['tokens']:,} tokens"
    small = (interval(*cell.interval),) if cell.interval else ()
    return Shown(main=cell.text, small=small, css="best" if cell.is_best else "", tip=tip)


_LEAST_SECONDS = 10.0
"""A cell that took less says little of the speed."""


def _is_long_enough(row: Row | None) -> bool:
    return row is not None and float(row["seconds"]) >= _LEAST_SECONDS


def _speed_note(runs: int) -> str:
    note = (
        "Tokens per second of the whole forward pass; seconds and peak memory of the process so far below. Cells of "
        f"less than {_LEAST_SECONDS:g} seconds are left out."
    )
    if runs == 1:
        return note
    return (
        f"{note} They were measured in {runs} runs of the command, which may have had the machine to themselves or not."
    )


def _speed(cell: TableCell, started: Sequence[str]) -> Shown:
    """The speed of a cell, with the number of its run where there are several.

    Args:
        started: when each run of the command was started, in order.
    """
    row = cell.row
    if row is None or not _is_long_enough(row):
        return NOTHING
    memory = row.get("peak_memory_mb")
    small = [f"{row['seconds']:,.3g} s", f"{memory:,.0f} MB" if memory is not None else "memory unknown"]
    if len(started) > 1:
        small.append(f"run {started.index(str(row.get('run_started'))) + 1}")
    return Shown(main=f"{row['tokens_per_second']:,.0f}", small=tuple(small))


def _loss_method(group: Sequence[Row]) -> dict[str, str]:
    """How the rows of one group were measured, by name."""
    row = group[0]
    done = [r for r in group if r.get("loss") is not None]
    tokens, documents = (sorted({r[name] for r in done}) for name in ("tokens", "documents"))
    return {
        "Protocol": f"{row['protocol']}. {_PROTOCOLS.get(row['protocol'], '')}".strip(),
        "Scored": f"{span(tokens)} tokens per cell, from {span(documents)} document(s) or window(s)",
        "Text": f"{row['text']}, sha256 {row['text_sha256']}",
        "Model": f"{row['model']}, trained length {row['trained_length']:,} tokens, {row['dtype']} on {row['device']}",
        "Intervals": "95%, percentile bootstrap over blocks of 32 consecutive tokens, because neighbouring tokens "
        "are hard or easy together; for few blocks wider, as Student's t. They cover the choice of tokens within this "
        "text, not other texts.",
    }


_SUITES = {
    "passkey": "A number of five digits stands in a long text of the same few sentences, and is asked for at its end.",
    "niah": "A sentence with a number stands in a real text, and the number is asked for at its end.",
    "kv": "One of many random pairs of a JSON object is asked for.",
    "many-shot": "Words of four kinds stand with the letters that name the kinds, and the letter of a new word is "
    "chosen: the likeliest of the four.",
    "ngram-copy": "A passage of 16 random words stands among others. Its first four words stand again at the end, and "
    "the other 12 are asked for.",
    "latent-list": "Six operations of a long Python program change a list, and what it is at the end is asked for.",
    **{
        f"facts-noise-{needed}": f"Facts about persons stand among the sentences of a real text, and the place of a "
        f"person or a thing is asked for, which {needed} of them tell."
        for needed in (1, 2, 3)
    },
    "needle-meaning": "Sentences about four persons stand in a real text, and one person is asked for in other words.",
    "ruler-11-offline": "Eleven tasks of RULER (arXiv 2404.06654) that need no download, on another text: the scores "
    "are not RULER's. Every task counts alike.",
}


def score_section(group: ScoreGroup) -> Section:
    """The retrieval rows of one group."""
    return Section(caption=group.caption, grids=score_grids(group), method=_score_method(group))


def _score_method(group: ScoreGroup) -> dict[str, str]:
    row, rows = group.rows[0], group.rows
    depths = ", ".join(f"{depth:g}" for depth in group.depths) or "chosen by the seed"
    return {
        "Task": _SUITES.get(group.suite, f"The task {group.suite} of another package."),
        "Trials": f"{len(rows)} in all, {_range([trial['prompt_tokens'] for trial in rows])} tokens of prompt",
        "Depths": depths,
        **({"Chance": group.chance_note.strip()} if group.chance_note else {}),
        **({"Text": f"{row['text']}, sha256 {row['text_sha256']}"} if row.get("text") else {}),
        "Model": f"{row['model']}, trained length {row['trained_length']:,} tokens, {row['dtype']} on {row['device']}",
        "Intervals": "95%: Wilson's for answers that are right or wrong, bootstrap over trials for the others.",
    }


def _range(values: Sequence[int]) -> str:
    return span([min(values), max(values)] if min(values) < max(values) else [min(values)])
