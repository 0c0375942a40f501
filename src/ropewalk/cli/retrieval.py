"""The commands that ask for things in long texts: `ropewalk passkey`, `niah`, `kv`, `ruler` and `ask`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from .help_page import EXAMPLES, command
from .measurement import Measurement, ModelTarget, deadline_in
from .options import is_given, measures, runs_anywhere, text_option
from .waiting import waiting

if TYPE_CHECKING:
    from ..evals.models.local import LocalModel
    from ..evals.models.measured import MeasuredModel
    from ..evals.retrieval.task import Task, Trial

_DEPTHS = click.option(
    "--depths",
    default="0,0.25,0.5,0.75,1",
    show_default=True,
    help="Positions of the needle, 0 (beginning) to 1 (end), separated by commas.",
)
_TEXT = text_option("kjv", note=" It is the haystack.")
_TRIALS = click.option(
    "--trials",
    default=20,
    show_default=True,
    type=click.IntRange(min=1),
    help="Prompts for each scaler, length and depth; below 20 intervals are wide.",
)
_FAKE = click.option(
    "--fake",
    type=click.Choice(["uniform", "oracle"]),
    help="Check the harness with a fake model that knows no answer, or every answer.",
)


def _asks(*own: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The options of a command: its `own` among those that all of them have."""
    lengths = ("0.5x,1x,2x", "of prompt and answer together")
    shared = measures(*own, _TRIALS, _FAKE, lengths=lengths, out="runs/MODEL-COMMAND")
    return lambda command: shared(runs_anywhere(command))


@command(
    epilog=EXAMPLES + "  ropewalk passkey smollm2-135m --lengths 2k --trials 5\n"
    "  ropewalk passkey smollm2-135m --rope none --rope yarn:2 --lengths 1x,2x --depths 0.1,0.5,0.9\n"
    "  ropewalk passkey ./exported --endpoint http://localhost:8000/v1 --lengths 4k,8k"
)
@_asks(_DEPTHS)
def passkey(**options: Any) -> None:
    """Does MODEL find a number of five digits in a long text without meaning? (arXiv 2305.16300)

    Every trial is scored twice from one reading of the prompt: the answer that the model writes, and the
    log-probability of the right one. A run resumes: trials that are in --out already are not asked again.
    """
    _run("passkey", **options)


@command(
    epilog=EXAMPLES + "  ropewalk niah smollm2-135m --lengths 4k,8k --text shakespeare\n"
    "  ropewalk niah ./my-model --rope yarn:4 --lengths 8k,32k --depths 0,0.5,1 --out runs/niah"
)
@_asks(_DEPTHS, _TEXT)
def niah(**options: Any) -> None:
    """Does MODEL find a sentence in a real text: a needle in a haystack?

    The needle and the question are those of RULER's niah_single_2, at depths that you choose. Keys and values occur
    nowhere in the text. Scored and resumed as `ropewalk passkey` does.
    """
    _run("niah", **options)


@command(
    epilog=EXAMPLES + "  ropewalk kv smollm2-135m --lengths 4k,8k\n"
    "  ropewalk kv ./my-model --rope none --rope ntk:8 --lengths 1x,4x --depths 0.5"
)
@_asks(_DEPTHS)
def kv(**options: Any) -> None:
    """Does MODEL look up one of many random pairs in a JSON object? (arXiv 2307.03172)

    Keys and values are UUIDs, which models cannot guess. Scored and resumed as `ropewalk passkey` does.
    """
    _run("kv", **options)


@command(
    epilog=EXAMPLES + "  ropewalk ruler smollm2-135m --lengths 4k,8k\n"
    "  ropewalk ruler smollm2-135m --tasks niah_single_2,vt --lengths 2k --trials 5"
)
@_asks(
    click.option("--tasks", default="all", show_default=True, help="Names of RULER's tasks, separated by commas."),
    _TEXT,
)
def ruler(tasks: str, **options: Any) -> None:
    """RULER-11, offline: eleven tasks of RULER that need no download. (arXiv 2404.06654)

    niah_single_1 to 3, niah_multikey_1 to 3, niah_multivalue, niah_multiquery, vt, cwe and fwe. The haystack is --text
    instead of essays, and the two question answering tasks are left out, so numbers are not RULER's. Scored and
    resumed as `ropewalk passkey` does.
    """
    from ..evals.retrieval.tasks import RULER

    _run(RULER, tasks=tasks, **options)


@command(
    epilog=EXAMPLES + "  ropewalk ask niah_single_2 smollm2-135m --lengths 2k --trials 5\n"
    "  ropewalk ask many-shot smollm2-135m --lengths 512,1k"
)
@click.argument("task")
@_asks(_DEPTHS, _TEXT)
def ask(task: str, **options: Any) -> None:
    """Measure TASK on MODEL, as `ropewalk passkey` does its own.

    TASK is one of the tasks of `ropewalk passkey`, `niah`, `kv` and `ruler`, of another package, or one of these:

    \b
    many-shot       the letter of a kind of things, after many examples (arXiv 2404.11018)
    ngram-copy      the rest of a passage of random words that begins again (arXiv 2209.11895)
    latent-list     a list after the operations of a long program (arXiv 2409.12640)
    facts-noise-1   a place that one of many facts in a real text tells; -2, -3: two or three facts (arXiv 2406.10149)
    needle-meaning  a person in a real text, asked for in other words (arXiv 2502.05167)
    """
    from ..errors import ConfigError, did_you_mean
    from ..evals.retrieval.tasks import TASKS

    if task not in TASKS:
        raise ConfigError(f"unknown task {task!r}.{did_you_mean(task, TASKS.names)}")
    _run(task, **options)


def _run(
    suite: str,
    *,
    asked: Measurement,
    lengths: str,
    trials: int,
    fake: str | None,
    where: ModelTarget,
    depths: str = "",
    text: str | None = None,
    tasks: str = "all",
) -> None:
    deadline = deadline_in(asked.max_minutes)
    from ..evals.data import load_text
    from ..evals.retrieval.cells import cells
    from ..evals.runs.compare import short
    from ..scaling import parse_length

    chosen = _chosen(tasks, suite)
    scalers = asked.scalers()
    shares = _numbers(depths)
    haystack = load_text(text) if text is not None and any(task.needs_text for task in chosen) else None
    model = where.open(asked.model)
    before = None
    if fake:
        model, before = _stand_in(model, fake)
    with waiting("writing the prompts"):
        planned = cells(
            model,
            chosen,
            scalers,
            contexts=[parse_length(length, model.trained_length) for length in lengths.split(",")],
            depths=shares,
            trials=trials,
            text=haystack,
            **({"before": before} if before else {}),
        )
    command = str(click.get_current_context().info_name)
    asked.carry_out(model, planned, name=command, title=f"{short(model.name)}: {command}", deadline=deadline)


def _stand_in(model: MeasuredModel, fake: str) -> tuple[LocalModel, Callable[[Trial], None] | None]:
    """Replace the network by a stand-in; returns the model and what is called before each trial, if anything."""
    from ..errors import ConfigError
    from ..evals.models.fake import Oracle, replace_runner
    from ..evals.models.local import LocalModel

    if not isinstance(model, LocalModel):
        raise ConfigError("--fake replaces a network that is loaded here; leave it out, or --endpoint")
    stand_in = replace_runner(model.model, fake)
    return LocalModel(model.model), stand_in.learn if isinstance(stand_in, Oracle) else None


def _chosen(tasks: str, suite: str) -> list[Task]:
    """The tasks of a suite by their names, or all.

    Raises:
        ConfigError: an unknown name, or --text or --depths is given and none of the tasks uses it.
    """
    from ..errors import ConfigError, did_you_mean
    from ..evals.retrieval.tasks import SUITES, TASKS

    names = list(SUITES[suite]) if tasks == "all" else [name.strip() for name in tasks.split(",")]
    if unknown := [name for name in names if name not in SUITES[suite]]:
        raise ConfigError(f"unknown task {unknown[0]!r}.{did_you_mean(unknown[0], SUITES[suite])}")
    chosen = [TASKS[name] for name in names]
    for option, is_used in (
        ("text", any(task.needs_text for task in chosen)),
        ("depths", any(task.has_depth for task in chosen)),
    ):
        if is_given(option) and not is_used:
            raise ConfigError(f"--{option} has no effect on {', '.join(names)}; leave it out")
    return chosen


def _numbers(depths: str) -> list[float]:
    from ..errors import ConfigError

    try:
        return [float(depth) for depth in depths.split(",")] if depths else []
    except ValueError:
        raise ConfigError(f"--depths {depths!r} must be numbers from 0 to 1, such as 0,0.5,1") from None
