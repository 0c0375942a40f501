"""`ropewalk demo`: the whole story on the embedded model."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from ..engine.api import Model
from ..engine.load import load
from ..engine.sampling import SamplingParams
from ..scaling.lengths import format_length
from ..scaling.spec import parse
from .data import Text, load_text, tokenize_documents
from .perplexity import Cell, Plan, cells
from .publish import print_results, publish
from .report import Passage
from .result import Run, write_atomic
from .runner import measure_all

MODEL, TEXT = "smollm2-135m", "shakespeare"
TARGET = 1024  # tokens scored: the last ones of a play
PASSAGE_TOKENS = 96
PASSAGE_SECONDS = 75  # kept free of the time limit for the passage and the report


def specs(ratio: int) -> list[str]:
    """The scalers compared at `ratio` times the trained length. NTK-aware needs a factor above the ratio of lengths,
    since its fast pairs are hardly slowed."""
    return ["none", f"linear:{ratio}", f"ntk:{2 * ratio}", f"ntk-mixed:{ratio}", f"yarn:{ratio}"]


def by_importance(planned: list[Cell], trained_length: int) -> list[Cell]:
    """Cells in the order in which they earn their time: everything short, the untouched model at the trained length
    (what all else is compared with), everything at the longest context, then what lies between."""
    shortest, longest = min(c.context for c in planned), max(c.context for c in planned)

    def rank(cell: Cell) -> tuple[int, int]:
        if cell.context == shortest:
            return 0, 0
        if cell.context == trained_length and not cell.scaler.parts:
            return 1, 0
        if cell.context == longest:
            return 2, 0
        return 3, -cell.context

    return sorted(planned, key=rank)


def run_demo(*, full: bool, max_minutes: float | None, out: Path) -> None:
    """Fetch, measure, write a passage, report."""
    started = time.monotonic()
    console = Console()
    run = Run(out)
    console.print(
        f"[bold]ropewalk[/bold]: how far does {MODEL} read, and which scaler carries it further?\n",
        highlight=False,
    )
    text = load_text(TEXT)
    model = load(MODEL, max_length=16 * 8192)  # the passage may be written by the untouched model, past its reach
    L = model.trained_length
    ratio = 4 if full else 2
    plan = Plan(contexts=tuple(L * n // 4 for n in (1, 2, 4, 8, *((16,) if full else ()))), target=TARGET)
    planned = by_importance(cells(model, text, [parse(s) for s in specs(ratio)], plan), L)
    console.print(
        f"{model.name}, {model.hf.num_parameters() / 1e6:.0f}M parameters, trained on {format_length(L)} tokens, in "
        f"{str(model.hf.dtype).removeprefix('torch.')}. Loss on the same last {TARGET} tokens of a play, "
        f"reading {', '.join(format_length(c) for c in plan.contexts)} tokens up to its end.\n",
        highlight=False,
    )
    run.write_environment()
    deadline = None if max_minutes is None else started + 60 * max_minutes - PASSAGE_SECONDS
    outcome = measure_all(model, planned, run, console, deadline=deadline)
    passage = _passage(model, text, run, console)
    files = publish(run, title=f"{MODEL} past its trained length", passages=[passage])
    print_results(run, files, outcome.left_out, console)
    console.print(f"\nDone in {(time.monotonic() - started) / 60:.1f} minutes. Open {files[0]}", highlight=False)


def winner(run: Run) -> str:
    """The scaler with the lowest loss at the longest context that has been measured."""
    rows = [row for row in run.rows if row["protocol"] == "fixed-target" and row["loss"] is not None]
    longest = max(row["context"] for row in rows)
    best = min((row for row in rows if row["context"] == longest), key=lambda row: row["loss"])
    return str(best["rope"])


def _passage(model: Model, text: Text, run: Run, console: Console) -> Passage:
    """What the winner writes after reading more than the trained length; kept in the run's folder, written once."""
    rope = winner(run)
    kept = run.folder / "passage.json"
    if kept.exists():
        stored = json.loads(kept.read_text(encoding="utf-8"))
        if stored["rope"] == rope:
            return Passage(**stored)
    length = model.trained_length + model.trained_length // 16
    play = replace(text, documents=text.documents[:1])
    tokens = tokenize_documents(play, model.tokenizer, limit_tokens=length)[0]
    prompt = model.tokenizer.decode(tokens)
    model.rope = parse(rope)
    with console.status(f"{rope} reads {format_length(length)} tokens and goes on writing"):
        params = SamplingParams(max_new_tokens=PASSAGE_TOKENS, temperature=0.7, top_p=0.9, seed=1)
        completion = model.generate(prompt, params)
    shown = f"[… {completion.usage.prompt_tokens} tokens of the play, the last of them:]\n" + prompt[-400:]
    passage = Passage(prompt=shown, text=completion.text, rope=rope)
    write_atomic(kept, json.dumps({"prompt": shown, "text": passage.text, "rope": rope}).encode())
    return passage
