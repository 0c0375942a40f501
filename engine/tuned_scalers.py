"""What was tuned for a model, kept in the cache folder: a file for each model, an entry for each target."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
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


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """What is kept for one model.

    Attributes:
        identity: fingerprint of its checkpoint.
        model: its name when it was tuned.
        tunings: the smallest target first.
    """

    identity: str
    model: str
    tunings: tuple[TunedScaler, ...]


def read(identity: str) -> tuple[TunedScaler, ...]:
    """All that is kept for the model of that `identity`, the smallest target first.

    Raises:
        DataError: the file is damaged.
    """
    path = _path(identity)
    return _read_file(path).tunings if path.exists() else ()


def read_all() -> list[TunedModel]:
    """All that is kept, model by model.

    Raises:
        DataError: a file is damaged.
    """
    return sorted(map(_read_file, _folder().glob("*.json")), key=lambda model: (model.model, model.identity))


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
        with _lock(path):
            by_target = {entry.target: entry for entry in (*read(identity), tuning)}
            _write(path, model, by_target.values())
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def forget(model: TunedModel, target: int | None = None) -> list[TunedScaler]:
    """Drop what is kept for a model, for one target or for all; returns what was dropped.

    Raises:
        AssetError: the cache folder cannot be written.
    """
    path = _path(model.identity)
    try:
        with _lock(path):
            entries = read(model.identity)
            dropped = [entry for entry in entries if target in (None, entry.target)]
            if len(dropped) == len(entries):
                path.unlink(missing_ok=True)
            elif dropped:
                _write(path, model.model, [entry for entry in entries if entry not in dropped])
    except OSError as error:
        raise _unwritable(path, error) from error
    return dropped


def _read_file(path: Path) -> TunedModel:
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != _FORMAT:
            raise ValueError(f"it is a {content['format']!r}, and this version reads {_FORMAT!r}")
        entries = [TunedScaler.from_json(entry) for entry in content["tunings"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as what was tuned for this model ({error}); delete it, and run `ropewalk tune` "
            "again"
        ) from error
    tunings = tuple(sorted(entries, key=lambda entry: entry.target))
    return TunedModel(identity=path.stem, model=str(content.get("model", path.stem)), tunings=tunings)


def _write(path: Path, model: str, tunings: Iterable[TunedScaler]) -> None:
    entries = [tuning.as_json() for tuning in sorted(tunings, key=lambda entry: entry.target)]
    content = {"format": _FORMAT, "model": model, "tunings": entries}
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _unwritable(path: Path, error: OSError) -> AssetError:
    return AssetError(
        f"cannot write to the cache folder {path.parent} ({error.strerror or error}); set ROPEWALK_CACHE to a "
        "folder that can be written"
    )


def _folder() -> Path:
    return cache_dir() / "tuned"


def _path(identity: str) -> Path:
    return _folder() / f"{identity}.json"
