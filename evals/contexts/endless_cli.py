"""`ropewalk endless`: a text without an end in the memory of a window."""

from __future__ import annotations

from typing import Any

import click

from ...engine.commands.options import EXAMPLES, loads_a_model
from ..runs.measurement import Measurement, deadline_in, measures


@click.command(
    epilog=EXAMPLES + "  ropewalk endless smollm2-135m --lengths 128k\n"
    '  ropewalk endless ./my-model --rope sink-window:2k --rope "sink-window:window=2k,sinks=1" --lengths 1M'
)
@measures(
    click.option("--text", default="kjv", show_default=True, help="A built-in text, or a file or folder."),
    click.option(
        "--places",
        default=32,
        show_default=True,
        type=click.IntRange(min=2),
        help="Tokens in each bucket of position that are also predicted from a window read afresh.",
    ),
    loads_a_model,
    lengths=("128k", "Tokens of the pass, separated by commas."),
    ropes=("sink-window:0.125x",),
    out="runs/MODEL-endless",
)
def endless(asked: Measurement, lengths: str, text: str, places: int, loading: dict[str, Any]) -> None:
    """Read a text of any length in constant memory under attention sinks, and see whether the loss stays.

    One pass; keys that no later token sees are dropped. In every bucket of position (powers of two) the loss is held
    against that of the untouched model with the same window read afresh for every token. A run resumes.
    """
    deadline = deadline_in(asked.max_minutes)
    from ...engine.load import load
    from ...scaling import parse_length
    from ..data import load_text
    from ..models.local import Local
    from .endless import cells
    from .endless_table import endless_rows, plot_endless, to_markdown
    from .publish import publisher

    scalers, document = asked.scalers(), load_text(text)
    subject = Local(load(asked.model, **loading, max_length=2**31))
    contexts = [parse_length(length, subject.trained_length) for length in lengths.split(",")]
    planned = cells(subject, document, scalers, contexts=contexts, places=places)

    finish = publisher("endless", endless_rows, to_markdown, plot_endless)
    asked.measure(subject, planned, finish, name="endless", deadline=deadline)
