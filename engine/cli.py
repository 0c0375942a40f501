"""The `ropewalk` command. Modules that need torch are imported inside the commands, so that help is instant."""

from __future__ import annotations

import importlib
import sys
import warnings
from typing import Any, Literal

import click

from .. import __version__
from ..errors import DataError, RopewalkError
from .commands.options import EXAMPLES, loads_a_model

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
    "generate": ("ropewalk.engine.cli:generate", "Continue a prompt."),
    "show": ("ropewalk.engine.cli:show", "Draw what a scaler does."),
    "scalers": ("ropewalk.engine.cli:scalers", "List every method, its fields and its source."),
    "base": ("ropewalk.engine.commands.base:base", "What rotary base does a context need?"),
    "export": ("ropewalk.engine.exports.cli:export", "Write a model under a scaler for the software that serves it."),
    "explain": ("ropewalk.engine.commands.explain:explain", "What would each engine do with a model's rotary config?"),
    "fetch": ("ropewalk.engine.cli:fetch", "Download the built-in model and texts."),
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


@click.command(
    epilog=EXAMPLES + '  ropewalk generate smollm2-135m "Once upon a time" --rope yarn:2\n'
    "  cat book.txt | ropewalk generate ./my-model - --max-new-tokens 100 --temperature 0\n"
    '  ropewalk generate smollm2-135m "The captain of the ship is" --window 2k --contexts moby-dick.txt'
)
@click.argument("model")
@click.argument("prompt")
@click.argument("files", nargs=-1, type=click.Path(exists=True, dir_okay=False))
@click.option(
    "--rope", default="none", show_default=True, help="Scaler, such as yarn:4; auto chooses one for the length."
)
@click.option("--max-new-tokens", default=128, show_default=True, help="Most tokens to write.")
@click.option("--temperature", default=0.7, show_default=True, help="0 takes the likeliest token.")
@click.option("--top-p", default=1.0, show_default=True, help="Keep the likeliest tokens that reach this probability.")
@click.option("--top-k", default=0, show_default=True, help="Keep this many likeliest tokens; 0 keeps all.")
@click.option("--seed", type=int, help="Make sampling repeatable.")
@click.option("--stop", multiple=True, help="End the text before this string; may be repeated.")
@click.option(
    "--continuation",
    type=click.Choice(["auto", "exact", "off"]),
    default="auto",
    show_default=True,
    help="Whether the first token may begin inside PROMPT; off begins one at its end.",
)
@click.option(
    "--contexts",
    "over_contexts",
    is_flag=True,
    help="PROMPT is a question over the FILES that follow, each read by itself (NBCE).",
)
@click.option(
    "--window", help="Split FILES into windows of this many tokens, 2k, say, which overlap by an eighth, at sentences."
)
@click.option(
    "--pooling",
    type=click.Choice(["entropy", "mean", "max"]),
    default="entropy",
    show_default=True,
    help="How the answers of contexts become one: that of the least uncertain one, the mean, or the largest.",
)
@click.option(
    "--special-tokens",
    is_flag=True,
    help="Names of special tokens in PROMPT stand for them, as a chat template means it; else they are plain text.",
)
@loads_a_model
@click.option("--max-length", help="Go past the scaler's reach, up to this length.")
def generate(
    model: str,
    prompt: str,
    files: tuple[str, ...],
    rope: str,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    seed: int | None,
    stop: tuple[str, ...],
    continuation: Literal["auto", "exact", "off"],
    over_contexts: bool,
    window: str | None,
    pooling: Literal["entropy", "mean", "max"],
    special_tokens: bool,
    loading: dict[str, Any],
    max_length: str | None,
) -> None:
    """Continue PROMPT with MODEL (a built-in name, a folder, a .gguf file or a hub id), as it is decided.

    PROMPT is the text itself, or - to read it from standard input.

    With --contexts, the next token is drawn from the laws after every one of FILES, each with PROMPT behind it, pooled
    into one; in a terminal every context has its colour, and so has what it answered. Contexts have no order, a span of
    the answer comes from one of them, and a confident answer from a context that does not tell may win.
    """
    from ..scaling.lengths import parse_length
    from . import split
    from .commands.contexts import answer_over_files
    from .load import load
    from .sampling import SamplingParams

    params = SamplingParams(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stop=stop,
        continuation=continuation,
    )
    if over_contexts != bool(files):
        raise click.UsageError(
            "--contexts needs the files to ask: --contexts a.txt b.txt"
            if over_contexts
            else f"{files[0]} is a second prompt; put prompts of several words in quotes, and files after --contexts"
        )
    if window and not over_contexts:
        raise click.UsageError("--window splits the files of --contexts, and there are none")
    text = _standard_input() if prompt == "-" else prompt
    if over_contexts and isinstance(text, bytes):
        raise DataError("standard input ends inside a character; a question over --contexts is a whole text")
    longest = parse_length(max_length) if max_length else None
    loaded = load(model, rope=rope, **loading, max_length=longest, special_tokens=special_tokens)
    if over_contexts:
        assert isinstance(text, str)
        size = parse_length(window, loaded.trained_length) if window else None
        answer_over_files(loaded, text, files, size, pooling, params)
        return
    shown = split.is_first()
    for piece in loaded.stream(text, params):
        if shown:
            click.echo(piece, nl=False)
            sys.stdout.flush()
    if shown:
        click.echo()


def _standard_input() -> str | bytes:
    """Text; bytes where it ends inside a character, which the model can complete.

    Raises:
        DataError: it is not UTF-8.
    """
    from ..tokenizer_tools.boundaries import split_character

    read = sys.stdin.buffer.read().replace(b"\r\n", b"\n")
    try:
        whole, cut = split_character(read)
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8 at byte {error.start}; convert it, as `iconv -f latin1 -t utf-8` does"
        ) from None
    return read if cut else whole.decode()


@click.command(epilog=EXAMPLES + "  ropewalk scalers")
def scalers() -> None:
    """List every method: its spec, its fields with their defaults, what it does, and its source."""
    import dataclasses
    import inspect

    from ..scaling import METHODS, format_length

    for name, method in METHODS.items():
        fields = []
        for f in dataclasses.fields(method):
            if f.default is dataclasses.MISSING:
                fields.append(f.name)
            else:
                shown = format_length(f.default) if f.metadata.get("length") and f.default is not None else f.default
                fields.append(f"{f.name}={str(shown).lower() if isinstance(shown, bool) else shown}")
        summary = inspect.cleandoc(method.__doc__ or "").split("\n\n")[0].replace("\n", " ")
        if not method.facet:
            summary = "The untouched model."
        click.echo(click.style(name, bold=True) + (f":{','.join(fields)}" if fields else ""))
        click.echo(f"    {summary}\n    [{method.facet or 'no facet'}; {method.source}]")


@click.command(
    epilog=EXAMPLES
    + '  ropewalk show yarn:4\n  ropewalk show "rerope:2k|logn" --length 64k\n'
    + '  ropewalk show "ntk:8|resonance" --dim 128 --base 5e5 --trained 8k --length 64k'
)
@click.argument("spec")
@click.option("--dim", default=64, show_default=True, help="Rotary dimension.")
@click.option("--base", default=1e5, show_default=True, help="Rotary base.")
@click.option("--trained", default="8k", show_default=True, help="Trained length.")
@click.option("--length", default="4x", show_default=True, help="Length to draw to, and that dynamic methods see.")
@click.option(
    "--out",
    default="rope.png",
    show_default=True,
    type=click.Path(dir_okay=False),
    help="A .png; an .svg is written beside it.",
)
def show(spec: str, dim: int, base: float, trained: str, length: str, out: str) -> None:
    """Draw what SPEC does, and print it in short.

    Frequency methods: wavelengths, stretch, and long-range decay of attention. Position maps: the distance seen at
    every true distance, and between every query and key. Temperatures: the factor at every position.
    """
    from pathlib import Path

    from ..evals.reports.scaler_plot import in_short, plot_scaler
    from ..scaling import RopeSpec, parse, parse_length

    rope = RopeSpec(dim=dim, base=base, trained_length=parse_length(trained))
    scaler = parse(spec, rope.trained_length)
    tokens = parse_length(length, rope.trained_length)
    paths = plot_scaler(scaler, rope, tokens, Path(out).with_suffix(""))
    for label, value in [*in_short(scaler, rope, tokens).items(), *(("drawn", path) for path in paths)]:
        click.echo(f"{label:<20} {value}")


@click.command(epilog=EXAMPLES + "  ropewalk fetch\n  ropewalk fetch smollm2-135m shakespeare")
@click.argument("names", nargs=-1)
def fetch(names: tuple[str, ...]) -> None:
    """Download built-in models and texts into the cache: NAMES, or all. Nothing is fetched twice."""
    from .checkpoints import assets

    for name in names:
        assets.check_name(name)
    for name in names or assets.ASSETS:
        click.echo(f"{name:<14} {assets.fetch(name)}")
