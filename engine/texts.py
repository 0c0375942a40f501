"""The one reader of a user's text: `--text`, standard input, `--file` and `--contexts` all come through here."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..tokenizer_tools.characters import split_character
from .text_formats import COMPRESSED_SUFFIXES, PARQUET, decode, decompress

__all__ = ["RECORD_SUFFIXES", "read_documents", "read_prompt"]

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Of files that hold nothing but records."""

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_documents(file: Path) -> tuple[str, ...]:
    """The documents of a file: one, or one for each JSON record or Parquet row, of its field `text`.

    A byte order mark is dropped and decides between UTF-8, UTF-16 and UTF-32; without one the text is UTF-8. Line ends
    become "\\n". gzip, bzip2 and xz are decompressed. Records are read from a file named .jsonl, .ndjson or .json
    (.json may be one array, too), and from any other whose first line is a JSON object with a `text`. Parquet needs
    the package pyarrow.

    Raises:
        DataError: another format, which is named; no UTF-8; records without `text`.
        OSError: it cannot be read.
    """
    raw, name = decompress(file.read_bytes(), str(file))
    if PARQUET.match(raw):
        return tuple(map(_with_line_feeds, _parquet(raw, name)))
    text = decode(raw, name)
    stem = file.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        stem = stem.removesuffix(suffix)
    if stem.endswith(_JSON_SUFFIXES) or _begins_with_a_record(text):
        return tuple(map(_with_line_feeds, _records(text, name)))
    return (_with_line_feeds(text),)


def read_prompt(raw: bytes, name: str) -> str | bytes:
    """The text of a prompt, by the same rules, but never as records.

    Args:
        name: for messages.

    Returns:
        UTF-8 bytes where it ends inside a character, which the model can complete.

    Raises:
        DataError: another format, which is named; no UTF-8.
    """
    raw, name = decompress(raw, name)
    try:
        whole, partial = split_character(raw)
    except UnicodeDecodeError:
        whole, partial = raw, b""
    text = _with_line_feeds(decode(whole, name))
    return text.encode() + partial if partial else text


def _with_line_feeds(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _begins_with_a_record(text: str) -> bool:
    if not text.startswith("{"):
        return False
    try:
        first = json.loads(text.partition("\n")[0])
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and isinstance(first.get("text"), str)


def _records(text: str, name: str) -> list[str]:
    """Texts of JSON lines, or of one JSON array."""
    if text.lstrip().startswith("["):
        records = _json(text, name)
        return [_field(record, f"{name}, record {n}") for n, record in enumerate(records, 1)]
    lines = [(f"{name}, line {n}", line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_field(_json(line, where), where) for where, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where} is no JSON ({first_line(error)}); records are a JSON object a line, or one array of objects, "
            "each with a `text`. To measure on what the file holds as it is, give it a name in .txt"
        ) from None


def _field(record: Any, where: str) -> str:
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        has = _fields(record) if isinstance(record, dict) else f"it is {type(record).__name__}"
        raise DataError(
            f"{where} has no field `text` that is a string ({has}); rename the field that holds the text. To measure "
            "on the JSON itself, give the file a name in .txt"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: its text holds half a surrogate pair at character {error.start}") from None
    return text


def _fields(names: Iterable[str]) -> str:
    listed = sorted(names)
    return f"it has {', '.join(listed[:8])}{', ...' if len(listed) > 8 else ''}" if listed else "it is empty"


def _parquet(raw: bytes, name: str) -> list[str]:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise DataError(
            f"{name} is a Parquet file; `pip install pyarrow` and its column `text` is read, or export it as JSON "
            'lines, one {"text": ...} a line'
        ) from None
    try:
        file = parquet.ParquetFile(io.BytesIO(raw))
        if "text" not in file.schema_arrow.names:
            raise DataError(f"{name} has no column `text` ({_fields(file.schema_arrow.names)}); rename the one with it")
        texts: list[Any] = file.read(columns=["text"]).column("text").to_pylist()
    except (OSError, ValueError) as error:  # ArrowInvalid is a ValueError
        raise DataError(f"{name} is a Parquet file, but damaged ({first_line(error)}); copy it anew") from None
    return [_field({"text": text}, f"{name}, row {n}") for n, text in enumerate(texts, 1)]
