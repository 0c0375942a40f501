"""What was tuned for a model, kept in the cache folder: a file for each model, an entry for each target."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import AssetError, DataError
from ..scaling.rope import Scaler
from ..scaling.spec import parse
from .storage import cache_dir, write_atomic

_FORMAT = "ropewalk tuned 1"


@dataclass(frozen=True, kw_only=True)
class TunedScaler:
    """The outcome of one `tune`, as it is kept.

    Attributes:
        target: tokens that were to be carried.
        winner, simplest: the best scaler, and the simplest that could not be told from it.
        servable: the best that a config can hold, if there was one.
        loss: of the winner, nats per token; None if it was only skimmed.
        text: what it was measured on.
        date: ISO 8601, UTC.
        ropewalk: the version that measured.
    """

    target: int
    winner: Scaler
    simplest: Scaler
    servable: Scaler | None
    loss: float | None
    text: str
    date: str
    ropewalk: str

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> TunedScaler:
        """Of an entry of a file; raises KeyError, TypeError or ValueError where it is none."""
        if not (isinstance(entry["target"], int) and entry["target"] > 0):
            raise ValueError(f"target {entry['target']!r} is no number of tokens")
        scalers = {name: parse(entry[name]) if entry[name] is not None else None for name in _SCALERS}
        if scalers["winner"] is None or scalers["simplest"] is None:
            raise ValueError("an entry without winner")
        return cls(**{field.name: entry[field.name] for field in dataclasses.fields(cls)} | scalers)

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        entry = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return entry | {name: str(entry[name]) for name in _SCALERS if entry[name] is not None}


_SCALERS = ("winner", "simplest", "servable")


def read(identity: str) -> tuple[TunedScaler, ...]:
    """All that is kept for the model of that `identity`, the smallest target first.

    Raises:
        DataError: the file is damaged.
    """
    path = _path(identity)
    try:
        found = json.loads(path.read_bytes())
        if found["format"] != _FORMAT:
            raise ValueError(f"it is a {found['format']!r}, and this version reads {_FORMAT!r}")
        tunings = [TunedScaler.from_json(entry) for entry in found["tunings"]]
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as what was tuned for this model ({error}); delete it, and run `ropewalk tune` "
            "again"
        ) from error
    return tuple(sorted(tunings, key=lambda one: one.target))


def store(identity: str, model: str, tuning: TunedScaler) -> Path:
    """Keep a tuning, in the place of an earlier one for the same target; returns the file.

    Args:
        model: its name, for those who look into the file.

    Raises:
        AssetError: the cache folder cannot be written.
        DataError: the file that is there is damaged.
    """
    path = _path(identity)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f".{path.name}.lock")):
            known = {one.target: one for one in (*read(identity), tuning)}
            entries = [known[target].as_json() for target in sorted(known)]
            found = {"format": _FORMAT, "model": model, "tunings": entries}
            write_atomic(path, (json.dumps(found, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise AssetError(
            f"cannot write to the cache folder {path.parent} ({error.strerror or error}); set ROPEWALK_CACHE to a "
            "folder that can be written"
        ) from error
    return path


def _path(identity: str) -> Path:
    return cache_dir() / "tuned" / f"{identity}.json"
