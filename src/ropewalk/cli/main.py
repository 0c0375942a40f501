"""The `ropewalk` command: the group of all commands, each imported when it is run, so that help is instant."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from typing import Any

import click

from ..errors import RopewalkError
from ..version import __version__

COMMANDS = {
    "demo": ("ropewalk.cli.measure:demo", "The whole story on the embedded model, in minutes."),
    "ppl": ("ropewalk.cli.measure:ppl", "Perplexity across context lengths, by protocol."),
    "passkey": ("ropewalk.cli.retrieval:passkey", "Is a number found in a long text of nothing?"),
    "niah": ("ropewalk.cli.retrieval:niah", "Is a needle found in a real haystack?"),
    "kv": ("ropewalk.cli.retrieval:kv", "Is one of many random pairs looked up?"),
    "ruler": ("ropewalk.cli.retrieval:ruler", "RULER-11, offline: eleven tasks of RULER."),
    "ask": ("ropewalk.cli.retrieval:ask", "Any retrieval task by name, those of other packages too."),
    "facts": ("ropewalk.cli.contexts:facts", "Scaling or pooling? Facts of a long document, asked for."),
    "endless": ("ropewalk.cli.contexts:endless", "A text without an end in the memory of a window."),
    "all": ("ropewalk.cli.runs:all_", "Everything at once, by preset: smoke, quick or full."),
    "report": ("ropewalk.cli.runs:report", "Tables, plots and report of one or more runs."),
    "compare": ("ropewalk.cli.runs:compare", "Two runs, cell by cell."),
    "reconstruct": ("ropewalk.cli.runs:reconstruct", "The exact text behind a row of a run."),
    "tune": ("ropewalk.cli.tune:tune", "Which scaler carries this model to a length? Measured."),
    "lm-eval": (
        "ropewalk.cli.measure:lm_eval",
        "lm-evaluation-harness: any task there under any scaler.",
    ),
    "speed": ("ropewalk.cli.speed:speed", "What a position map costs, or how fast other engines are."),
    "memory": ("ropewalk.cli.speed:memory", "Peak memory of reading a long text, beside transformers."),
    "vocab": (
        "ropewalk.cli.vocab:vocab",
        "A tokenizer in numbers: size, compression, prompts cut inside tokens.",
    ),
    "continuation": (
        "ropewalk.cli.measure:continuation",
        "Prompts that end inside a token: the ways to go on, compared.",
    ),
    "generate": ("ropewalk.cli.generate:generate", "Continue a prompt."),
    "show": ("ropewalk.cli.scalers:show", "Draw what a scaler does."),
    "scalers": ("ropewalk.cli.scalers:scalers", "List every method, its fields and its source."),
    "base": ("ropewalk.cli.scalers:base", "What rotary base does a context need?"),
    "export": ("ropewalk.cli.export:export", "Write a model under a scaler for the software that serves it."),
    "explain": ("ropewalk.cli.export:explain", "What would each engine do with a model's rotary config?"),
    "fetch": ("ropewalk.cli.export:fetch", "Download the built-in model and texts."),
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

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what an error says of Python's settings it says of the command's options."""
        try:
            return super().invoke(ctx)
        except RopewalkError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None:
                error.args = (with_options(str(error), command), *error.args[1:])
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from ..errors import did_you_mean

            raise click.UsageError(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


_SETTING = re.compile(
    r"(?P<load>load (?:it )?with )?(?<![\w,:-])(?:model\.)?"
    r"(?P<name>rope|max_length|dtype|kv_dtype|offload|device_map|tp_plan|compile|special_tokens) ?= ?"
    r"(?P<value>'[^']*'|\"[^\"]*\"|\w+)"
)
"""A setting of `load` or of the model, as errors name it."""


def with_options(message: str, command: click.Command) -> str:
    """`set model.rope = "auto"` as `set --rope auto`, `load with max_length=9000` as `add --max-length 9000`.

    Settings that `command` has no option for stay as they are.
    """
    options = {name: option for option in command.params if isinstance(option, click.Option) for name in option.opts}

    def option(found: re.Match[str]) -> str:
        known, value = options.get("--" + found["name"].replace("_", "-")), found["value"].strip("'\"")
        if known is None:
            return found[0]
        add = "add " if found["load"] else ""
        if known.is_flag:
            opts = known.secondary_opts if value == "False" else known.opts
            return f"{add}{opts[0]}"
        return f"{add}{known.opts[0]} {value}"

    if "--window" in options:
        message = message.replace("rw.windows(text, model.tokenizer, tokens=...)", "--window 2k")
    return _SETTING.sub(option, message)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Long-context inference built around RoPE scaling.

    A scaler is written NAME:FACTOR, as in yarn:4, and several act together as in "ntk:4|resonance";
    `ropewalk scalers` lists them. Without time to tune take auto, and yarn:F for a served engine, F the ratio of the
    lengths. Lengths, also those in a scaler, read 512, 8k, 1M (k = 1024) or 2x (times the trained length).
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
