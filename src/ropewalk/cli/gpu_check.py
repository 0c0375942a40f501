"""`ropewalk gpu-check`: is the engine right on this GPU, and how fast is it?"""

from __future__ import annotations

from typing import Any

import click

from ..errors import ConfigError
from .help_page import EXAMPLES, command
from .messages import print_json
from .options import Minutes, json_option, lengths_option


@command(
    name="gpu-check", epilog=EXAMPLES + "  ropewalk gpu-check\n  ropewalk gpu-check --minutes 3 --geometry llama-3.2-1b"
)
@click.option("--minutes", default=8.0, show_default=True, type=Minutes(), help="The check stops after them.")
@click.option(
    "--geometry",
    default="llama-3-8b",
    show_default=True,
    help="Sizes of the model whose speed is measured, with random weights: llama-3-8b, llama-3.2-1b or tiny.",
)
@lengths_option("4k,32k,128k", "of a context")
@click.option(
    "--device",
    default="cuda",
    show_default=True,
    type=click.Choice(["cuda", "cpu"]),
    help="cpu tries the check itself.",
)
@json_option("the machine, and a list of rows with what was measured")
def gpu_check(minutes: float, geometry: str, lengths: str, device: str, as_json: bool) -> None:
    """Is the engine right on this GPU, and how fast is it beside transformers and beside what its memory allows?

    It compares small models of every family under every kind of scaler with the same models in float64 on the CPU.
    Then it measures reading and decoding by a model of the given sizes. Exit code 1: something is wrong.
    """
    import torch
    from rich.console import Console

    from ..evals.runs.result import environment
    from ..evals.speed.gpu_check import GpuCheck, tables
    from ..scaling.lengths import parse_length

    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "torch sees no GPU here; install torch's build for CUDA, or try the check itself: --device cpu"
        )
    console = Console(stderr=as_json)

    def report(row: dict[str, Any]) -> None:
        console.print("  ".join(f"{key} {_shown(value)}" for key, value in row.items()), markup=False, highlight=False)

    contexts = sorted(parse_length(length) for length in lengths.split(","))
    check = GpuCheck(device, geometry, contexts, 60 * minutes, report)
    check.run()
    for table in tables(check):
        console.print(table)
    for row in check.failures:
        console.print(f"wrong: {row}", markup=False)
    if as_json:
        print_json({"machine": environment(), "rows": check.rows})
    if check.failures:
        raise SystemExit(1)


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
