"""`ropewalk demo`, `ppl`, `continuation` and `lm-eval`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from .help_page import EXAMPLES, command
from .measurement import Measurement, ModelTarget, deadline_in, printed
from .options import Minutes, folder_option, loads_a_model, measures, run_json_option, runs_anywhere, text_option
from .waiting import waiting


def _settings(protocol: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings of a protocol that were given as options; one of another protocol is a mistake."""
    from ..errors import ConfigError
    from ..evals.protocols.by_name import settings_of, users_of

    known = settings_of(protocol)
    chosen = {name: value for name, value in given.items() if value is not None}
    for name in chosen:
        if name not in known:
            option = "--tokens" if name == "text_tokens" else f"--{name}"
            users = ", ".join(users_of(name))
            raise ConfigError(f"{option} has no effect on {protocol}; leave it out, or use --protocol {users}")
    return chosen


@command(
    epilog=EXAMPLES
    + "  ropewalk ppl smollm2-135m --rope none --rope yarn:2 --lengths 0.25x,1x,2x --text shakespeare\n"
    + "  ropewalk ppl ./my-model --rope ntk:8 --lengths 8k,32k --text book.txt --out runs/a\n"
    + "  ropewalk ppl smollm2-135m --protocol by-position --rope none --rope yarn:2 --lengths 2x\n"
    + "  ropewalk ppl smollm2-135m --protocol harm --rope yarn:2 --rope linear:2 --lengths 1k,1x --samples 4\n"
    + "  ropewalk ppl ./exported --endpoint http://localhost:8000/v1 --text shakespeare --lengths 4k,8k"
)
@measures(
    text_option("shakespeare"),
    click.option(
        "--protocol",
        default="fixed-target",
        show_default=True,
        help="fixed-target, by-position, sliding, truncate, llamacpp, disjoint, longppl, repeat or harm "
        "(docs/evaluation.md).",
    ),
    click.option(
        "--target",
        type=int,
        help="fixed-target, longppl, repeat: tokens scored at the end; harm too.  "
        "[default: 1024, or half of the shortest length; harm: all]",
    ),
    click.option(
        "--samples",
        type=int,
        help="by-position, truncate: documents; fixed-target, longppl, repeat, harm: places in the text.  [default: 1]",
    ),
    click.option(
        "--interval",
        type=float,
        help="fixed-target: add places until the 95 % interval of every difference to the untouched model is at most "
        "so wide (nats), or a tenth of the difference; --samples are then the most.  [default: 64]",
    ),
    click.option("--stride", type=int, help="sliding: tokens by which the window moves.  [default: 256]"),
    click.option("--tokens", help="sliding, llamacpp, disjoint: tokens of the text that are read.  [default: 32k]"),
    click.option("--judge", help="longppl: the scaler that chooses the key tokens.  [default: dual-chunk]"),
    runs_anywhere,
    lengths=("0.25x,0.5x,1x,2x", "of a window"),
    out="runs/MODEL-TEXT",
)
def ppl(
    asked: Measurement,
    lengths: str,
    text: str,
    protocol: str,
    target: int | None,
    samples: int | None,
    interval: float | None,
    stride: int | None,
    tokens: str | None,
    judge: str | None,
    where: ModelTarget,
) -> None:
    """Loss and perplexity of MODEL across context lengths, for every --rope.

    A run resumes: cells that are in --out already are not measured again. The folder gets results.jsonl, table.md,
    table.csv, plots and a self-contained report.html.
    """
    deadline = deadline_in(asked.max_minutes)
    from ..errors import ConfigError
    from ..evals.data import load_text
    from ..evals.protocols.by_name import protocol as named_protocol
    from ..evals.protocols.fixed_target import FixedTarget
    from ..evals.protocols.perplexity_cell import Source, plan
    from ..evals.protocols.places import MOST, GrowingPlaces
    from ..evals.runs.compare import short
    from ..scaling import parse_length

    given = {
        "target": target,
        "samples": samples,
        "stride": stride,
        "judge": None if judge is None else str(asked.scaler(judge)),
    }
    settings = _settings(protocol, given | {"text_tokens": None if tokens is None else parse_length(tokens)})
    if interval is not None:
        if protocol != FixedTarget.name:
            raise ConfigError(f"--interval has no effect on {protocol}; leave it out, or use --protocol fixed-target")
        settings.setdefault("samples", MOST)
    scalers, documents = asked.scalers(), load_text(text)
    model = where.open(asked.model)
    contexts = tuple(parse_length(length, model.trained_length) for length in lengths.split(","))
    with waiting(f"reading {short(text)}"):
        chosen = named_protocol(protocol, contexts, **settings)
        source = Source.of(documents, model.tokenizer, chosen)
        growing = None
        if interval is not None and isinstance(chosen, FixedTarget):
            growing = GrowingPlaces(model, source, scalers, chosen, interval)
        cells = plan(model, source, scalers, chosen) if growing is None else growing.cells
    title = f"{short(model.name)} on {short(text)}"
    work = None if growing is None else growing.measure
    asked.carry_out(model, cells, name=Path(text).stem, title=title, deadline=deadline, work=work)


@command(epilog=EXAMPLES + "  ropewalk demo\n  ropewalk demo --full --out runs/full")
@click.option("--full", is_flag=True, help="Go to four times the trained length, without a time limit.")
@click.option(
    "--max-minutes",
    default=5.0,
    show_default=True,
    type=Minutes(),
    help="Leave out what would not finish in this time after fetching, a hard limit; --full takes what it needs.",
)
@folder_option("runs/demo", exact=True)
@run_json_option()
def demo(full: bool, max_minutes: float, out: Path, as_json: bool) -> None:
    """Read past the trained length of a real model (SmolLM2-135M), and report the result.

    Fetches the model and a text, measures how fast the machine is, and then the loss on the same last tokens as the
    context grows, for the untouched model, auto and YaRN, as far as there is time. Lets the best one write a passage,
    and leaves a table, plots and a report that opens with the verdict. Stop it with Ctrl-C and run it again: it
    continues where it stopped.
    """
    from ..evals.demo import run_demo

    with printed(as_json, out) as left_out:
        left_out += run_demo(max_minutes=None if full else max_minutes, out=out)


@command(
    epilog=EXAMPLES + "  ropewalk continuation smollm2-135m --cuts 40\n"
    "  ropewalk continuation ./my-model --text book.txt --out runs/book"
)
@click.argument("model")
@text_option(None, note="  [default: shakespeare, code, chinese]")
@click.option("--cuts", default=120, show_default=True, type=click.IntRange(min=1), help="Cuts of every kind.")
@click.option("--seed", default=0, show_default=True, help="Seed of the places of the cuts.")
@loads_a_model
@folder_option("runs/continuation", exact=True)
@run_json_option()
def continuation(
    model: str, text: str | None, cuts: int, seed: int, loading: dict[str, Any], out: Path, as_json: bool
) -> None:
    """How well MODEL continues prompts that end inside a token, by each method.

    Texts are cut at random characters, after spaces, and at word borders that fall inside a token. At every cut the
    exact continuation is compared with none, with one token back, with a step-by-step mask, and with transformers'
    token healing. A run resumes: cuts that are in --out already are not measured again.
    """
    from ..evals.continuation.benchmark import compare

    with printed(as_json, out):
        compare(model, text, cuts=cuts, seed=seed, loading=loading, out=out)


@command(
    context_settings={"ignore_unknown_options": True},
    epilog="\b\nExamples:\n"
    "  ropewalk lm-eval run --model ropewalk --model_args model=smollm2-135m,rope=yarn:2 --tasks lambada_openai\n"
    """  ropewalk lm-eval run --model ropewalk --model_args '{"model": "./m", "rope": "rerope:1k|logn"}' ...\n"""
    "  ropewalk lm-eval ls tasks",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness with a model `ropewalk`, so that any of its tasks runs under any scaler.

    ARGUMENTS go to the harness's own command, `lm-eval`; `ropewalk lm-eval run --help` is its help. --model_args takes
    model, rope, dtype, kv_dtype, precision, max_length and max_gen_toks. Tasks that download their data need a network.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        from ..errors import ConfigError

        raise ConfigError(f"lm-evaluation-harness is not here ({error}); pip install 'ropewalk[lm-eval]'") from None

    from ..evals import lm_eval as registers_the_model  # noqa: F401

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
