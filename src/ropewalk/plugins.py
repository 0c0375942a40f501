"""Scalers and tasks that other packages add by entry points.

Their names are known without an import; an entry point is loaded at its first use. One that cannot be used
raises one sentence with its name and its package, and the others still work.
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
    """Built-in objects by name, then those of other packages.

    Iteration yields the names that can be used, and logs a warning for each that cannot.

    Args:
        built_in: the objects of ropewalk. No other package can take their names.
        group: group of the entry points, such as "ropewalk.scalers".
        kind: what messages call such an object.
        check: gets the name and the loaded object, and returns the object to store. It raises ConfigError if the
            object is not valid.
    """

    def __init__(self, built_in: dict[str, T], *, group: str, kind: str, check: Callable[[str, object], T]) -> None:
        self.built_in = built_in
        self._group = group
        self._kind = kind
        self._check = check
        self._loaded: dict[str, T] = {}

    @cached_property
    def _entry_points(self) -> dict[str, list[EntryPoint]]:
        """The entry points of each name, sorted by name."""
        by_name: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=self._group), key=lambda point: point.name):
            by_name.setdefault(point.name, []).append(point)
        return by_name

    @property
    def names(self) -> list[str]:
        """All names, also those that cannot be used. Nothing is loaded."""
        return [*self.built_in, *(name for name in self._entry_points if name not in self.built_in)]

    def __contains__(self, name: object) -> bool:
        return name in self.built_in or name in self._entry_points

    def __getitem__(self, name: str) -> T:
        """The object with this name.

        Raises:
            KeyError: no object has this name.
            ConfigError: the object is from another package and cannot be used.
        """
        if name in self.built_in:
            return self.built_in[name]
        if name not in self._loaded:
            self._loaded[name] = self._load(*self._entry_points[name])
        return self._loaded[name]

    @cached_property
    def _usable(self) -> list[str]:
        """The names that can be used. Each of the others is logged once."""
        usable = [*self.built_in]
        for name, points in self._entry_points.items():
            try:
                if name in self.built_in:
                    raise self._refusal(points, "a built-in one has this name")
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
            raise self._refusal(points, "each of these packages has one with this name")
        try:
            return self._check(points[0].name, points[0].load())
        except (Exception, SystemExit) as error:  # the module of another package can raise anything
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise self._refusal(points, reason) from error

    def _refusal(self, points: list[EntryPoint] | tuple[EntryPoint, ...], reason: str) -> ConfigError:
        packages = " and ".join(f"{point.dist.name} {point.dist.version}" for point in points if point.dist)
        return ConfigError(f"the {self._kind} {points[0].name!r} of {packages or 'a package'} cannot be used: {reason}")
