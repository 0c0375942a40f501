"""The command `ropewalk export`: a model under a scaler, for the software that serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..commands.options import EXAMPLES
from .launch import TARGETS


@click.command(
    epilog=EXAMPLES + '  ropewalk export smollm2-135m out --rope "ntk-mixed:4"\n'
    "  ropewalk export ./my-model served --rope yarn:4 --target vllm\n"
    "  ropewalk export ./my-model long.gguf --rope ntk:4 --target llama.cpp --dtype q8_0\n"
    "  ropewalk export my-model-q4_k_m.gguf long-q4_k_m.gguf --rope yarn:4 --target llama.cpp\n"
    "  ropewalk export ./my-model still --rope dynamic-yarn --length 32k"
)
@click.argument("model")
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rope", default="none", show_default=True, help="Scaler; one that acts on the frequencies alone.")
@click.option(
    "--target",
    default="hf",
    show_default=True,
    type=click.Choice(TARGETS),
    help="What will run it; hf is transformers.",
)
@click.option("--length", help="Tokens to be served, such as 32k or 4x.  [default: the scaler's reach]")
@click.option("--dtype", help="Of a GGUF file's matrices: f32, bf16, f16 or q8_0.  [default: bf16]")
def export(model: str, out: Path, rope: str, target: Any, length: str | None, dtype: str | None) -> None:
    """Write MODEL to OUT so that other software runs it under a scaler, unchanged.

    OUT is a new folder; for llama.cpp it is a new file. Weights and tokenizer are copied as they are, also the
    quantized weights of a .gguf file; only a checkpoint that becomes a GGUF file is written in another form.

    The frequencies are written in the simplest way that the target reads exactly: a base, a method of its own, or one
    factor for every rotary pair. Position maps and temperatures of queries cannot be written, and are refused with what
    comes nearest. A scaler that follows the length is held still at --length.
    """
    from ...scaling.lengths import format_length
    from .export import export as export_

    done = export_(model, out, rope=rope, target=target, length=length, dtype=dtype)
    click.echo(f"{done.path}: {done.scaler} up to {format_length(done.length)} tokens, as {done.carrier}")
    if done.command:
        click.echo(f"serve it by: {done.command}")
