"""`python -m ropewalk.evals.ask TASK MODEL`: any retrieval task by its name, those of other packages among them."""

from __future__ import annotations

from typing import Any

import click

from .retrieval_cli import _DEPTHS, _TEXT, EXAMPLES, _asks, _run


@click.command(epilog=EXAMPLES + "  python -m ropewalk.evals.ask niah_single_2 smollm2-135m --lengths 2k --trials 5")
@click.argument("task")
@_asks(_DEPTHS, _TEXT)
def ask(task: str, text: str, **options: Any) -> None:
    """Measure TASK on MODEL, as `ropewalk passkey` does its own.

    TASK is one of the tasks of `ropewalk passkey`, `niah`, `kv` and `ruler`, or of another package.
    """
    from ..errors import ConfigError, RopewalkError, did_you_mean
    from .tasks import TASKS

    try:
        if task not in TASKS:
            raise ConfigError(f"unknown task {task!r}.{did_you_mean(task, TASKS.names)}")
        _run(task, text=text if TASKS[task].needs_text else None, **options)
    except RopewalkError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    ask(prog_name="ask")
