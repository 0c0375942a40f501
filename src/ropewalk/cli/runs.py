"""The commands about whole runs: `ropewalk all`, `report`, `compare` and `reconstruct`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from .help_page import EXAMPLES, command
from .measurement import Measurement, deadline_in, load_measured, print_run
from .messages import print_json
from .options import json_option, loads_a_model, measures, run_json_option, text_option
from .waiting import waiting

_FOLDER = click.Path(file_okay=False, exists=True, path_type=Path)
_NEW_FOLDER = click.Path(file_okay=False, path_type=Path)


@command(
    "all",
    epilog=EXAMPLES + "  ropewalk all smollm2-135m --preset smoke\n"
    '  ropewalk all ./my-model --rope none --rope yarn:4 --rope "rerope:2k|logn" --preset full --out runs/mine',
)
@measures(
    click.option(
        "--preset",
        type=click.Choice(["smoke", "quick", "full"]),
        default="quick",
        show_default=True,
        help="About 1 minute, 10 minutes, or without a limit, for a model of 135M on two cores.",
    ),
    text_option("shakespeare", note=" It is the haystack too."),
    loads_a_model,
    ropes=("none", "yarn:2"),
    out="runs/MODEL-PRESET",
    max_minutes="Leave out what would not finish in this time; it replaces the time of the preset.",
)
def all_(asked: Measurement, preset: str, text: str, loading: dict[str, Any]) -> None:
    """Everything at once: loss against context, harm within the trained length, passkeys, RULER-11.

    The model is loaded once for all scalers. A run resumes; what did not fit into the preset's minutes is named, and
    the same command again measures it.
    """
    from ..evals.data import load_text
    from ..evals.runs.compare import short
    from ..evals.runs.preset import PRESETS

    chosen, scalers, document = PRESETS[preset], asked.scalers(), load_text(text)
    loaded = load_measured(asked.model, **loading)
    with waiting(f"reading {short(text)}"):
        cells = chosen.cells(loaded, document, scalers)
    minutes = chosen.minutes if asked.max_minutes is None else asked.max_minutes
    title = f"{short(loaded.name)}: {', '.join(map(str, scalers))}"
    asked.carry_out(loaded, cells, name=preset, title=title, deadline=deadline_in(minutes))


@command(
    epilog=EXAMPLES + "  ropewalk report runs/smollm2-135m-quick\n"
    "  ropewalk report runs/monday runs/tuesday --out runs/both"
)
@click.argument("runs", nargs=-1, required=True, type=_FOLDER)
@click.option("--out", type=_NEW_FOLDER, help="Folder for the results of several runs together.")
@click.option("--title", help="The report's heading.")
@run_json_option()
def report(runs: tuple[Path, ...], out: Path | None, title: str | None, as_json: bool) -> None:
    """Make the tables, plots and report.html of RUNS again; several become one run in --out."""
    from ..errors import ConfigError
    from ..evals.reports.report import print_results, publish
    from ..evals.runs.measure import new_console
    from ..evals.runs.result import merge, open_run

    opened = [open_run(folder) for folder in runs]
    if len(opened) > 1 and out is None:
        raise ConfigError(f"{len(opened)} runs become one in a folder of its own; name it with --out")
    run = opened[0] if out is None else merge(opened, out)
    files = publish(run, title=title or ", ".join(folder.name for folder in runs))
    if as_json:
        print_run(run)
    else:
        print_results(run, files, [], new_console())


@command(epilog=EXAMPLES + "  ropewalk compare runs/float32 runs/int8")
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@json_option("pairs (of cells), only_a, only_b (numbers of rows without a partner)")
def compare(a: Path, b: Path, as_json: bool) -> None:
    """Run B against run A, cell by cell: the same text and scaler, another model, dtype or version.

    Losses are paired token by token and answers trial by trial. Where each run has one scaler, the scalers are
    compared.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from ..errors import DataError
    from ..evals.runs.compare_runs import compare_runs
    from ..evals.runs.result import open_run

    found = compare_runs(open_run(a), open_run(b))
    if not found.pairs:
        raise DataError(
            f"{a} and {b} have no cell in common: other texts, lengths, scalers or protocols, or other settings of a "
            "protocol, such as --samples"
        )
    if as_json:
        pairs = [{**asdict(pair), "verdict": pair.verdict} for pair in found.pairs]
        print_json({"pairs": pairs, "only_a": found.only_a, "only_b": found.only_b})
        return
    console = Console()
    console.print(Markdown(found.grid().to_markdown()))
    if found.only_a or found.only_b:
        console.print(f"Without a partner: {found.only_a} rows of A, {found.only_b} of B.")


@command(
    epilog=EXAMPLES + "  ropewalk reconstruct runs/smollm2-135m-passkey --row 3\n"
    "  ropewalk reconstruct runs/smollm2-135m-passkey --row 3 | tail -c 300"
)
@click.argument("run", type=_FOLDER)
@click.option("--row", required=True, type=click.IntRange(min=1), help="Line of results.jsonl, from 1.")
@json_option("row, passages (texts)")
def reconstruct(run: Path, row: int, as_json: bool) -> None:
    """The exact text that the model read for a row of RUN, rebuilt from its recipe and checked.

    A trial's prompt is checked by its sha256, windows of `ppl` by those of the text and of the scored tokens.
    """
    from ..engine.checkpoints.checkpoint import read_tokenizer
    from ..engine.checkpoints.source import resolve
    from ..errors import DataError
    from ..evals.reports.report import passages_of
    from ..evals.runs.result import open_run

    rows = open_run(run).rows
    if row > len(rows):
        raise DataError(f"{run} has {len(rows)} rows; there is no row {row}")
    found = rows[row - 1]
    tokenizer = read_tokenizer(resolve(found.get("tokenizer") or found["model"]))
    passages = passages_of(found, rows, tokenizer)
    if as_json:
        print_json({"row": found, "passages": passages})
        return
    for passage in passages:
        click.echo(passage)
