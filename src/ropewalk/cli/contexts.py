"""`ropewalk facts` and `endless`: documents longer than the trained length."""

from __future__ import annotations

from typing import Any

import click

from .help_page import EXAMPLES, command
from .measurement import Measurement, deadline_in, load_measured
from .options import loads_a_model, measures, text_option
from .waiting import waiting


@command(
    epilog=EXAMPLES + '  ropewalk facts smollm2-135m --rope yarn:2 --rope "rerope:0.25x|logn"\n'
    "  ropewalk facts ./my-model --lengths 2x,4x --parts 4,16 --documents 10"
)
@measures(
    click.option(
        "--parts", default="2,4,8,16", show_default=True, help="Numbers of parts of a document, separated by commas."
    ),
    click.option(
        "--documents", default=4, show_default=True, type=click.IntRange(min=1), help="Documents of each length."
    ),
    click.option(
        "--questions", default=8, show_default=True, type=click.IntRange(min=1), help="Questions to each document."
    ),
    text_option("kjv", note=" Facts are put into it."),
    loads_a_model,
    lengths=("1.25x", "of a document with a question and its answer"),
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
    """Does scaling or pooling answer more questions about a document longer than MODEL was trained for?

    The document is read whole under every --rope; only its end, as much as MODEL was trained for; and in --parts, each
    read by itself, whose answers are pooled (NBCE, as in `ropewalk generate --contexts`). A run resumes.
    """
    deadline = deadline_in(asked.max_minutes)
    from ..errors import ConfigError
    from ..evals.contexts.facts import cells
    from ..evals.contexts.report import facts_markdown, facts_rows, plot_facts, publisher
    from ..evals.data import load_text
    from ..scaling import parse_length

    try:
        counts = [int(count) for count in parts.split(",")]
    except ValueError:
        raise ConfigError(f"--parts {parts!r} must be whole numbers, such as 2,4,8") from None
    if min(counts) < 1:
        raise ConfigError(f"--parts {parts!r} must be 1 or more each")
    scalers, hay = asked.scalers(), load_text(text)
    model = load_measured(asked.model, **loading)
    with waiting("reading the text"):
        planned = cells(
            model,
            hay,
            scalers,
            contexts=[parse_length(length, model.trained_length) for length in lengths.split(",")],
            parts=counts,
            documents=documents,
            questions=questions,
        )

    finish = publisher("facts", facts_rows, facts_markdown, plot_facts)
    asked.measure(model, planned, finish, name="facts", deadline=deadline)


@command(
    epilog=EXAMPLES + "  ropewalk endless smollm2-135m --lengths 128k\n"
    '  ropewalk endless ./my-model --rope sink-window:2k --rope "sink-window:window=2k,sinks=1" --lengths 1M'
)
@measures(
    text_option("kjv"),
    click.option(
        "--places",
        default=32,
        show_default=True,
        type=click.IntRange(min=2),
        help="Tokens in each bucket of position that are also predicted from a window read again.",
    ),
    loads_a_model,
    lengths=("128k", "of the pass"),
    ropes=("sink-window:0.125x",),
    out="runs/MODEL-endless",
)
def endless(asked: Measurement, lengths: str, text: str, places: int, loading: dict[str, Any]) -> None:
    """Read a text of any length in constant memory under attention sinks, and see whether the loss stays.

    One pass; keys that no later token sees are dropped. In every bucket of position (powers of two) the loss is held
    against that of the untouched model with the same window read again for every token. A run resumes.
    """
    deadline = deadline_in(asked.max_minutes)
    from ..evals.contexts.endless import cells
    from ..evals.contexts.report import endless_markdown, endless_rows, plot_endless, publisher
    from ..evals.data import load_text
    from ..scaling import parse_length

    scalers, document = asked.scalers(), load_text(text)
    model = load_measured(asked.model, **loading)
    contexts = [parse_length(length, model.trained_length) for length in lengths.split(",")]
    with waiting("reading the text"):
        planned = cells(model, document, scalers, contexts=contexts, places=places)

    finish = publisher("endless", endless_rows, endless_markdown, plot_endless)
    asked.measure(model, planned, finish, name="endless", deadline=deadline)
