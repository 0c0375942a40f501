"""`ropewalk tune` and `tuned`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from .help_page import EXAMPLES, command
from .messages import print_json
from .options import folder_option, json_option, loads_a_model, ropes_option, text_option
from .waiting import load_model

if TYPE_CHECKING:
    from rich.console import Console

    from ..engine.tuned_scalers import TunedModel
    from ..evals.tuning.candidates import Tuned

_SHOWN = 16  # candidates on the screen


class _Duration(click.ParamType[float]):
    """`90`, `90s`, `10m` or `2h`."""

    name = "duration"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        text, unit = str(value).strip(), 1
        if text and text[-1] in "smh":
            text, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}[text[-1]]
        try:
            seconds = float(text) * unit
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            self.fail(f"{value!r} is no duration; write 90s, 10m or 2h", param, ctx)
        return seconds


@command(
    epilog=EXAMPLES + "  ropewalk tune smollm2-135m --target 2x --budget 20m\n"
    "  ropewalk tune ./my-model --target 32k --text book.txt --keep-short --out runs/tune\n"
    "  ropewalk tune ./my-model --target 4x --search factors"
)
@click.argument("model")
@click.option("--target", default="2x", show_default=True, help="Tokens that the scaler is for.")
@text_option("shakespeare")
@click.option("--budget", type=_Duration(), help="Time for measuring, such as 10m; else as long as it takes.")
@click.option(
    "--objective",
    type=click.Choice(["loss", "key-tokens"]),
    default="loss",
    show_default=True,
    help="key-tokens: of a text that is read whole, only tokens that need far context count.",
)
@click.option(
    "--search",
    type=click.Choice(["methods", "factors"]),
    default="methods",
    show_default=True,
    help="factors: also search for a LongRoPE factor for every rotary pair.",
)
@click.option(
    "--largest-factor", type=float, help="Bound of searched factors  [default: target over trained length, or more]"
)
@click.option("--keep-short", is_flag=True, help="What may cost short texts more than 0.02 nats cannot win.")
@click.option("--keep", is_flag=True, help="Store the winner, so that --rope auto takes it for this model from now on.")
@ropes_option(note=" It is tried beside the others.")
@loads_a_model
@folder_option("runs/MODEL-tune")
@json_option("the content of tuned.json")
def tune(
    model: str,
    target: str,
    text: str,
    budget: float | None,
    objective: Literal["loss", "key-tokens"],
    search: Literal["methods", "factors"],
    largest_factor: float | None,
    keep_short: bool,
    keep: bool,
    ropes: tuple[str, ...],
    loading: dict[str, Any],
    out: Path | None,
    as_json: bool,
) -> None:
    """Which scaler carries MODEL to a length?

    Measures the closed forms and what lies near the best of them. Candidates are skimmed (the end of a long text
    after a sample of the rest), the best are read whole at more and more places, and tested with passkeys. Prints the
    winner, a ranked table, the simplest scaler that is as good, and the best that a config can hold.
    With --search factors, CMA-ES then looks for better factors of the rotary pairs from the best closed form that a
    config can hold. A search that was stopped goes on from its folder. With --keep the winner is stored in the cache
    folder, where --rope auto of every command and program finds it; `ropewalk tuned` lists and forgets.
    """
    from rich.console import Console

    from ..evals.data import load_text
    from ..evals.runs.compare import short
    from ..evals.runs.measure import new_console
    from ..evals.runs.result import Run
    from ..evals.tuning import report
    from ..evals.tuning.tune import tune as search_scalers

    console = Console(stderr=True) if as_json else new_console()
    document = load_text(text)
    loaded = load_model(model, **loading, max_length=2**31)  # candidates are measured beyond their reach too
    run = Run(out or Path("runs") / f"{Path(model).name}-tune")
    run.write_environment()
    outcome = search_scalers(
        loaded,
        target,
        text=document,
        budget=budget,
        objective=objective,
        search=search,
        largest_factor=largest_factor,
        keep_short=keep_short,
        ropes=ropes,
        out=run.folder,
        console=console,
    )
    measured = {"model": short(loaded.name), "text": short(text)}
    replaced = report.replaced(outcome, run, **measured)
    files = report.publish_tuned(outcome, run, **measured)
    stored = loaded.remember(outcome.as_stored(text=short(text))) if keep else None
    if replaced is not None:
        console.print(
            f"\nThe files of {replaced} in {run.folder} are replaced. Its measurements are kept: the same command with "
            "these options shows them again. With another --out both stay.",
            highlight=False,
            markup=False,
        )
    if as_json:
        print_json(report.summary(outcome, **measured))
        return
    _print_outcome(outcome, files, console)
    if stored is not None:
        console.print(f"\nStored for --rope auto: {stored}", highlight=False, soft_wrap=True, markup=False)
        return
    keeping = "stores the winner for it; nothing is measured again"
    if not outcome.complete:
        keeping = "goes on with the search, and then stores its winner for it"
    console.print(f"\n--rope auto is as before. The same command with --keep {keeping}.", highlight=False, markup=False)


def _print_outcome(outcome: Tuned, files: list[Path], console: Console) -> None:
    """The verdict, the table of the best, the details, and where the files are."""
    from ..evals.reports.report import print_files
    from ..evals.tuning.report import ranking_grid, sentences

    verdict, *details = sentences(outcome)
    console.print(f"\n{verdict}\n", style="bold", highlight=False, markup=False)
    console.print(ranking_grid(outcome).to_table(("loss", "to the winner", "skimmed"), rows=_SHOWN))
    if len(outcome.ranking) > _SHOWN:
        console.print(f"  and {len(outcome.ranking) - _SHOWN} more in {files[1]}\n", highlight=False, soft_wrap=True)
    for sentence in details:
        console.print(f"• {sentence}", highlight=False, markup=False)
    print_files(files, console)


@command(
    epilog=EXAMPLES + "  ropewalk tuned list\n  ropewalk tuned forget smollm2-135m\n"
    "  ropewalk tuned forget smollm2-135m --target 16k"
)
@click.argument("action", type=click.Choice(["list", "forget"]))
@click.argument("model", required=False)
@click.option("--target", help="With forget: only what was tuned for so many tokens.")
@json_option("models (model, fingerprint, tunings), or forgotten (model, target, winner)")
def tuned(action: str, model: str | None, target: str | None, as_json: bool) -> None:
    """What `ropewalk tune --keep` has stored for --rope auto.

    list shows every model, or MODEL, with its targets and winners; forget drops what is stored for MODEL, a name as
    list shows it or the beginning of its fingerprint.
    """
    from ..engine import tuned_scalers
    from ..errors import ConfigError, DataError
    from ..scaling.lengths import format_length, parse_length

    if action == "list" and target is not None:
        raise ConfigError("--target has no effect on list; leave it out")
    if action == "forget" and model is None:
        raise ConfigError("forget needs a MODEL; `ropewalk tuned list` shows those that are stored")
    stored = tuned_scalers.read_all()
    chosen = [entry for entry in stored if model is None or _is_named(entry, model)]
    if not chosen and model is not None:
        names = ", ".join(sorted({entry.model for entry in stored})) or "nothing"
        raise DataError(f"nothing is stored for {model}; stored is: {names}")
    if action == "list":
        _print_stored(chosen, as_json)
        return
    tokens = None if target is None else parse_length(target)
    dropped = [(entry, tuning) for entry in chosen for tuning in tuned_scalers.forget(entry, tokens)]
    if not dropped:
        targets = ", ".join(format_length(tuning.target) for entry in chosen for tuning in entry.tunings)
        raise DataError(f"nothing is stored for {model} at {target}; its targets are {targets}")
    if as_json:
        fields = [{"model": m.model, "target": tuning.target, "winner": str(tuning.winner)} for m, tuning in dropped]
        print_json({"forgotten": fields})
        return
    for entry, tuning in dropped:
        click.echo(f"Forgotten: {tuning.winner} for {entry.model} up to {format_length(tuning.target)}")


def _print_stored(models: list[TunedModel], as_json: bool) -> None:
    from ..scaling.lengths import format_length

    if as_json:
        fields = [
            {"model": m.model, "fingerprint": m.fingerprint, "tunings": [entry.as_json() for entry in m.tunings]}
            for m in models
        ]
        print_json({"models": fields})
        return
    for model in models:
        click.echo(f"{model.model}  ({model.fingerprint[:12]})")
        for entry in model.tunings:
            when = f"tuned on {entry.text}, {entry.date}"
            click.echo(f"  up to {format_length(entry.target)}: {entry.winner}  {when}")
    if not models:
        click.echo("Nothing is stored; `ropewalk tune MODEL --keep` stores its winner.")


def _is_named(entry: TunedModel, model: str) -> bool:
    return model in (entry.model, Path(entry.model).name) or entry.fingerprint.startswith(model)
