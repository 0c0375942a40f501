"""The `ropewalk` command: the group of all commands, each imported when it is run, so that help is instant."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any

import click

from .. import __version__
from ..errors import RopewalkError

COMMANDS = {
    "demo": ("ropewalk.evals.cli:demo", "The whole story on the embedded model, in minutes."),
    "ppl": ("ropewalk.evals.cli:ppl", "Perplexity across context lengths, by protocol."),
    "passkey": ("ropewalk.evals.retrieval.cli:passkey", "Is a number found in a long text of nothing?"),
    "niah": ("ropewalk.evals.retrieval.cli:niah", "Is a needle found in a real haystack?"),
    "kv": ("ropewalk.evals.retrieval.cli:kv", "Is one of many random pairs looked up?"),
    "ruler": ("ropewalk.evals.retrieval.cli:ruler", "RULER-11, offline: eleven tasks of RULER."),
    "ask": ("ropewalk.evals.retrieval.cli:ask", "Any retrieval task by name, those of other packages too."),
    "facts": ("ropewalk.evals.contexts.facts_cli:facts", "Scaling or pooling? Facts of a long document, asked for."),
    "endless": ("ropewalk.evals.contexts.endless_cli:endless", "A text without an end in the memory of a window."),
    "all": ("ropewalk.evals.suite_cli:all_", "Everything at once, by preset: smoke, quick or full."),
    "report": ("ropewalk.evals.suite_cli:report", "Tables, plots and report of one or more runs."),
    "compare": ("ropewalk.evals.suite_cli:compare", "Two runs, cell by cell."),
    "reconstruct": ("ropewalk.evals.suite_cli:reconstruct", "The exact text behind a row of a run."),
    "tune": ("ropewalk.evals.tuning.cli:tune", "Which scaler carries this model to a length? Measured."),
    "lm-eval": (
        "ropewalk.evals.lm_eval_cli:lm_eval",
        "lm-evaluation-harness: any task there under any scaler.",
    ),
    "speed": ("ropewalk.evals.speed.cli:speed", "What a position map costs, or how fast other engines are."),
    "vocab": (
        "ropewalk.evals.vocab_cli:vocab",
        "A tokenizer in numbers: size, compression, prompts cut inside tokens.",
    ),
    "continuation": (
        "ropewalk.evals.cli:continuation",
        "Prompts that end inside a token: the ways to go on, compared.",
    ),
    "generate": ("ropewalk.engine.commands.generate:generate", "Continue a prompt."),
    "show": ("ropewalk.engine.commands.scalers:show", "Draw what a scaler does."),
    "scalers": ("ropewalk.engine.commands.scalers:scalers", "List every method, its fields and its source."),
    "base": ("ropewalk.engine.commands.base:base", "What rotary base does a context need?"),
    "export": ("ropewalk.engine.exports.cli:export", "Write a model under a scaler for the software that serves it."),
    "explain": ("ropewalk.engine.commands.explain:explain", "What would each engine do with a model's rotary config?"),
    "fetch": ("ropewalk.engine.commands.fetch:fetch", "Download the built-in model and texts."),
}


class LazyGroup(click.Group):
    """Imports a command only when it is run or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, summary) for name, (_, summary) in COMMANDS.items()])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from ..errors import did_you_mean

            raise click.UsageError(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Long-context inference built around RoPE scaling.

    A scaler is written NAME:FACTOR, as in yarn:4, and several act together as in "ntk:4|resonance";
    `ropewalk scalers` lists them, and auto chooses one for the length of each request. Lengths, also those in a scaler,
    read 512, 8k, 1M (k = 1024) or 2x (times the trained length).
    """


def main() -> None:
    """Entry point: errors that ropewalk raises on purpose become one sentence and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: f"ropewalk: {message}\n"
    try:
        cli(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except RopewalkError as error:
        click.echo(f"ropewalk: {error}", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        click.echo("\nropewalk: stopped; what was finished is kept", err=True)
        sys.exit(130)
