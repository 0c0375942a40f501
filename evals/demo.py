"""`ropewalk demo`: the whole story on the embedded model."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from transformers.cache_utils import Cache

from ..engine.load import cpu_has_bfloat16, load
from ..engine.model import Model
from ..engine.sampling import SamplingParams
from ..engine.storage import write_atomic
from ..scaling.lengths import format_length
from ..scaling.spec import parse
from .data import load_text
from .models.local import LocalModel
from .models.measured import MeasuredModel
from .protocols.fixed_target import FixedTarget
from .protocols.perplexity_cell import PerplexityCell, cells
from .reports.report import Passage, print_results, publish
from .runs.cell import Cell
from .runs.measure import measure_all
from .runs.result import Row, Run

MODEL, TEXT = "smollm2-135m", "shakespeare"
TARGET = 1024  # tokens scored: the last ones of a play
PASSAGE = SamplingParams(max_new_tokens=96, temperature=0.7, top_p=0.9, seed=1)
RECOMMENDATION = (
    "Without time to tune take auto (--rope auto, rope='auto'); for an engine that serves a config file yarn:F, F the "
    "ratio of the lengths. `ropewalk tune` measures your model."
)
CLOSING_SECONDS = 25  # of the time limit kept for the passage and the report


@dataclass
class Winner:
    """The scaler with the lowest loss at the longest context, with its cache if it was measured
    just now."""

    cell: PerplexityCell
    loss: float
    cache: Cache | None


def specs(ratio: int) -> list[str]:
    """The scalers compared at `ratio` times the trained length: `auto` and `yarn` are what
    docs/choose.md recommends. NTK-aware needs a factor above the ratio of lengths, since its fast
    pairs are hardly slowed."""
    return ["none", f"linear:{ratio}", f"ntk:{2 * ratio}", f"yarn:{ratio}", "auto"]


def run_demo(*, full: bool, max_minutes: float | None, out: Path) -> None:
    """Fetch, measure, write a passage, report."""
    started = time.monotonic()
    console = Console()
    run = Run(out)
    console.print(f"[bold]How far does {MODEL} read, and which scaler carries it further?[/bold]\n", highlight=False)
    text = load_text(TEXT)
    # max_length: the passage may be the untouched model's, past its reach. The checkpoint was bfloat16 once.
    model = load(MODEL, dtype="bfloat16" if cpu_has_bfloat16() else "auto", max_length=2**20)
    L = model.trained_length
    ratio = 4 if full else 2
    plan = FixedTarget(contexts=tuple(L * n // 4 for n in (1, 2, 4, 8, *((16,) if full else ()))), target=TARGET)
    shortest, longest = min(plan.contexts), max(plan.contexts)

    def is_essential(cell: Cell) -> bool:
        is_reference = cell.context == L and not cell.scaler.parts
        return cell.context in (shortest, longest) or is_reference

    every = cells(LocalModel(model), text, [parse(spec) for spec in specs(ratio)], plan)
    planned = [cell for cell in every if isinstance(cell, PerplexityCell)]
    # In the order in which they earn their time, so that the time limit leaves the least out.
    planned.sort(key=lambda cell: (not is_essential(cell), cell.context if is_essential(cell) else -cell.context))
    console.print(
        f"{model.name}, {model.hf.num_parameters() / 1e6:.0f}M parameters, trained on {format_length(L)} tokens, in "
        f"{model.precision}. Loss on the same last {TARGET} tokens of a play, "
        f"reading {', '.join(format_length(c) for c in plan.contexts)} tokens up to its end. "
        f"auto is the untouched model up to {format_length(L)} and {_beyond(model, longest)} beyond.\n",
        highlight=False,
    )
    run.write_environment()
    best = [_best_so_far(run, planned, longest)]

    def remember_best(cell: PerplexityCell, rows: list[Row], measured: MeasuredModel) -> None:
        if cell.context == longest and (best[0] is None or _loss(rows[0]) < best[0].loss):
            best[0] = Winner(cell, _loss(rows[0]), measured.cache)

    deadline = None if max_minutes is None else started + 60 * max_minutes - CLOSING_SECONDS
    outcome = measure_all(
        LocalModel(model),
        [replace(cell, then=remember_best) for cell in planned],
        run,
        console,
        deadline=deadline,
        is_essential=is_essential,
    )
    assert best[0] is not None, "the longest context is essential"
    with console.status(f"{best[0].cell.scaler} writes a passage"):
        passage = _passage(model, best[0], run)
        files = publish(run, title=f"{MODEL} past its trained length", passages=[passage])
    print_results(run, files, outcome.left_out, console)
    console.print(f"\n{RECOMMENDATION}", highlight=False)
    console.print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {files[0]}", highlight=False)


def _beyond(model: Model, length: int) -> str:
    """What `auto` takes for a text of `length` tokens."""
    model.rope = "auto"
    return str(model.rope_at(length))


def _best_so_far(run: Run, planned: list[PerplexityCell], longest: int) -> Winner | None:
    """The best of the cells that an earlier, interrupted run measured at the longest context."""
    pairs = [(cell, run.find(cell.row_recipes()[0])) for cell in planned if cell.context == longest]
    measured = [Winner(cell, _loss(row), None) for cell, row in pairs if row is not None]
    return min(measured, key=lambda winner: winner.loss, default=None)


def _loss(row: Row) -> float:
    """Of a row; one that is not finite, which is stored as null, is the worst."""
    return math.inf if row["loss"] is None else float(row["loss"])


def _passage(model: Model, best: Winner, run: Run) -> Passage:
    """What the winner writes in place of the play's last tokens, after reading the longest context
    up to there.

    Goes on from the cache of the measurement. Kept in the run's folder, so that it is written once.
    """
    rope = str(best.cell.scaler)
    ids = best.cell.passages[-1].ids[: -TARGET // 2]
    prompt = f"[… {len(ids)} tokens of the play, the last of them:]\n{model.tokenizer.decode(ids[-150:])}"
    file = run.folder / "passage.json"
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if (stored["prompt"], stored["rope"]) == (prompt, rope):
            return Passage(**stored)
    if best.cache is not None:
        best.cache.crop(len(ids) - 1 - best.cache.get_seq_length())
    model.rope = best.cell.scaler
    text = model.generate_ids(ids, PASSAGE, best.cache).text
    write_atomic(file, json.dumps({"prompt": prompt, "text": text, "rope": rope}).encode())
    return Passage(prompt=prompt, text=text, rope=rope)
