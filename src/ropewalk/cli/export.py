"""`ropewalk export`, `explain` and `fetch`: models for other software, and what each engine reads in a config."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..engine.exports import TARGETS
from .help_page import EXAMPLES, command
from .messages import print_json
from .options import is_given, json_option, picture_option, rope_option

if TYPE_CHECKING:
    from rich.console import Console

    from ..scaling.engine_reading import EngineReading


@command(
    epilog=EXAMPLES + '  ropewalk export smollm2-135m out --rope "ntk-mixed:4"\n'
    "  ropewalk export ./my-model served --rope yarn:4 --target vllm\n"
    '  ropewalk export ./my-model mapped --rope "self-extend:8,window=0.5x|logn" --target vllm\n'
    "  ropewalk export ./my-model long.gguf --rope ntk:4 --target llama.cpp --dtype q8_0\n"
    "  ropewalk export my-model-q4_k_m.gguf long-q4_k_m.gguf --rope yarn:4 --target llama.cpp\n"
    "  ropewalk export ./my-model still --rope dynamic-yarn --length 32k"
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@rope_option(note=" yarn:F, F the ratio of the lengths, if in doubt.")
@click.option(
    "--target",
    default="hf",
    show_default=True,
    type=click.Choice(TARGETS),
    help="Software that will run it; hf is transformers.",
)
@click.option("--length", help="Tokens to be served, such as 32k or 4x.  [default: the scaler's reach]")
@click.option("--dtype", help="Number format of the matrices of a GGUF file: f32, bf16, f16 or q8_0.  [default: bf16]")
@json_option("path, target, scaler, length, carrier, command")
def export(model: str, out: Path, rope: str, target: Any, length: str | None, dtype: str | None, as_json: bool) -> None:
    """Write MODEL to OUT so that other software runs it under a scaler, unchanged.

    OUT is a new folder; for llama.cpp it is a new file. Weights and tokenizer are copied as they are, also the
    quantized weights of a .gguf file; only a checkpoint that becomes a GGUF file is written in another form.

    The frequencies are written in the simplest way that the target reads exactly: a base, a method of its own, or one
    factor for every rotary pair. Position maps and temperatures of queries are written by name for hf and vllm, which
    serve them with ropewalk installed beside them; the other targets refuse them, with what comes nearest. A scaler
    that depends on the length is fixed to --length.
    """
    from ..engine.exports.export import export as export_
    from ..scaling.lengths import format_length

    done = export_(model, out, rope=rope if is_given("rope") else None, target=target, length=length, dtype=dtype)
    if as_json:
        print_json({field.name: getattr(done, field.name) for field in dataclasses.fields(done)})
        return
    click.echo(f"{done.path}: {done.scaler} up to {format_length(done.length)} tokens, as {done.carrier}")
    if done.command:
        click.echo(f"serve it by: {done.command}")


@command(
    epilog=EXAMPLES + "  ropewalk explain ./my-model\n  ropewalk explain ./my-model/config.json --length 64k\n"
    "  ropewalk explain model.gguf --out explain.png"
)
@click.argument("model")
@click.option("--length", help="Tokens of the text.  [default: what the config promises]")
@picture_option("what the engines compute")
@json_option("model, length, engines (what each computes)")
def explain(model: str, length: str | None, out: Path | None, as_json: bool) -> None:
    """What would transformers, vLLM, SGLang, llama.cpp, ExLlamaV3 and mlx-lm do with the rotary config of MODEL?

    MODEL is a config.json, a folder, a hub id or a .gguf file. Engines read the same keys in different ways; each line
    says what one of them computes, as a scaler that other commands take, so that the difference can be measured.

    The readings are those of the engines' sources in November 2026; docs/export.md says which were compared with
    running engines.
    """
    from rich.console import Console
    from rich.markup import escape

    from ..scaling.lengths import format_length, parse_length

    readings = _readings(model)
    first = readings[0]
    tokens = (
        parse_length(length, first.rope.trained_length)
        if length is not None
        else first.max_length or first.rope.trained_length
    )
    paths: tuple[Path, ...] = ()
    if out is not None:
        from ..evals.reports.rope_plots import plot_readings

        paths = plot_readings(readings, tokens, Path(model).name, out.with_suffix(""))
    if as_json:
        engines = [_as_json(reading, first, tokens) for reading in readings]
        print_json({"model": model, "length": tokens, "engines": engines, "drawn": paths})
        return
    console = Console()
    console.print(
        f"{escape(model)}: rotary dimension {first.rope.dim}, base {first.rope.base:g}, trained on "
        f"{format_length(first.rope.trained_length)} tokens, at a length of {format_length(tokens)}",
        highlight=False,
    )
    _print(readings, tokens, console)
    for path in paths:
        console.print(f"drawn  {escape(str(path))}", highlight=False)


def _readings(model: str) -> list[EngineReading]:
    from ..scaling.serving import read_all, read_gguf

    path = Path(model).expanduser()
    if path.suffix == ".gguf":
        from ..engine.checkpoints.gguf_file import GgufFile

        file = GgufFile(path)
        return read_gguf(file.rope, file.context_length)
    if path.suffix == ".json":
        return read_all(_load(path))
    from ..engine.checkpoints.config import find_config

    source, config = find_config(model)
    file_here = Path(source) / "config.json"
    return read_all(_load(file_here) if file_here.is_file() else config.to_dict())


def _as_json(reading: EngineReading, first: EngineReading, tokens: int) -> dict[str, Any]:
    from ..scaling.engine_reading import same_frequencies

    frequencies = reading.frequencies(tokens)
    return {
        "engine": reading.engine,
        "computes": reading.label,
        "scaler": None if reading.scaler is None else str(reading.scaler),
        "serves": reading.max_length,
        "attention_factor": None if frequencies is None else frequencies.attention_factor,
        "differs": not (reading is first or not reading.is_read or same_frequencies(reading, first, tokens)),
        "notes": list(reading.notes),
    }


def _served(one: EngineReading) -> str:
    from ..scaling.lengths import format_length

    if one.scaler is None:
        return ""
    return format_length(one.max_length) if one.max_length else "any length"


def _load(path: Path) -> dict[str, object]:
    from ..errors import AssetError, DataError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror or error})") from error
    except ValueError as error:
        raise DataError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds no object, so it is no config")
    return content


def _print(readings: Sequence[EngineReading], tokens: int, console: Console) -> None:
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    from ..scaling.engine_reading import same_frequencies

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("engine", "computes", "m", "slowed by", "serves", ""):
        table.add_column(heading, no_wrap=heading in ("engine", "m", ""))
    first = readings[0]
    for one in readings:
        found = one.frequencies(tokens)
        m = slowed = ""
        if found is not None:
            m = f"{found.attention_factor:.4g}"
            slowed = f"{float(first.rope.theta[-1] / found.inv_freq[-1]):.4g}" if found.inv_freq[-1] else "still"
        same = one is first or not one.is_read or same_frequencies(one, first, tokens)
        table.add_row(
            one.engine,
            escape(one.label),
            m,
            slowed,
            _served(one),
            "" if same else "[bold red]differs[/]",
        )
    console.print(table)
    console.print("m multiplies cos and sin; slowed by: the slowest rotary pair against the plain one.", style="dim")
    for one in readings:
        for note in one.notes:
            console.print(f"[bold]{one.engine}[/] {escape(note)}", highlight=False)


@command(epilog=EXAMPLES + "  ropewalk fetch\n  ropewalk fetch gemma3-270m shakespeare")
@click.argument("names", nargs=-1)
@json_option("the path of each by its name; null for a large model that is not here")
def fetch(names: tuple[str, ...], as_json: bool) -> None:
    """Download built-in models and texts into the cache: NAMES, or all but the large models, which are named.

    Nothing is fetched twice.
    """
    from ..engine.checkpoints import assets

    for name in names:
        assets.check_name(name)
    paths = {}
    for name in names or assets.ASSETS:
        asset = assets.ASSETS[name]
        paths[name] = assets.cached(name) if asset.is_large and not names else assets.fetch(name)
        if not as_json:
            size = f"{asset.download_bytes / 1e6:.0f} MB"
            click.echo(f"{name:<18} {paths[name] or f'not here ({size}); ropewalk fetch {name}'}")
    if as_json:
        print_json(paths)
