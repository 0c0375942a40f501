"""What other packages add, by their entry points: named without loading anything, loaded when first asked for.

An entry point that cannot be used is refused in one sentence that names it and its package; everything else goes on.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from .errors import ConfigError

__all__ = ["Plugins"]

T = TypeVar("T")


class Plugins(Mapping[str, T], Generic[T]):
    """Built-in things by name, then those of other packages.

    Iteration gives all that can be used, and logs a warning for each that cannot.

    Args:
        built_in: their names cannot be taken.
        group: of the entry points, such as "ropewalk.scalers".
        kind: what one of them is called in messages.
        check: makes what is kept from the name and what the entry point leads to; raises ConfigError on what is wrong.
    """

    def __init__(self, built_in: dict[str, T], *, group: str, kind: str, check: Callable[[str, object], T]) -> None:
        self.built_in = built_in
        self._group = group
        self._kind = kind
        self._check = check
        self._loaded: dict[str, T] = {}

    @cached_property
    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name, in order."""
        found: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self._group), key=lambda point: point.name):
            found.setdefault(point.name, []).append(point)
        return found

    @property
    def names(self) -> list[str]:
        """All names, of what can be used and what cannot; nothing is loaded."""
        return [*self.built_in, *(name for name in self._entry_points if name not in self.built_in)]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._entry_points

    def __getitem__(self, name: str) -> T:
        """What `name` stands for.

        Raises:
            KeyError: nothing is called so.
            ConfigError: it is of another package, and cannot be used.
        """
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(*self._entry_points[name])
        return self._loaded[name]

    @cached_property
    def _usable(self) -> list[str]:
        """The names of all that can be used; the others are told of, once."""
        usable = [*self.built_in]
        for name, points in self._entry_points.items():
            try:
                if name in self.built_in:
                    raise self._refusal(points, "the name is that of a built-in one")
                self[name]
            except ConfigError as error:
                logging.getLogger(__name__).warning("%s", error)
            else:
                usable.append(name)
        return usable

    def __iter__(self) -> Iterator[str]:
        return iter(self._usable)

    def __len__(self) -> int:
        return len(self._usable)

    def _load(self, *points: EntryPoint) -> T:
        if len(points) > 1:
            raise self._refusal(points, "each of them has one of this name")
        try:
            return self._check(points[0].name, points[0].load())
        except (Exception, SystemExit) as error:  # whatever the module of another package does
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise self._refusal(points, reason) from error

    def _refusal(self, points: list[EntryPoint] | tuple[EntryPoint, ...], reason: str) -> ConfigError:
        packages = " and ".join(f"{point.dist.name} {point.dist.version}" for point in points if point.dist)
        return ConfigError(f"the {self._kind} {points[0].name!r} of {packages or 'a package'} cannot be used: {reason}")
