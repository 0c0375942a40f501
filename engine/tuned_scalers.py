"""Tuned scalers, stored in the cache folder: a file for each checkpoint, an entry for each target length."""

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
    """The result of one `tune`, as it is stored.

    Attributes:
        target: the length that was tuned for, tokens.
        winner, simplest: the best scaler, and the simplest whose loss does not differ significantly from its.
        servable: the best scaler that a config can hold, if there was one.
        loss: that of the winner, nats per token; None if it was only skimmed.
        text: name of the text that it was measured on.
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
        """Read an entry of a file.

        Raises:
            KeyError, TypeError, ValueError: it is not an entry.
        """
        if not (isinstance(entry["target"], int) and entry["target"] > 0):
            raise ValueError(f"target {entry['target']!r} is not a number of tokens")
        scalers = {name: parse(entry[name]) if entry[name] is not None else None for name in _SCALERS}
        if scalers["winner"] is None or scalers["simplest"] is None:
            raise ValueError("an entry has no winner")
        return cls(**{field.name: entry[field.name] for field in dataclasses.fields(cls)} | scalers)

    def as_json(self) -> dict[str, Any]:
        """The entry that `from_json` reads."""
        entry = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return entry | {name: str(entry[name]) for name in _SCALERS if entry[name] is not None}


_SCALERS = ("winner", "simplest", "servable")


@dataclass(frozen=True, kw_only=True)
class TunedModel:
    """The tuned scalers of one model.

    Attributes:
        fingerprint: that of its checkpoint (`ScaledModel.checkpoint_fingerprint`).
        model: its name when it was tuned.
        tunings: the smallest target first.
    """

    fingerprint: str
    model: str
    tunings: tuple[TunedScaler, ...]


def read(fingerprint: str) -> tuple[TunedScaler, ...]:
    """The tuned scalers of the checkpoint with that fingerprint, the smallest target first.

    Raises:
        DataError: the file is damaged.
    """
    path = _path(fingerprint)
    return _read_file(path).tunings if path.exists() else ()


def read_all() -> list[TunedModel]:
    """All tuned scalers, model by model.

    Raises:
        DataError: a file is damaged.
    """
    return sorted(map(_read_file, _folder().glob("*.json")), key=lambda model: (model.model, model.fingerprint))


def store(fingerprint: str, model: str, tuning: TunedScaler) -> Path:
    """Store a tuning in place of an earlier one for the same target. Returns the file.

    Args:
        model: the name of the model, for people who read the file.

    Raises:
        AssetError: the cache folder cannot be written.
        DataError: the existing file is damaged.
    """
    path = _path(fingerprint)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _lock(path):
            by_target = {entry.target: entry for entry in (*read(fingerprint), tuning)}
            _write(path, model, by_target.values())
    except OSError as error:
        raise _unwritable(path, error) from error
    return path


def forget(model: TunedModel, target: int | None = None) -> list[TunedScaler]:
    """Remove the tuned scalers of a model for one target or for all. Returns what was removed.

    Raises:
        AssetError: the cache folder cannot be written.
    """
    path = _path(model.fingerprint)
    try:
        with _lock(path):
            entries = read(model.fingerprint)
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
            f"{path} cannot be read as a file of tuned scalers ({error}); delete it, and run `ropewalk tune` again"
        ) from error
    tunings = tuple(sorted(entries, key=lambda entry: entry.target))
    return TunedModel(fingerprint=path.stem, model=str(content.get("model", path.stem)), tunings=tunings)


def _write(path: Path, model: str, tunings: Iterable[TunedScaler]) -> None:
    entries = [tuning.as_json() for tuning in sorted(tunings, key=lambda entry: entry.target)]
    content = {"format": _FORMAT, "model": model, "tunings": entries}
    write_atomic(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode(errors="backslashreplace"))


def _lock(path: Path) -> FileLock:
    return FileLock(path.with_name(f".{path.name}.lock"))


def _unwritable(path: Path, error: OSError) -> AssetError:
    return AssetError(
        f"cannot write to the cache folder {path.parent} ({error.strerror or error}); set ROPEWALK_CACHE to a "
        "folder that can be written"
    )


def _folder() -> Path:
    return cache_dir() / "tuned"


def _path(fingerprint: str) -> Path:
    return _folder() / f"{fingerprint}.json"
