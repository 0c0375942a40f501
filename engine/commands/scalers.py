"""The commands `ropewalk scalers` and `ropewalk show`: every method, and what one does."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path

import click

from .options import EXAMPLES


@click.command(epilog=EXAMPLES + "  ropewalk scalers")
def scalers() -> None:
    """List every method: its spec, its fields with their defaults, what it does, and its source."""
    from ...scaling import METHODS, format_length

    for name, method in METHODS.items():
        fields = []
        for f in dataclasses.fields(method):
            if f.default is dataclasses.MISSING:
                fields.append(f.name)
            else:
                shown = format_length(f.default) if f.metadata.get("length") and f.default is not None else f.default
                fields.append(f"{f.name}={str(shown).lower() if isinstance(shown, bool) else shown}")
        summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        if not method.facet:
            summary = "The untouched model."
        click.echo(click.style(name, bold=True) + (f":{','.join(fields)}" if fields else ""))
        click.echo(f"    {summary}\n    [{method.facet or 'no facet'}; {method.source}]")


@click.command(
    epilog=EXAMPLES
    + '  ropewalk show yarn:4\n  ropewalk show "rerope:2k|logn" --length 64k\n'
    + '  ropewalk show "ntk:8|resonance" --dim 128 --base 5e5 --trained 8k --length 64k'
)
@click.argument("spec")
@click.option("--dim", default=64, show_default=True, help="Rotary dimension.")
@click.option("--base", default=1e5, show_default=True, help="Rotary base.")
@click.option("--trained", default="8k", show_default=True, help="Trained length.")
@click.option("--length", default="4x", show_default=True, help="Length to draw to, and that dynamic methods see.")
@click.option(
    "--out",
    default="rope.png",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="A .png; an .svg is written beside it.",
)
def show(spec: str, dim: int, base: float, trained: str, length: str, out: str) -> None:
    """Draw what SPEC does, and print it in short.

    Frequency methods: wavelengths, stretch, and long-range decay of attention. Position maps: the distance seen at
    every true distance, and between every query and key. Temperatures: the factor at every position.
    """
    from ...evals.reports.scaler_plot import in_short, plot_scaler
    from ...scaling import RopeSpec, parse, parse_length

    rope = RopeSpec(dim=dim, base=base, trained_length=parse_length(trained))
    scaler = parse(spec, rope.trained_length)
    tokens = parse_length(length, rope.trained_length)
    paths = plot_scaler(scaler, rope, tokens, Path(out).with_suffix(""))
    for label, value in [*in_short(scaler, rope, tokens).items(), *(("drawn", path) for path in paths)]:
        click.echo(f"{label:<20} {value}")
