"""`ropewalk speed` and `memory`: what position maps cost, how fast other engines are, and peak memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from .help_page import EXAMPLES, command
from .messages import print_json
from .options import chosen_rope, is_given, json_option, lengths_option, rope_option, ropes_option, text_option
from .waiting import load_model

if TYPE_CHECKING:
    from rich.console import Console

_OF_MAPS = {"ropes": "--rope", "decode": "--decode", "public_form": "--public-form"}
_OF_PEERS = {"new_tokens": "--new-tokens", "prefill_repeats": "--prefill-repeats", "threads": "--threads"}


@command(
    epilog=EXAMPLES + "  ropewalk speed smollm2-135m\n"
    "  ropewalk speed my-model-q4_k_m.gguf --against llama.cpp --lengths 1k\n"
    '  ropewalk speed ./my-model --rope "rerope:2k|logn" --lengths 4k,8k --public-form\n'
    "  ropewalk speed smollm2-135m --against hf,llama.cpp\n"
    "  ropewalk speed ./my-model --against hf:bfloat16,llama.cpp:q8_0 --lengths 1k --dtype bfloat16"
)
@click.argument("model")
@click.option(
    "--against",
    help="Compare with hf (transformers) and llama.cpp, separated by commas; hf:float32, llama.cpp:f16 name a dtype.",
)
@lengths_option(None, "of a context", note="  [default: 4k,8k; with --against 512,4k,8k]")
@click.option(
    "--repeats",
    default=5,
    show_default=True,
    type=click.IntRange(min=1),
    help="Rounds; each times everything once.",
)
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="Number format of the weights: auto, float32, bfloat16, float16 or int8.",
)
@ropes_option(note=" It has a position map.  [default: ReRoPE and Self-Extend at L/4, dual chunk]")
@click.option("--decode/--no-decode", default=True, show_default=True, help="Also time a decode step of the model.")
@click.option(
    "--public-form", is_flag=True, help="Also time full n x n attention, as public code computes it; needs much memory."
)
@click.option(
    "--new-tokens",
    default=32,
    show_default=True,
    type=click.IntRange(min=1),
    help="--against: tokens decoded in a round.",
)
@click.option(
    "--prefill-repeats", default=2, show_default=True, type=click.IntRange(min=1), help="--against: rounds of prefill."
)
@click.option(
    "--threads", type=click.IntRange(min=1), help="--against: threads of every engine.  [default: torch's own number]"
)
@json_option("costs; with --against timings and agreements; versions, threads")
def speed(
    model: str,
    against: str | None,
    lengths: str | None,
    repeats: int,
    dtype: str,
    ropes: tuple[str, ...],
    decode: bool,
    public_form: bool,
    new_tokens: int,
    prefill_repeats: int,
    threads: int | None,
    as_json: bool,
) -> None:
    """What a position map costs on this machine; with --against, how fast other engines run the same model.

    Without --against: the prefill attention of every --rope, and a decode step, against those without it.

    With --against: decode and prefill speed of the plain MODEL in ropewalk and in the other engines, each in a
    process of its own; what share of the memory's bandwidth a decode step makes use of; whether the next tokens are
    the same; and peak memory. If MODEL is a .gguf file or built in, llama.cpp runs the same file, unless --dtype is
    given. Else it gets MODEL as bf16 and q8_0, written once into the cache.

    Every round times everything, and ratios compare runs of one round.
    """
    from rich.console import Console

    _refuse_unused(against)
    console = Console(stderr=as_json)
    if against is None:
        found = _maps(model, ropes, lengths or "4k,8k", repeats, decode, public_form, dtype, console)
    else:
        lengths = lengths or "512,4k,8k"
        found = _peers(model, against, lengths, repeats, prefill_repeats, new_tokens, dtype, threads, console)
    if as_json:
        print_json(found)


def _refuse_unused(against: str | None) -> None:
    """An option of the other measurement, given by the user, is a mistake."""
    for parameter, option in (_OF_PEERS if against is None else _OF_MAPS).items():
        if is_given(parameter):
            if against is None:
                raise click.UsageError(f"{option} needs --against, such as --against hf,llama.cpp")
            raise click.UsageError(f"--against measures the plain model; leave out {option}")


def _maps(
    model: str,
    ropes: tuple[str, ...],
    lengths: str,
    repeats: int,
    decode: bool,
    public_form: bool,
    dtype: str,
    console: Console,
) -> dict[str, Any]:
    import torch
    from rich.progress import Progress
    from rich.table import Table

    from ..evals.speed.map_cost import as_json, attention_costs, check_maps, decode_costs
    from ..scaling import DualChunk, ReRoPE, Scaler, SelfExtend, parse, parse_length

    loaded = load_model(model, dtype=dtype)
    quarter = loaded.trained_length // 4
    usual: list[Scaler] = [ReRoPE(window=quarter), SelfExtend(group=8, window=quarter), DualChunk()]
    scalers = [parse(rope, loaded.trained_length) for rope in ropes] or usual
    check_maps(scalers)
    contexts = [parse_length(length, loaded.trained_length) for length in lengths.split(",")]
    with Progress(console=console, transient=True) as progress, torch.inference_mode():
        costs = list(attention_costs(loaded, scalers, contexts, repeats=repeats, naive=public_form, progress=progress))
        if decode:
            costs += decode_costs(loaded, scalers, contexts, repeats=repeats, progress=progress)
    table = Table("what", "scaler", "context", "median", "ratio (least, most)")
    for cost in costs:
        middle = sorted(cost.seconds)[len(cost.seconds) // 2]
        ratio = f"{cost.ratio:.2f} ({cost.lowest:.2f}, {cost.highest:.2f})"
        table.add_row(cost.what, cost.scaler, str(cost.length), f"{1000 * middle:.1f} ms", ratio)
    console.print(f"run by {loaded.run_by}", markup=False)
    console.print(table)
    return as_json(costs) | {"network": loaded.run_by}


def _peers(
    model: str,
    against: str,
    lengths: str,
    repeats: int,
    prefill_repeats: int,
    new_tokens: int,
    dtype: str,
    threads: int | None,
    console: Console,
) -> dict[str, Any]:
    from ..evals.speed.against import measure
    from ..evals.speed.timing import as_json, tables

    result, about = measure(
        model,
        against,
        lengths=lengths.split(","),
        repeats=repeats,
        prefill_repeats=prefill_repeats,
        new_tokens=new_tokens,
        dtype=dtype,
        threads=threads,
        console=console,
    )
    built = {"network": "ropewalk", "llama.cpp": "llama.cpp"}
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items() if name not in built)
    console.print(f"{about['cpu']}, {about['threads']} threads; memory gives {result.bandwidth / 1e9:.1f} GB/s")
    console.print(versions)
    for name, engine in built.items():
        if name in about["versions"]:
            console.print(f"{engine}: {about['versions'][name]}", markup=False)
    for table in tables(result, result.timings[0].engine):
        console.print(table)
    return as_json(result, about)


@command(
    epilog=EXAMPLES + "  ropewalk memory smollm2-135m --lengths 16k --against-hf\n"
    "  ropewalk memory ./my-model --rope yarn:4 --lengths 8k,32k --dtype float32"
)
@click.argument("model")
@rope_option(note=" transformers runs none.")
@lengths_option("8k,32k", "of the text")
@text_option("kjv")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16", "auto"]),
    metavar="TEXT",
    default="bfloat16",
    show_default=True,
    help="Number format of the weights: float32, bfloat16, float16 or auto.",
)
@click.option("--against-hf", is_flag=True, help="Measure transformers too.")
@json_option("a list of measurements: engine, length, peak and its parts in MB, seconds, loss")
def memory(model: str, rope: str, lengths: str, text: str, dtype: str, against_hf: bool, as_json: bool) -> None:
    """Peak memory of reading a long text, in a new process for each length.

    The last 1024 tokens are scored.
    """
    from dataclasses import asdict

    from ..engine.checkpoints.checkpoint import read_tokenizer
    from ..engine.checkpoints.config import trained_length
    from ..engine.checkpoints.source import resolve
    from ..errors import DataError
    from ..evals.data import load_text, tokenize_documents
    from ..evals.speed.memory import SCORED_TOKENS, measure_footprint
    from ..scaling.lengths import format_length, parse_length
    from ..scaling.spec import parse

    contexts = [parse_length(length) for length in lengths.split(",")]
    if min(contexts) <= SCORED_TOKENS:
        raise click.UsageError(
            f"--lengths {lengths}: each must be more than the {SCORED_TOKENS} tokens that are scored"
        )
    rope = chosen_rope(model, rope)
    parse(rope, lambda: trained_length(model))  # a wrong one is refused before the text is read
    ids = tokenize_documents(load_text(text), read_tokenizer(resolve(model)), limit_tokens=max(contexts))[0]
    if len(ids) < max(contexts):
        raise DataError(f"{text} holds {len(ids)} tokens, and --lengths asks for {max(contexts)}")
    footprints = []
    for length in contexts:
        for engine in ("ropewalk", "transformers") if against_hf else ("ropewalk",):
            footprint = measure_footprint(engine, model, ids[:length], dtype, rope)
            footprints.append(asdict(footprint) | {"rest": footprint.rest})
            click.echo(
                f"{format_length(length):>5}  {footprint.engine:<44} peak {footprint.peak:7.0f} MB = weights "
                f"{footprint.weights:.0f} + cache {footprint.cache:.0f} + {footprint.rest:.0f} (libraries "
                f"{footprint.imports:.0f}; {footprint.loaded:.0f} once loaded)  {footprint.seconds:.0f} s  "
                f"loss {footprint.loss:.4f}",
                err=as_json,
            )
    if as_json:
        print_json(footprints)
