"""`ropewalk scalers`, `show` and `base`: every method, what one does, and which rotary base a context needs."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .help_page import EXAMPLES, command
from .messages import print_json
from .options import json_option, picture_option
from .waiting import waiting

if TYPE_CHECKING:
    from ..scaling.base import BaseRule
    from ..scaling.base_bound import BaseAnswer
    from ..scaling.hf import ConfiguredRope


@command(epilog=EXAMPLES + "  ropewalk scalers")
@json_option("a list of methods with name, fields, facet, summary, source")
def scalers(as_json: bool) -> None:
    """List every method: its spec, its fields with their defaults, what it does, and its source."""
    from ..scaling.spec import scalers as summaries

    if as_json:
        print_json([asdict(method) for method in summaries()])
        return
    for method in summaries():
        fields = f":{','.join(method.fields)}" if method.fields else ""
        click.echo(click.style(method.name, bold=True) + fields)
        click.echo(f"    {method.summary}\n    [{method.facet or 'no facet'}; {method.source}]")


@command(
    epilog=EXAMPLES
    + '  ropewalk show yarn:4\n  ropewalk show "rerope:2k|logn" --length 64k --out rerope.png\n'
    + '  ropewalk show "ntk:8|resonance" --dim 128 --base 5e5 --trained 8k --length 64k\n'
    + '  ropewalk show "yarn:2@0-9|yarn:4@10-"'
)
@click.argument("spec")
@click.option("--dim", default=64, show_default=True, help="Rotary dimension.")
@click.option("--base", default=1e5, show_default=True, help="Rotary base.")
@click.option("--trained", default="8k", show_default=True, help="Trained length.")
@click.option("--length", default="4x", show_default=True, help="Length to draw, also for dynamic methods.")
@picture_option("the scaler")
@json_option("what is printed, by the same names")
def show(spec: str, dim: int, base: float, trained: str, length: str, out: Path | None, as_json: bool) -> None:
    """Print what SPEC does in short, and draw it with --out.

    Frequency methods: wavelengths, stretch, and long-range decay of attention. Position maps: the distance seen at
    every true distance, and between every query and key. Temperatures: the factor at every position. A scaler that
    differs by layer is printed for every group of layers, and each has a picture of its own.
    """
    from ..evals.reports.scaler_plot import in_short, plot_scaler
    from ..scaling import RopeSpec, parse, parse_length
    from ..scaling.by_layer import format_layers, layer_groups

    rope = RopeSpec(dim=dim, base=base, trained_length=parse_length(trained))
    scaler = parse(spec, rope.trained_length)
    tokens = parse_length(length, rope.trained_length)
    groups = {}
    for each, layers in layer_groups(scaler).items():
        name = format_layers(layers)
        numbers: dict[str, Any] = in_short(each, rope, tokens)
        stem = None if out is None else out.with_suffix("")
        if stem is not None and scaler.differs_by_layer:
            stem = stem.with_name(f"{stem.name}-layers-{name.replace('/', '_')}")
        groups[name] = {**numbers, "drawn": () if stem is None else plot_scaler(each, rope, tokens, stem)}
    if as_json:
        print_json({"scaler": str(scaler), "layers": groups} if scaler.differs_by_layer else groups[name])
        return
    for name, numbers in groups.items():
        if scaler.differs_by_layer:
            click.echo(click.style(f"layers {name}", bold=True))
        drawn = [("drawn", path) for path in numbers.pop("drawn")]
        for label, value in [*numbers.items(), *drawn]:
            click.echo(f"{label:<20} {value}")
    if out is None:
        click.echo("To draw it: --out scaler.png")


_DIM = 128


@command(
    epilog=EXAMPLES + "  ropewalk base 128k --dim 128\n  ropewalk base 32k --dim 128 --base 5e5\n"
    "  ropewalk base 128k --dim 128 --base 1e4 --trained 4k\n"
    "  ropewalk base 4x --model smollm2-135m --out base.png"
)
@click.argument("length")
@click.option("--model", help="Take dimension, base and trained length from the config of this model.")
@click.option("--dim", type=int, help=f"Rotary dimension.  [default: {_DIM}]")
@click.option("--base", type=float, help="Also print how many tokens this base carries.")
@click.option("--trained", help="Trained length; with --base, all rules for a larger base side by side.")
@picture_option("the bases")
@json_option("bound, and rules with the base and scaler of each")
def base(
    length: str,
    model: str | None,
    dim: int | None,
    base: float | None,
    trained: str | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """What rotary base does a context of LENGTH tokens need? (arXiv 2405.14591)

    A base carries N tokens if f(m) = sum_i cos(m base^(-2i/d)) is not negative at any distance m below N: a similar
    token then never scores below a random one.

    Where the model's base and trained length are known, by --model or by --base and --trained, LENGTH may be a
    multiple such as 4x, and every rule is listed: the base it gives, whether that carries LENGTH by the bound, and the
    scaler that uses it.
    """
    from ..scaling.base import base_rules
    from ..scaling.base_bound import base_report
    from ..scaling.lengths import format_length, parse_length

    known = _known(model, dim, base, trained)
    if out is not None and known is None:
        raise click.UsageError("--out draws the rules' bases; give --model, or --base and --trained")
    tokens = parse_length(length, known.max_length if known else None)
    with waiting(f"searching bases for {format_length(tokens)} tokens"):
        rules = base_rules(known.rope, tokens) if known else ()
        answer = (
            base_report(tokens, known.rope.dim, base=known.rope.base)
            if known
            else base_report(tokens, _DIM if dim is None else dim, base=base)
        )
    paths: tuple[Path, ...] = ()
    if known is not None and out is not None:
        from ..evals.reports.rope_plots import plot_bases

        paths = plot_bases(rules, known.rope, tokens, out.with_suffix(""))
    if as_json:
        print_json({"bound": asdict(answer), "rules": [asdict(rule) for rule in rules], "drawn": paths})
        return
    _print_bound(answer)
    if known is None:
        return
    click.echo(f"From base {known.rope.base:g}, trained on {format_length(known.rope.trained_length)} tokens (L):")
    _print_rules(rules, format_length(tokens))
    if known.scaler.parts:
        own, carried = known.scaler.name, format_length(known.max_length)
        click.echo(f"  The model's own {own} scaling, to {carried}, is not in these numbers; each scaler replaces it.")
    for path in paths:
        click.echo(f"drawn  {path}")


def _known(model: str | None, dim: int | None, base: float | None, trained: str | None) -> ConfiguredRope | None:
    """The model that the rules start from, if it is known."""
    given = {"--dim": dim, "--base": base, "--trained": trained}
    if model is not None:
        if option := next((name for name, value in given.items() if value is not None), None):
            raise click.UsageError(f"--model {model} has its own {option[2:]}; leave out {option}, or --model")
        from ..engine.checkpoints.config import find_config, primary_rope

        return primary_rope(find_config(model)[1])
    if trained is None:
        return None
    if base is None:
        raise click.UsageError(f"--trained {trained} needs --base too: the rules start from the model's own base")
    from ..scaling import RopeSpec, Scaler, parse_length
    from ..scaling.hf import ConfiguredRope

    rope = RopeSpec(dim=_DIM if dim is None else dim, base=base, trained_length=parse_length(trained))
    return ConfiguredRope(rope=rope, scaler=Scaler(), max_length=rope.trained_length)


def _print_bound(answer: BaseAnswer) -> None:
    from ..scaling.base import round_up
    from ..scaling.lengths import format_length

    shown, highest = format_length(answer.length), answer.largest_infeasible
    lines = {
        "smallest base that carries it": f"{round_up(answer.smallest_feasible):f}  (larger ones can fail again)",
        "carried by every base above": "any base" if highest is None else f"{round_up(highest):f}",
        "limit for large dimensions": f"{answer.asymptotic:.6g}  (N / 0.6165)",
    }
    if answer.base is not None:
        verdict = f"carries all {shown}" if answer.fails_at is None else f"fails first at distance {answer.fails_at}"
        lines[f"your base {answer.base:g}"] = verdict
    click.echo(f"{shown} tokens, rotary dimension {answer.dim}")
    for label, value in lines.items():
        click.echo(f"  {label:<32}{value}")
    click.echo(
        f"  Searched up to {answer.ceiling:.3g}, above which every base carries {shown}; an island of bases narrower "
        f"than {answer.resolution:g} of its base can be missed."
    )


def _print_rules(rules: tuple[BaseRule, ...], shown: str) -> None:
    from ..scaling.base import round_up

    rows = [("rule", "base", "by the bound", "scaler", "assumes")]
    for rule in rules:
        verdict = f"carries {shown}" if rule.fails_at is None else f"fails at {rule.fails_at}"
        rows.append((rule.name, f"{round_up(rule.base):f}", verdict, rule.spec, rule.assumes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        click.echo("  " + "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip())
