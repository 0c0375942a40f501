"""Where a measured model runs: here, or at a server; the options that say so."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from ...engine.commands.options import loads_a_model
from ...errors import ConfigError

if TYPE_CHECKING:
    from .subject import Subject

_OPTIONS = (
    click.option(
        "--endpoint",
        metavar="URL",
        help="Measure MODEL where it is served, at an OpenAI-compatible server (http://localhost:8000/v1); MODEL then "
        "names its tokenizer and config.",
    ),
    click.option(
        "--served-as", metavar="NAME", help="With --endpoint: the model's name there, where several are served."
    ),
)


@dataclass(frozen=True, kw_only=True)
class ModelTarget:
    """What the options say.

    Args:
        endpoint: address of a server; None is here.
        served_as: the model's name there.
        loading: keywords for `load`.
    """

    endpoint: str | None
    served_as: str | None
    loading: dict[str, Any]

    def open(self, model: str) -> Subject:
        """The model, loaded here or found at its server; what was found there is told on the screen.

        Raises:
            AssetError: there is no such model.
            ConfigError: an option has no effect here.
            EndpointError: the server cannot be used.
        """
        if self.endpoint is None:
            from ...engine.load import load
            from .local import Local

            if self.served_as is not None:
                raise ConfigError("--served-as has no effect without --endpoint; leave it out")
            return Local(load(model, **self.loading, max_length=2**31))  # past a scaler's reach is what is looked at
        from ..runs.runner import new_console
        from .endpoint import Endpoint

        if given := [name.replace("_", "-") for name, value in self.loading.items() if value not in ("auto", None)]:
            raise ConfigError(f"--{given[0]} has no effect on a model that is served; leave it out, or --endpoint")
        found = Endpoint(model, self.endpoint, self.served_as)
        new_console().print(found.describe(), highlight=False, markup=False)
        return found


def runs_anywhere(command: Callable[..., None]) -> Callable[..., None]:
    """Add --endpoint, --served-as and the options of loading; the command gets them as `where`, a `ModelTarget`."""

    @functools.wraps(command)
    def wrapped(*, endpoint: str | None, served_as: str | None, loading: dict[str, Any], **rest: Any) -> None:
        command(where=ModelTarget(endpoint=endpoint, served_as=served_as, loading=loading), **rest)

    found = loads_a_model(wrapped)
    for option in reversed(_OPTIONS):
        found = option(found)
    return found
