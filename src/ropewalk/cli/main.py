"""The `ropewalk` command: the group of all commands, each imported when it is run, so that help is instant."""

from __future__ import annotations

import contextlib
import importlib
import sys
import warnings
from typing import Any

import click

from ..errors import RopewalkError
from ..version import __version__
from .help_page import place
from .messages import shell_message, stopping_said, warning_line

GROUPS = {
    "First steps": {
        "demo": ("measure:demo", "Measure the built-in model past its trained length, in minutes."),
        "chat": ("chat:chat", "Talk to a chat model."),
        "generate": ("generate:generate", "Continue a prompt."),
        "ppl": ("measure:ppl", "Loss and perplexity across context lengths."),
        "tune": ("tune:tune", "Find the scaler that carries a model to a length."),
    },
    "Serve and export": {
        "serve": ("serve:serve", "Serve a model over HTTP, as OpenAI's API does."),
        "export": ("export:export", "Write a model under a scaler for other software."),
        "transformers-serve": ("serve:transformers_serve", "transformers serve for a folder that names a scaler."),
    },
    "Measure": {
        "all": ("runs:all_", "Loss, harm, passkeys and RULER-11 in one run, by preset."),
        "passkey": ("retrieval:passkey", "Find a number in a long text of repeated sentences."),
        "niah": ("retrieval:niah", "Find a needle in a real text."),
        "kv": ("retrieval:kv", "Look up one of many random pairs."),
        "ruler": ("retrieval:ruler", "Eleven tasks of RULER, offline."),
        "ask": ("retrieval:ask", "Any retrieval task by name, those of other packages too."),
        "facts": ("contexts:facts", "Compare scaling with pooling on facts of a long document."),
        "endless": ("contexts:endless", "Read a text of any length in constant memory."),
        "continuation": ("measure:continuation", "Compare ways to continue prompts that end inside a token."),
        "lm-eval": ("measure:lm_eval", "Run lm-evaluation-harness under any scaler."),
        "speed": ("speed:speed", "Time position maps, or compare with other engines."),
        "memory": ("speed:memory", "Peak memory of reading a long text."),
        "gpu-check": ("gpu_check:gpu_check", "Is the engine right on this GPU, and how fast is it?"),
        "report": ("runs:report", "Make tables, plots and report of one or more runs again."),
        "compare": ("runs:compare", "Compare two runs, cell by cell."),
        "reconstruct": ("runs:reconstruct", "Print the exact text behind a row of a run."),
    },
    "Choose a scaler": {
        "scalers": ("scalers:scalers", "List every method, its fields and its source."),
        "show": ("scalers:show", "What a scaler does, in numbers or drawn."),
        "tuned": ("tune:tuned", "List or forget what tune --keep has stored for auto."),
        "base": ("scalers:base", "Which rotary base a context needs."),
    },
    "Look up and fetch": {
        "explain": ("export:explain", "What each engine does with the rotary config of a model."),
        "vocab": ("vocab:vocab", "A tokenizer in numbers: size, compression, cut prompts."),
        "fetch": ("export:fetch", "Download the built-in model and texts."),
        "cache": ("cache:cache", "What is stored on this machine, and removing it."),
    },
}
"""Every command by its group, with its module and function, and its line in `ropewalk --help`."""

COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


HANDLE_CTRL_C = {"chat", "serve", "transformers-serve"}
"""Commands that Ctrl-C does not end at once."""


class LazyGroup(click.Group):
    """Imports a command only when it is run or asked for its own help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(f"ropewalk.cli.{module}"), attribute)
        command.params.sort(key=place)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        width = max(map(len, COMMANDS))
        for title, group in GROUPS.items():
            with formatter.section(title):
                formatter.write_dl([(f"{name:<{width}}", summary) for name, (_, summary) in group.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; what an error says of Python's settings it says of the command's options.

        Raises:
            click.Abort: Ctrl-C; it says whether the command can go on.
        """
        handles_ctrl_c = HANDLE_CTRL_C.issuperset([*ctx._protected_args, *ctx.args][:1])
        try:
            with contextlib.nullcontext() if handles_ctrl_c else stopping_said():
                return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            resumes = command is not None and any(map(_is_folder_of_results, command.params))
            usual = "what was finished, if anything, is stored; the same command continues" if resumes else ""
            rest = str(stop) or usual  # the measurement itself says what it stored
            raise click.Abort(f"; {rest}" if rest else "") from None
        except RopewalkError as error:
            command = self.get_command(ctx, ctx.invoked_subcommand or "")
            if command is not None:
                error.args = (shell_message(error.args, command),)
            raise

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            from ..errors import did_you_mean

            raise click.UsageError(f"no command {args[0]!r}.{did_you_mean(args[0], COMMANDS)}", ctx)
        return super().resolve_command(ctx, args)


def _is_folder_of_results(option: click.Parameter) -> bool:
    return option.name == "out" and isinstance(option.type, click.Path) and not option.type.file_okay


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__)
def cli() -> None:
    """Long-context inference built around RoPE scaling.

    A scaler is written NAME:FACTOR, as in yarn:4, and several act together as in "ntk:4|resonance";
    `ropewalk scalers` lists them. Without time to tune take auto, and yarn:F for a served engine, F the ratio of the
    lengths. Lengths, also those in a scaler, are written 512, 8k, 1M (k = 1024) or 2x (times the trained length).

    Tab completion in bash: eval "$(_ROPEWALK_COMPLETE=bash_source ropewalk)", in ~/.bashrc to keep it; zsh_source and
    fish_source are for those shells.
    """


def main() -> None:
    """Entry point: errors that ropewalk raises on purpose, and those of files, become one sentence and exit code 2."""
    warnings.formatwarning = lambda message, *_, **__: warning_line(message)
    try:
        if exit_code := cli(prog_name="ropewalk", standalone_mode=False):
            sys.exit(exit_code)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(2)
    except click.ClickException as error:
        context = error.ctx if isinstance(error, click.UsageError) else None
        hint = "" if context is None else f" ({context.command_path} --help)"
        click.echo(f"ropewalk: {error.format_message()}{hint}", err=True)
        sys.exit(2)
    except RopewalkError as error:
        click.echo(f"ropewalk: {error}", err=True)
        sys.exit(2)
    except OSError as error:
        if error.errno is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        click.echo(f"ropewalk: {place}{error.strerror}; check the path, its permissions and the free space", err=True)
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort) as stop:
        click.echo(f"\nropewalk: stopped{stop}", err=True)
        sys.exit(130)
