"""The command `ropewalk fetch`: the built-in models and texts."""

from __future__ import annotations

import click

from .options import EXAMPLES


@click.command(epilog=EXAMPLES + "  ropewalk fetch\n  ropewalk fetch smollm2-135m shakespeare")
@click.argument("names", nargs=-1)
def fetch(names: tuple[str, ...]) -> None:
    """Download built-in models and texts into the cache: NAMES, or all. Nothing is fetched twice."""
    from ..checkpoints import assets

    for name in names:
        assets.check_name(name)
    for name in names or assets.ASSETS:
        click.echo(f"{name:<14} {assets.fetch(name)}")
