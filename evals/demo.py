"""`ropewalk demo`: what the built-in model does beyond its trained length, within a time limit."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers.cache_utils import Cache

from ..engine.checkpoints.source import resolve
from ..engine.hf_model import weight_count
from ..engine.load import cpu_has_bfloat16, load
from ..engine.model import Model
from ..engine.sampling import SamplingParams
from ..engine.storage import write_atomic
from ..scaling.lengths import format_length
from ..scaling.spec import parse
from .data import load_text
from .demo_plan import DemoPlan, curve, in_order, needed, seconds_for
from .models.local import LocalModel
from .models.measured import ForwardCost, MeasuredModel
from .protocols.fixed_target import FixedTarget
from .protocols.perplexity_cell import PerplexityCell, cells
from .reports.report import Passage, print_results, publish
from .reports.verdict import verdicts
from .runs.cell import Cell
from .runs.compare import MEASURED
from .runs.measure import forward_rate, measure_all
from .runs.progress import RunProgress
from .runs.result import Row, Run

MODEL, TEXT = "smollm2-135m", "shakespeare"
TARGET = 1024  # tokens scored at each place: the last ones of a play
PASSAGE = SamplingParams(max_new_tokens=96, temperature=0.7, top_p=0.9, seed=1)
RECOMMENDATION = (
    "Without time to tune take auto (--rope auto, rope='auto'); for an engine that serves a config file yarn:F, F the "
    "ratio of the lengths. `ropewalk tune` measures your model."
)
_FIRST_CURVE = 110.0  # seconds, from the start, to the curve of the untouched model
_LEAST_CLOSING = 15.0  # seconds of the limit kept for the passage and the report
_MOST_CLOSING = 0.2  # the same as a share of the limit, at most


@dataclass
class Winner:
    """The scaler with the lowest loss at the longest context, with its cache if it was measured
    just now."""

    cell: PerplexityCell
    loss: float
    cache: Cache | None


def specs(ratio: float) -> list[str]:
    """The scalers compared at `ratio` times the trained length: the untouched model, and what
    docs/choose.md recommends. With time for four times the length, two older methods too; NTK-aware
    needs a factor above the ratio of lengths, since its fast pairs are hardly slowed."""
    factor = math.ceil(ratio)
    older = [f"linear:{factor}", f"ntk:{2 * factor}"] if factor >= 4 else []
    return ["none", "auto", f"yarn:{factor}", *older]


def run_demo(*, max_minutes: float | None, out: Path) -> list[Cell]:
    """Fetch, measure, write a passage, report. Returns the cells that were left out for lack of time.

    Args:
        max_minutes: hard limit for everything after the fetching; None goes to four times the trained length, and
            takes the time it takes.
        out: the run's folder.
    """
    console = Console()
    run = Run(out)
    console.print(f"[bold]How far does {MODEL} read, and which scaler carries it further?[/bold]\n", highlight=False)
    resolve(MODEL)
    text = load_text(TEXT)
    started = time.monotonic()  # after the downloads: a slow network leaves as much time as a fast one
    limit = None if max_minutes is None else started + 60 * max_minutes
    if max_minutes is not None:
        console.print(f"This takes at most {max_minutes:g} minutes (--max-minutes).", highlight=False)
    # max_length: the passage may be the untouched model's, past its reach. The checkpoint was bfloat16 once.
    model = load(MODEL, dtype="bfloat16" if cpu_has_bfloat16() else "auto", max_length=2**20)
    closing = max(_LEAST_CLOSING, time.monotonic() - started)  # a machine that loads slowly reports slowly
    if max_minutes is not None:
        closing = min(closing, _MOST_CLOSING * 60 * max_minutes)
    local = LocalModel(model)
    plan, rate = _plan(local, run, started, None if limit is None else limit - closing, console)
    spec_list = specs(plan.longest / model.trained_length)
    protocol = FixedTarget(contexts=plan.contexts, target=TARGET, samples=plan.samples)
    every = cells(local, text, [parse(spec) for spec in spec_list], protocol)
    planned = [cell for cell in every if isinstance(cell, PerplexityCell)]
    _describe(model, plan, spec_list, console)
    planned = _in_order(planned, plan, local, run, rate, started, limit, closing, console)
    run.write_environment()
    watcher = _Watcher(run, planned, plan, model.trained_length, console)
    todo = [cell for cell in planned if not watcher.is_untouched_auto(cell)]
    with RunProgress(console, limit, started) as bar:
        outcome = measure_all(
            local,
            [replace(cell, then=watcher.see) for cell in todo],
            run,
            console,
            deadline=None if limit is None else limit - closing,
            is_hard=True,
            rate=rate,
            is_wanted=watcher.is_wanted,
            progress=bar,
        )
    watcher.copy_untouched()
    rate = outcome.rate or rate
    passages = []
    if watcher.best is not None and (passage := _passage(model, watcher.best, run, limit, rate)) is not None:
        passages.append(passage)
    files = publish(run, title=f"{MODEL} past its trained length", passages=passages)
    print_results(run, files, outcome.left_out, console)
    for passage in passages:
        console.print(f"\nUnder {passage.rope} it wrote, after {passage.prompt.splitlines()[0]}", highlight=False)
        console.print(passage.text.strip(), style="italic", highlight=False, markup=False)
    _print_what_decides(run, console)
    console.print(f"\n{RECOMMENDATION}", highlight=False)
    console.print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {files[0]}", highlight=False)
    return outcome.left_out


def _print_what_decides(run: Run, console: Console) -> None:
    """The command with places enough for what the verdict leaves undecided; nothing if it decides all."""
    for verdict in verdicts(run):
        if verdict.samples is not None:
            ropes = " ".join(f"--rope {rope}" for rope in verdict.ropes)
            lengths = ",".join(map(format_length, verdict.contexts))
            console.print(
                f"\nAbout {verdict.samples} samples would decide what is undecided: ropewalk ppl {MODEL} {ropes} "
                f"--text {TEXT} --lengths {lengths} --samples {verdict.samples}",
                highlight=False,
                soft_wrap=True,
            )


def _plan(
    model: LocalModel, run: Run, started: float, deadline: float | None, console: Console
) -> tuple[DemoPlan, float | None]:
    """What is measured, and the machine's rate if that was measured: the plan of an earlier run in this folder, or
    one that fits the time."""
    stored = DemoPlan.stored(run)
    rate = None
    if deadline is not None:
        with console.status("measuring how fast this machine is"):
            rate = forward_rate(model, max(2, model.trained_length // 8))
        console.print(f"It computes about {rate / 1e9:.0f} GFLOP/s with this model.", highlight=False)
    if stored is not None:
        return stored, rate
    if rate is None or deadline is None:
        plan = DemoPlan.full(model.trained_length)
    else:
        now = time.monotonic()
        plan = DemoPlan.sized(model.trained_length, model.cost, rate, deadline - now, _FIRST_CURVE - (now - started))
    plan.store(run)
    return plan, rate


def _in_order(
    planned: list[PerplexityCell],
    plan: DemoPlan,
    model: LocalModel,
    run: Run,
    rate: float | None,
    started: float,
    limit: float | None,
    closing: float,
    console: Console,
) -> list[PerplexityCell]:
    """The cells in the order of measuring; says how long they take where there is no time for those that tell most."""
    if limit is None or rate is None:
        return in_order(planned, plan, model.trained_length, is_tight=False)
    now = time.monotonic()
    missing = [cell for cell in planned if not cell.is_done(run)]
    seconds = seconds_for(needed(missing, plan, model.trained_length), model.cost, rate)
    to_curve = seconds_for(curve(missing, plan, model.trained_length), model.cost, rate)
    is_too_long = now + seconds > limit - closing
    if is_too_long:
        minutes = math.ceil((now - started + closing + seconds) / 60)
        longest = max(seconds_for([cell], model.cost, rate) for cell in missing)
        goes_on = "The same command goes on with the rest"
        if now + longest > limit - closing:
            goes_on = f"One reading of {format_length(plan.longest)} tokens alone is too long for the limit"
        console.print(
            f"That takes about {minutes} minutes here, so what tells most comes first. {goes_on}; --max-minutes "
            f"{minutes + 1} should be enough for all that the verdict needs.\n",
            highlight=False,
        )
    is_tight = is_too_long or now + to_curve > started + _FIRST_CURVE
    return in_order(planned, plan, model.trained_length, is_tight=is_tight)


def _describe(model: Model, plan: DemoPlan, spec_list: Sequence[str], console: Console) -> None:
    trained = format_length(model.trained_length)
    model.rope = "auto"
    beyond = str(model.rope_at(plan.longest))
    plays = "a play" if plan.samples == 1 else f"{plan.samples} plays"
    console.print(
        f"{model.name}, {weight_count(model.hf) / 1e6:.0f}M parameters, trained on {trained} tokens, in "
        f"{model.precision}. Loss on the same last {TARGET} tokens of {plays}, "
        f"reading {', '.join(map(format_length, plan.contexts))} tokens up to the end, under {', '.join(spec_list)}. "
        f"auto is the untouched model up to {trained} and {beyond} beyond.\n",
        highlight=False,
    )


class _Watcher:
    """Looks at every measured cell: keeps the best one with its cache, and prints the first curve. Says which cells
    are wanted."""

    def __init__(
        self, run: Run, planned: list[PerplexityCell], plan: DemoPlan, trained_length: int, console: Console
    ) -> None:
        self._run, self._planned, self._plan, self._console = run, planned, plan, console
        self._trained_length = trained_length
        self._has_curve = False
        self.best = _best_so_far(run, planned, plan.longest)

    def is_untouched_auto(self, cell: PerplexityCell) -> bool:
        """True for `auto` within the trained length, which is the untouched model bit for bit."""
        return cell.recipe.get("chosen") == "none"

    def is_wanted(self, cell: Cell) -> bool:
        """False for a shorter context of a scaler whose longest was left out: its line in the plot would end early."""
        longest = (c for c in self._planned if c.scaler == cell.scaler and c.context == self._plan.longest)
        return not cell.scaler.parts or cell.context == self._plan.longest or all(c.is_done(self._run) for c in longest)

    def see(self, cell: PerplexityCell, rows: list[Row], measured: MeasuredModel) -> None:
        """After a cell was measured."""
        if cell.context == self._plan.longest and (self.best is None or _loss(rows[0]) < self.best.loss):
            self.best = Winner(cell, _loss(rows[0]), measured.cache)
        if not cell.scaler.parts:
            self._print_curve()

    def copy_untouched(self) -> None:
        """Give `auto` the rows of the untouched model where it is that model."""
        rows = {cell.context: self._run.find(cell.row_recipes()[0]) for cell in self._planned if not cell.scaler.parts}
        for cell in filter(self.is_untouched_auto, self._planned):
            row = rows[cell.context]
            if row is not None and not cell.is_done(self._run) and self.is_wanted(cell):
                fields = {name: value for name, value in row.items() if name in MEASURED and name != "key"}
                self._run.add(cell.row_recipes()[0], fields, self._run.losses(row))

    def _print_curve(self) -> None:
        """The losses of the untouched model as bars, once there are some on both sides of its trained length."""
        rows = [
            row
            for cell in sorted(self._planned, key=lambda cell: cell.context)
            if not cell.scaler.parts and (row := self._run.find(cell.row_recipes()[0])) and row["loss"] is not None
        ]
        if self._has_curve or len(rows) < 2 or rows[-1]["context"] < self._plan.longest:
            return
        self._has_curve = True
        most = max(row["loss"] for row in rows)
        self._console.print("\n  The untouched model, nats per token:")
        for row in rows:
            beyond = "  beyond its trained length" if row["context"] > self._trained_length else ""
            bar = "█" * round(_BAR * row["loss"] / most)
            self._console.print(
                f"  {format_length(row['context']):>6} {bar} {row['loss']:.3f}{beyond}", highlight=False
            )
        self._console.print()


_BAR = 36  # letters of the longest bar


def _best_so_far(run: Run, planned: list[PerplexityCell], longest: int) -> Winner | None:
    """The best of the cells that an earlier, interrupted run measured at the longest context."""
    pairs = [(cell, run.find(cell.row_recipes()[0])) for cell in planned if cell.context == longest]
    measured = [Winner(cell, _loss(row), None) for cell, row in pairs if row is not None]
    return min(measured, key=lambda winner: winner.loss, default=None)


def _loss(row: Row) -> float:
    """Of a row; one that is not finite, which is stored as null, is the worst."""
    return math.inf if row["loss"] is None else float(row["loss"])


def _passage(model: Model, best: Winner, run: Run, limit: float | None, rate: float | None) -> Passage | None:
    """What the winner writes in place of the play's last tokens, after reading the longest context
    up to there; None if there is no time to read it.

    Goes on from the cache of the measurement. Kept in the run's folder, so that it is written once.
    """
    rope = str(best.cell.scaler)
    ids = best.cell.windows[-1].ids[: -TARGET // 2]
    prompt = f"[… {len(ids)} tokens of the play, the last of them:]\n{model.tokenizer.decode(ids[-150:])}"
    file = run.folder / "passage.json"
    if file.exists():
        stored = json.loads(file.read_text(encoding="utf-8"))
        if (stored["prompt"], stored["rope"]) == (prompt, rope):
            return Passage(**stored)
    seconds: dict[str, Any] = {}
    if limit is not None:
        reading = 0.0
        if best.cache is None:
            reading = ForwardCost.of(model).passes([len(ids)]) / rate if rate else math.inf
        left = (limit - time.monotonic() - reading) / 2  # the other half is for the report
        if left < 1:
            return None
        seconds = {"max_time": left + reading}
    if best.cache is not None:
        best.cache.crop(len(ids) - 1 - best.cache.get_seq_length())
    model.rope = best.cell.scaler
    text = model.generate_ids(ids, replace(PASSAGE, **seconds), best.cache).text
    if not text:  # reading took longer than expected
        return None
    write_atomic(file, json.dumps({"prompt": prompt, "text": text, "rope": rope}).encode())
    return Passage(prompt=prompt, text=text, rope=rope)
