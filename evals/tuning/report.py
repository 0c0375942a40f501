"""The output of `tune`: sentences, a table, a plot, a report, and files for other programs."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from ...engine.storage import write_atomic
from ...scaling import hf_write
from ...scaling.lengths import format_length
from ..protocols.effective_length import TOLERANCE
from ..protocols.longppl import GAIN, MOST_LOSS
from ..reports.grid import NOTHING, Grid, Section, Shown, interval, signed
from ..reports.report import write_page
from ..reports.style import GRID, INK, WIDTH, categories, figure, footnote, save, style_axes
from ..runs.result import Run, environment_of
from .candidates import Candidate, Tuned, difference

_DRAWN = 24  # candidates in the plot


def publish_tuned(tuned: Tuned, run: Run, *, model: str, text: str) -> list[Path]:
    """Write all files into the run's folder. Returns them, the report first.

    `tuned.json` has the ranking and the named specs. `config.json` has the fields that the model's
    config needs to serve the best scaler that a config can hold.
    """
    grid = ranking_grid(tuned)
    plots = _plot(tuned, run.folder / "ranking", f"{model} on {text}")
    title = f"{model} at {format_length(tuned.target)}"
    report = write_page(
        run.folder / "report.html",
        title=title,
        subtitle=f"Which scaler is best there? Measured on {text}",
        verdict=sentences(tuned)[:1],
        details=sentences(tuned)[1:],
        plots=plots,
        sections=[Section(caption=f"{len(tuned.ranking)} candidates", grids=[grid], method=_method(tuned, text))],
        environment=environment_of(run),
    )
    table = run.folder / "table.md"
    write_atomic(table, grid.to_markdown().encode())
    file = run.folder / "tuned.json"
    write_atomic(file, (json.dumps(summary(tuned, model=model, text=text), indent=2) + "\n").encode())
    files = [report, table, file, *plots]
    config = run.folder / "config.json"
    if tuned.servable is None:
        config.unlink(missing_ok=True)  # of a search for another target
    else:
        write_atomic(config, (json.dumps(config_fragment(tuned), indent=2) + "\n").encode())
        files.append(config)
    return files


def replaced(tuned: Tuned, run: Run, *, model: str, text: str) -> str | None:
    """The search whose result is in the run's folder, as arguments of the command; None if it is this one, or none."""
    try:
        before = json.loads((run.folder / "tuned.json").read_text(encoding="utf-8"))
        old_model, old_text, target, objective = (before[name] for name in ("model", "text", "target", "objective"))
        if (old_model, old_text, target, objective) == (model, text, tuned.target, tuned.objective):
            return None
        options = ["--text", old_text, "--target", format_length(target), "--objective", objective]
        return shlex.join([old_model, *options])
    except (OSError, ValueError, KeyError, TypeError):  # there is none, or it is not of tune
        return None


def sentences(tuned: Tuned) -> list[str]:
    """The result in plain sentences."""
    winner, simplest, servable = tuned.winner, tuned.simplest, tuned.servable
    lines = [f"Winner at {format_length(tuned.target)}: {winner.label}{_loss_words(winner, _counted(tuned))}."]
    if len(tuned.ties) > 1:
        others = ", ".join(c.label for c in tuned.ties if c is not winner)
        lines.append(f"Not distinguishable from it on the same tokens: {others}.")
    if simplest is winner:
        lines.append("No simpler scaler is as good within the measured uncertainty.")
    else:
        lines.append(f"The simplest of these is {simplest.label}.")
    if servable is None:
        lines.append("No scaler that a config can hold was measured as well as the winner.")
    elif servable is not winner:
        change = difference(servable, winner)
        cost = f": {change} against the winner" if change is not None else ""
        lines.append(f"The best that a config can hold, for other engines, is {servable.label}{cost}.")
    plain = next((c for c in tuned.ranking if not c.scaler.parts), None)
    if plain is not None and plain is not winner and (change := difference(winner, plain)) is not None:
        skimmed = "" if winner.read.keys() & plain.read.keys() else ", skimmed"
        lines.append(f"Against the untouched model the winner changes the loss by {change}{skimmed}.")
    if named := [c.label for c in (winner, servable) if c is not None and c.name]:
        lines.append(f"tuned.json has the spec of {named[0]}.")
    if not winner.read:
        lines.append("The budget allowed no full reading: all losses are skimmed, which ranks well but is inexact.")
    if not tuned.complete:
        lines.append("The budget ended the search; the same command continues from here.")
    return lines


def ranking_grid(tuned: Tuned) -> Grid:
    """A table of every candidate, best first."""
    winner = tuned.winner
    note = (
        "Best first. Differences to the winner are paired, token by token, with 95% intervals; green ones are not "
        "distinguishable from it. Skimmed losses are of the end of one place after a sample of the rest; compare them "
        "only with each other. Harm is the loss difference to the untouched model on short texts, red if it may exceed "
        f"{TOLERANCE:g}."
    )
    columns = ("loss", "to the winner", "places", "skimmed", "harm", "passkeys", "in a config")
    rows = [(c.label, _cells(tuned, c, winner)) for c in tuned.ranking]
    title = f"Loss at {format_length(tuned.target)}, nats per {_counted(tuned)}"
    return Grid(title=title, note=note, columns=columns, rows=rows)


def _cells(tuned: Tuned, c: Candidate, winner: Candidate) -> list[Shown]:
    change = None if c is winner else difference(c, winner)
    against = NOTHING
    if c is winner:
        against = Shown(main="0", small=("winner",), css="good")
    elif change is not None and c.read:
        around = interval(change.low, change.high) if change.has_interval else "no interval"
        against = Shown(main=signed(change.mean), small=(around,), css="" if tuned.is_worse(c, winner) else "good")
    harm = NOTHING
    if c.harm is not None:
        around = interval(c.harm.low, c.harm.high) if c.harm.has_interval else "no interval"
        harm = Shown(main=signed(c.harm.mean), small=(around,), css="" if c.is_harmless else "bad")
    return [
        Shown(main=f"{c.loss:.3f}", css="best" if c is winner else "") if c.loss is not None else NOTHING,
        against,
        Shown(main=str(c.places)) if c.places else NOTHING,
        Shown(main=f"{c.skimmed_loss:.3f}") if c.skimmed_loss is not None else NOTHING,
        harm,
        Shown(main=f"{fmean(c.passkeys.values()):.0%}", small=(f"n={len(c.passkeys)}",)) if c.passkeys else NOTHING,
        Shown(main="yes") if tuned.fits_config(c) else NOTHING,
    ]


def summary(tuned: Tuned, *, model: str, text: str) -> dict[str, Any]:
    """The content of `tuned.json`."""
    return {"model": model, "text": text, **as_json(tuned)}


def as_json(tuned: Tuned) -> dict[str, Any]:
    """The result as JSON values."""

    def number(value: float | None) -> float | None:
        return value if value is not None and math.isfinite(value) else None

    def fields(c: Candidate) -> dict[str, Any]:
        change = difference(c, tuned.winner)
        return {
            "rope": str(c.scaler),
            "label": c.label,
            "loss": number(c.loss),
            "places": c.places,
            "difference": None if change is None else [number(v) for v in (change.mean, change.low, change.high)],
            "skimmed_loss": number(c.skimmed_loss),
            "harm": None if c.harm is None else [number(v) for v in (c.harm.mean, c.harm.low, c.harm.high)],
            "passkeys": c.passkeys or None,
        }

    return {
        "target": tuned.target,
        "objective": tuned.objective,
        "trained_length": tuned.rope.trained_length,
        "winner": str(tuned.winner.scaler),
        "simplest": str(tuned.simplest.scaler),
        "servable": None if tuned.servable is None else str(tuned.servable.scaler),
        "complete": tuned.complete,
        "ranking": [fields(c) for c in tuned.ranking],
    }


def config_fragment(tuned: Tuned) -> dict[str, Any]:
    """The fields to merge into the model's config.json, to serve the best scaler that a config can
    express."""
    assert tuned.servable is not None
    return {
        "max_position_embeddings": tuned.target,
        "rope_parameters": hf_write.write(tuned.rope, tuned.servable.scaler),
    }


def _counted(tuned: Tuned) -> str:
    """What the losses of readings are the mean of."""
    return "token" if tuned.objective == "loss" else "key token"


def _loss_words(c: Candidate, counted: str) -> str:
    if c.loss is None:
        return ""
    places = f"{c.places} place{'s' if c.places > 1 else ''}"
    return f", {c.loss:.3f} nats per {counted} over {places}"


def _method(tuned: Tuned, text: str) -> dict[str, str]:
    method = {
        "Search": "Successive halving: every starting point is skimmed, then the neighbours of the best; the best "
        "third at more places; the best few are read whole, at one, three and nine places.",
        "Places": f"Ends of windows of {tuned.target:,} tokens in {text}. Skimming and reading begin at opposite ends.",
        "Winner": "Among the candidates that are not distinguishable from the lowest loss, the one that finds most "
        "passkeys, then the one with the lowest loss. The best of many is partly luck: measure it on another text.",
        "Intervals": "95%, percentile bootstrap over blocks of 32 consecutive tokens, widened by Student's t.",
    }
    if tuned.objective == "key-tokens":
        method["Key tokens"] = (
            f"Tokens whose loss under the untouched model falls by more than {GAIN:g} nats, to less than "
            f"{MOST_LOSS:g}, from an eighth of the trained length to all of it. Only they count in readings; skims "
            "count all tokens."
        )
    if any(c.name for c in tuned.ranking):
        method["Factors"] = (
            "Searched by CMA-ES from the best closed form that a config can hold, skimmed at other "
            "places: no token that decided the search is scored again when the text is read whole."
        )
    return method


def _plot(tuned: Tuned, out: Path, measured_on: str) -> list[Path]:
    """The losses of the best, hollow where they were only skimmed. What is far worse is named at the edge, so that
    the others have room."""
    drawn: Sequence[Candidate] = tuned.ranking[:_DRAWN]
    names = [c.label for c in drawn]
    with figure(WIDTH, 1.6 + 0.3 * len(drawn), f"Loss at {format_length(tuned.target)}, {measured_on}") as fig:
        axes = fig.subplots()
        style_axes(axes, x=f"nats per {_counted(tuned)}", y="")
        limit = _limit([loss for c in drawn for loss in (c.loss, c.skimmed_loss) if loss is not None])
        for row, c in enumerate(drawn):
            color = _WINNER if c is tuned.winner else INK
            for loss, fill in ((c.skimmed_loss, "none"), (c.loss, "full")):
                if loss is None:
                    continue
                if loss <= limit:
                    axes.plot(loss, row, "o", color=color, fillstyle=fill, markersize=6)
                else:
                    axes.plot(limit, row, ">", color=color, fillstyle=fill, markersize=6)
                    axes.annotate(
                        f"{loss:.2f}", (limit, row), xytext=(-7, 0), textcoords="offset points", ha="right", va="center"
                    )
        axes.set_yticks(range(len(drawn)), names, fontsize=8.5)
        axes.invert_yaxis()
        axes.grid(axis="x", color=GRID, linewidth=0.8)
        footnote(fig, "Filled: read whole. Hollow: skimmed. Blue: the winner. Arrow: further to the right.")
        return list(save(fig, out))


_WINNER = categories(2)[1]


def _limit(losses: Sequence[float]) -> float:
    """The right end of the axis: the worst loss, or three times the spread of the better half above the best."""
    ordered = sorted(losses)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    return min(ordered[-1], best + 3 * max(middle - best, 0.02))
