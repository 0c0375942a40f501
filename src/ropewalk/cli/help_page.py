"""The help page of a command: its options below headings, in the same order for all, and examples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

EXAMPLES = "\b\nExamples:\n"
"""Heading of an epilog."""

_FIRST = ("rope", "ropes", "lengths", "length", "text")
_LOADING = (
    "endpoint",
    "served_as",
    "dtype",
    "kv_dtype",
    "precision",
    "offload",
    "device_map",
    "tp_plan",
    "compile",
    "max_length",
)
_HEADINGS: dict[str, tuple[str, ...]] = {
    "Answer": (
        "max_new_tokens",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "stop",
        "max_time",
        "logprobs",
        "continuation",
    ),
    "Contexts": ("over_contexts", "window", "pooling"),
    "Many prompts": ("prompts", "answers"),
    "Loading the model": _LOADING,
    "Results": ("out", "max_minutes", "dry_run", "as_json"),
}
"""Headings of a help page, and the options below each; all others come first, below "Options"."""

_UNDER = {name: heading for heading, names in _HEADINGS.items() for name in names}
_ORDER = [name for names in _HEADINGS.values() for name in names]


def place(parameter: click.Parameter) -> int:
    """Where an option is in the help of every command: what is measured, the command's own, how it runs, where
    results go."""
    name = parameter.name or ""
    if isinstance(parameter, click.Argument):
        return 0
    if name in _FIRST:
        return 1 + _FIRST.index(name)
    if name == "seed":
        return 101
    return 102 + _ORDER.index(name) if name in _ORDER else 100


class Command(click.Command):
    """A command whose help page has its options below headings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, those of each heading in a section of their own."""
        sections: dict[str, list[tuple[str, str]]] = {"Options": []}
        for parameter in self.get_params(ctx):
            if isinstance(parameter, click.Option) and (record := parameter.get_help_record(ctx)) is not None:
                sections.setdefault(_UNDER.get(parameter.name or "", "Options"), []).append(record)
        for heading, records in sections.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def command(name: str | None = None, **settings: Any) -> Callable[[Callable[..., None]], Command]:
    """`click.command` with headings."""
    return click.command(name, cls=Command, **settings)
