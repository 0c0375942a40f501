"""`ropewalk tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import click

from .options import EXAMPLES, folder_option, loads_a_model, ropes_option, text_option

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


@click.command(
    epilog=EXAMPLES + "  ropewalk tune smollm2-135m --target 2x --budget 20m\n"
    "  ropewalk tune ./my-model --target 32k --text book.txt --keep-short --out runs/tune\n"
    "  ropewalk tune ./my-model --target 4x --search factors"
)
@click.argument("model")
@click.option("--target", default="2x", show_default=True, help="Tokens that are to be carried.")
@text_option("shakespeare")
@click.option("--budget", type=_Duration(), help="Time for measuring, such as 10m; else as long as it takes.")
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
@ropes_option(note=" It is tried beside the others.")
@loads_a_model
@folder_option("runs/MODEL-tune")
def tune(
    model: str,
    target: str,
    text: str,
    budget: float | None,
    search: Literal["methods", "factors"],
    largest_factor: float | None,
    keep_short: bool,
    ropes: tuple[str, ...],
    loading: dict[str, Any],
    out: Path | None,
) -> None:
    """Which scaler carries MODEL to a length?

    Measures the closed forms and what lies near the best of them. Candidates are skimmed (the end of a long text
    after a sample of the rest), the best are read whole at more and more places, and asked for passkeys. Prints a
    ranked table, the winner, the simplest one that cannot be told from it, and the best that a config can hold.
    With --search factors, CMA-ES then looks for better factors of the rotary pairs from the best closed form that a
    config can hold. A search that was stopped goes on from its folder. The winner is kept in the cache folder,
    where --rope auto of other commands finds it.
    """
    from ..engine.load import load
    from ..evals.data import load_text
    from ..evals.reports.report import print_files
    from ..evals.runs.compare import short
    from ..evals.runs.measure import new_console
    from ..evals.runs.result import Run
    from ..evals.tuning.report import publish_tuned, ranking_grid, sentences
    from ..evals.tuning.tune import tune as find

    console = new_console()
    document = load_text(text)
    loaded = load(model, **loading, max_length=2**31)  # the harness measures beyond a scaler's reach too
    run = Run(out or Path("runs") / f"{Path(model).name}-tune")
    run.write_environment()
    found = find(
        loaded,
        target,
        text=document,
        budget=budget,
        search=search,
        largest_factor=largest_factor,
        keep_short=keep_short,
        ropes=ropes,
        out=run.folder,
        console=console,
    )
    files = publish_tuned(found, run, model=short(loaded.name), text=short(text))
    console.print(ranking_grid(found).to_table(("loss", "to the winner", "skimmed"), rows=_SHOWN))
    if len(found.ranking) > _SHOWN:
        console.print(f"  and {len(found.ranking) - _SHOWN} more in {files[1]}\n", highlight=False, soft_wrap=True)
    for sentence in sentences(found):
        console.print(f"• {sentence}", highlight=False, markup=False)
    print_files(files, console)
    kept = loaded.remember(found.as_stored(text=short(text)))
    console.print(f"\nKept for --rope auto: {kept}", highlight=False, soft_wrap=True, markup=False)
