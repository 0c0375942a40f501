"""`ropewalk facts`: scaling, pooling or cutting short, on the same questions."""

from __future__ import annotations

from typing import Any

import click

from ...engine.commands.options import EXAMPLES, loads_a_model
from ..runs.measurement import Measurement, deadline_in, measures


@click.command(
    epilog=EXAMPLES + '  ropewalk facts smollm2-135m --rope yarn:2 --rope "rerope:0.25x|logn"\n'
    "  ropewalk facts ./my-model --lengths 2x,4x --parts 4,16 --documents 10"
)
@measures(
    click.option("--parts", default="2,4,8,16", show_default=True, help="Into how many parts, separated by commas."),
    click.option("--documents", default=4, show_default=True, type=click.IntRange(min=1), help="Of each length."),
    click.option("--questions", default=8, show_default=True, type=click.IntRange(min=1), help="To each document."),
    click.option("--text", default="kjv", show_default=True, help="The hay: a built-in text, or a file or folder."),
    loads_a_model,
    lengths=("1.25x", "Tokens of a document with a question and its answer, separated by commas."),
    ropes=("none", "yarn:2", "rerope:0.25x|logn"),
    out="runs/MODEL-facts",
)
def facts(
    asked: Measurement,
    lengths: str,
    parts: str,
    documents: int,
    questions: int,
    text: str,
    loading: dict[str, Any],
) -> None:
    """Scaling or pooling? Facts all over a document longer than MODEL was trained for, asked for one by one.

    The document is read whole under every --rope; only its end, as much as MODEL was trained for; and in --parts, each
    read by itself, whose answers are pooled (NBCE, as in `ropewalk generate --contexts`). A run resumes.
    """
    deadline = deadline_in(asked.max_minutes)
    from ...engine.load import load
    from ...errors import ConfigError
    from ...scaling import parse_length
    from ..data import load_text
    from ..models.local import Local
    from .facts import cells
    from .facts_table import facts_rows, plot_facts, to_markdown
    from .publish import publisher

    try:
        counts = [int(count) for count in parts.split(",")]
    except ValueError:
        raise ConfigError(f"--parts {parts!r} must be whole numbers, such as 2,4,8") from None
    if min(counts) < 1:
        raise ConfigError(f"--parts {parts!r} must be 1 or more each")
    scalers, hay = asked.scalers(), load_text(text)
    subject = Local(load(asked.model, **loading, max_length=2**31))
    planned = cells(
        subject,
        hay,
        scalers,
        contexts=[parse_length(length, subject.trained_length) for length in lengths.split(",")],
        parts=counts,
        documents=documents,
        questions=questions,
    )

    finish = publisher("facts", facts_rows, to_markdown, plot_facts)
    asked.measure(subject, planned, finish, name="facts", deadline=deadline)
