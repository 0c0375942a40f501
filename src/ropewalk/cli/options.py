"""The options that commands share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ..errors import ConfigError
from .measurement import Measurement, ModelTarget, named_rope
from .waiting import waiting

if TYPE_CHECKING:
    from ..engine.model import Model

Decorator = Callable[[Any], Any]


class Minutes(click.ParamType[float]):
    """A limited time."""

    name = "float"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        minutes = float(click.FLOAT.convert(value, param, ctx))
        if not 0 < minutes < math.inf:
            self.fail(f"{minutes:g} is no time to measure in; give a number above 0", param, ctx)
        return minutes


def json_option(of: str) -> Decorator:
    """`--json`; the command gets it as `as_json`.

    Args:
        of: the fields of the object that is printed, for the help.
    """
    return click.option("--json", "as_json", is_flag=True, help=f"Print one line of JSON: {of}.")


def run_json_option() -> Decorator:
    """`--json` of a command that measures, which prints its run by `print_run`."""
    return json_option(
        "folder, verdict (sentences), rows (those of results.jsonl), left_out (for lack of time: rope, length)"
    )


def rope_option(default: str | None = "none", note: str = "") -> Decorator:
    """`--rope`, one scaler."""
    return click.option(
        "--rope", default=default, show_default=True, help=f"Scaler, such as yarn:4; a folder may name its own.{note}"
    )


def ropes_option(default: tuple[str, ...] = (), note: str = "") -> Decorator:
    """`--rope`, any number of scalers; the command gets them as `ropes`."""
    text = f"Scaler, such as yarn:4; may be repeated.{note}"
    return click.option("--rope", "ropes", multiple=True, default=default, show_default=bool(default), help=text)


def lengths_option(default: str | None, of: str, note: str = "") -> Decorator:
    """`--lengths`: tokens `of` what."""
    text = f"Tokens {of}, separated by commas: 512, 8k or 2x.{note}"
    return click.option("--lengths", default=default, show_default=default is not None, help=text)


def is_given(option: str) -> bool:
    """True if the user gave an option of the current command, by the name of its parameter; False if it has none."""
    return click.get_current_context().get_parameter_source(option) not in (None, ParameterSource.DEFAULT)


def chosen_rope(name: str, rope: str) -> str:
    """The scaler of a command: `--rope` if it is given, else the one that the folder of the model names, else `rope`.

    Raises:
        RopewalkError: as `load`.
    """
    return rope if is_given("rope") else named_rope(name) or rope


def given_max_length(name: str, max_length: str | None) -> int | None:
    """The tokens of `--max-length`, of which `2x` is a multiple of the model's trained length; None if not given.

    Raises:
        RopewalkError: not a length; for a multiple also as `load`.
    """
    if max_length is None:
        return None
    with waiting("starting"):
        from ..engine.checkpoints.config import trained_length
        from ..scaling.lengths import parse_length

    return parse_length(max_length, lambda: trained_length(name))


def text_option(default: str | None, note: str = "") -> Decorator:
    """`--text`, as `load_text` reads it."""
    text = f"Text to read: kjv, shakespeare, pydoc, stdlib, code, chinese, or a file or folder.{note}"
    return click.option("--text", default=default, show_default=default is not None, help=text)


def folder_option(default: str, *, exact: bool = False) -> Decorator:
    """`--out`, a folder; unless `exact`, `default` is a description and the command gets None."""
    return click.option(
        "--out",
        default=default if exact else None,
        type=click.Path(file_okay=False, path_type=Path),
        help=f"Folder for the results.  [default: {default}]",
    )


def picture_option(of: str, default: str | None = None) -> Decorator:
    """`--out`, a picture `of` what."""
    return click.option(
        "--out",
        default=default,
        show_default=default is not None,
        type=click.Path(dir_okay=False, path_type=Path),
        callback=_picture,
        help=f"Picture of {of}: a .png; an .svg is written beside it.",
    )


def _picture(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    if value is not None and value.suffix not in ("", ".png", ".svg"):
        raise click.BadParameter(f"{value} is no .png; a .png and an .svg are written", ctx, param)
    return value


_LOADING_OPTIONS = (
    click.option(
        "--dtype",
        type=click.Choice(["auto", "float32", "float16", "bfloat16", "float64", "int8"]),
        default="auto",
        show_default=True,
        help="Number format of the weights; int8 quantizes them on loading.",
    ),
    click.option(
        "--kv-dtype",
        type=click.Choice(["auto", "float32", "bfloat16", "int8"]),
        default="auto",
        show_default=True,
        help="Number format of keys and values.",
    ),
    click.option(
        "--precision",
        type=click.Choice(["auto", "float32", "bfloat16"]),
        default="auto",
        show_default=True,
        help="Number format of the matrix products that read a prompt; auto is bfloat16 on CPUs that multiply it, "
        "unless the weights are float32.",
    ),
    click.option(
        "--offload",
        type=click.Path(file_okay=False),
        help="Keep keys and values in a file in this folder, for contexts that memory does not hold.",
    ),
    click.option("--device-map", help="Where the layers are, as in accelerate: auto spreads them over all devices."),
    click.option(
        "--tp-plan",
        type=click.Choice(["auto"]),
        help="Split every layer over the processes that torchrun started.",
    ),
    click.option("--compile/--no-compile", default=None, help="Require the compiled kernels, or do not use them."),
)


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `loading`, keywords for `load`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        names = ("dtype", "kv_dtype", "precision", "offload", "device_map", "tp_plan")
        loading = {name: kwargs.pop(name) for name in names}
        chosen = kwargs.pop("compile")
        loading["compile"] = "auto" if chosen is None else chosen
        command(*args, loading=loading, **kwargs)

    for option in reversed(_LOADING_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


def refuse_tensor_parallel(loading: dict[str, Any], what: str) -> None:
    """Refuse --tp-plan of a command whose requests arrive in one process.

    Raises:
        click.UsageError: it is given.
    """
    if loading["tp_plan"]:
        raise click.UsageError(f"{what} runs in one process; leave out --tp-plan")


def refuse_without_template(model: Model, instead: str) -> None:
    """Refuse messages to a model that is not a chat model.

    Args:
        instead: what to do.

    Raises:
        ConfigError: its tokenizer has no chat template.
    """
    from ..engine.chat_template import has_chat_template

    if not has_chat_template(model.tokenizer):
        raise ConfigError(f"{model.name} has no chat template, so it is not a chat model; {instead}")


_SAMPLING_OPTIONS = (
    click.option("--max-new-tokens", default=256, show_default=True, help="Most tokens to write."),
    click.option(
        "--temperature",
        type=float,
        help="1 draws from the model's own distribution, 0 takes the likeliest token. Without this and the next three, "
        "the model's generation config decides, else 0.",
    ),
    click.option("--top-p", type=float, help="Keep the likeliest tokens that reach this probability; 1 keeps all."),
    click.option("--top-k", type=int, help="Keep this many likeliest tokens; 0 keeps all."),
    click.option("--min-p", type=float, help="Keep tokens at least this fraction as likely as the likeliest."),
    click.option(
        "--repetition-penalty",
        type=float,
        help="Above 1, tokens that are in the text already become less likely.",
    ),
    click.option("--stop", multiple=True, help="End the text before this string; may be repeated."),
    click.option(
        "--max-time",
        type=float,
        help="Most seconds to read the prompt and write; the token in progress then is the last.",
    ),
    click.option("--seed", type=int, help="Seed that makes sampling repeatable."),
)


def sampling_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `sampling`, keywords for `SamplingParams`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        names = ("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop", "max_time")
        sampling = {name: kwargs.pop(name) for name in (*names, "seed")}
        if sampling["temperature"] == 0:
            for name in ("top_p", "top_k", "min_p", "seed"):
                if sampling[name] is not None:
                    option = f"--{name.replace('_', '-')}"
                    raise click.UsageError(f"--temperature 0 takes the likeliest token; leave out {option}")
        command(*args, sampling=sampling, **kwargs)

    for option in reversed(_SAMPLING_OPTIONS):
        wrapped = option(wrapped)
    return wrapped


_SERVER_OPTIONS = (
    click.option(
        "--endpoint",
        metavar="URL",
        help="Measure MODEL at an OpenAI-compatible server (http://localhost:8000/v1); MODEL then names its tokenizer "
        "and config.",
    ),
    click.option(
        "--served-as", metavar="NAME", help="With --endpoint: name of the model at the server, if it serves several."
    ),
)


def runs_anywhere(command: Callable[..., None]) -> Callable[..., None]:
    """Add --endpoint, --served-as and the options of loading; the command gets them as `where`, a `ModelTarget`."""

    @functools.wraps(command)
    def wrapped(*, endpoint: str | None, served_as: str | None, loading: dict[str, Any], **rest: Any) -> None:
        command(where=ModelTarget(endpoint=endpoint, served_as=served_as, loading=loading), **rest)

    found = loads_a_model(wrapped)
    for option in reversed(_SERVER_OPTIONS):
        found = option(found)
    return found


def measures(
    *own: Decorator,
    out: str,
    ropes: tuple[str, ...] = ("none",),
    lengths: tuple[str, str] | None = None,
    max_minutes: str = "Leave out what would not finish in this time.",
) -> Callable[[Any], Any]:
    """Add the shared options to a command, which gets them as `asked`, a `Measurement`, and --lengths as `lengths`.

    Args:
        own: the command's own options, which stand between --lengths and --out.
        out: the run's folder by default, for the help.
        ropes: the default of --rope.
        lengths: default of --lengths, and what they are tokens of; None for a command without.
        max_minutes: help of --max-minutes.
    """
    compares = "none" in ropes
    note = " One that the folder of MODEL names is measured too." if compares else ""
    head: list[Decorator] = [click.argument("model"), ropes_option(ropes, note)]
    if lengths is not None:
        head.append(lengths_option(*lengths))
    tail = (
        folder_option(out),
        click.option("--max-minutes", type=Minutes(), help=max_minutes),
        click.option("--dry-run", is_flag=True, help="Print what would be measured, and how long it would take."),
        run_json_option(),
    )

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapped(
            *,
            model: str,
            ropes: tuple[str, ...],
            out: Path | None,
            max_minutes: float | None,
            dry_run: bool,
            as_json: bool,
            **rest: Any,
        ) -> None:
            if dry_run and as_json:
                raise click.UsageError("--dry-run prints a plan, and --json results; leave out one of them")
            asked = Measurement(
                model=model,
                ropes=ropes,
                adds_named=compares and not is_given("ropes") and not is_given("endpoint"),
                out=out,
                max_minutes=max_minutes,
                dry_run=dry_run,
                as_json=as_json,
            )
            command(asked=asked, **rest)

        for option in reversed((*head, *own, *tail)):
            wrapped = option(wrapped)
        return wrapped

    return decorate
