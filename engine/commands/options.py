"""What commands share: the options of those that load a model, and the heading of examples."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click

EXAMPLES = "\b\nExamples:\n"
"""Heading of an epilog."""

_OPTIONS = (
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="auto, float32, bfloat16, float16, or int8 (weights in 255 steps, made from the model's own).",
    ),
    click.option(
        "--kv-dtype", default="auto", show_default=True, help="Of keys and values: auto, float32, bfloat16 or int8."
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
    click.option("--compile/--no-compile", default=None, help="Insist on the compiled kernels, or do without."),
)


def loads_a_model(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options; the command gets them as `loading`, keywords for `load`."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        loading = {name: kwargs.pop(name) for name in ("dtype", "kv_dtype", "offload", "device_map", "tp_plan")}
        chosen = kwargs.pop("compile")
        loading["compile"] = "auto" if chosen is None else chosen
        command(*args, loading=loading, **kwargs)

    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
