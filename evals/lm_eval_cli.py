"""The `ropewalk lm-eval` command."""

from __future__ import annotations

import sys

import click


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="\b\nExamples:\n"
    "  ropewalk lm-eval run --model ropewalk --model_args model=smollm2-135m,rope=yarn:2 --tasks lambada_openai\n"
    """  ropewalk lm-eval run --model ropewalk --model_args '{"model": "./m", "rope": "rerope:1k|logn"}' ...\n"""
    "  ropewalk lm-eval ls tasks",
)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="ARGUMENTS...")
def lm_eval(arguments: tuple[str, ...]) -> None:
    """lm-evaluation-harness with a model `ropewalk`, so that any task there runs under any scaler.

    ARGUMENTS go to the harness's own command, `lm-eval`; `ropewalk lm-eval run --help` is its help. --model_args takes
    model, rope, dtype, kv_dtype, max_length and max_gen_toks. Tasks that download their data need a network.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        from ..errors import ConfigError

        raise ConfigError(f"lm-evaluation-harness is not here ({error}); pip install 'ropewalk[lm-eval]'") from None

    from . import lm_eval as registers_the_model  # noqa: F401

    sys.argv = ["lm-eval", *arguments]
    cli_evaluate()
