"""Reading a user's text from a file or standard input: encodings, compression, and formats that are not text."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..errors import DataError, first_line
from ..tokenizer_tools.characters import split_character

__all__ = ["COMPRESSED_SUFFIXES", "RECORD_SUFFIXES", "read_documents", "read_prompt"]

RECORD_SUFFIXES = (".jsonl", ".ndjson", ".parquet")
"""Endings of files that hold only records."""

_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz")
"""Endings of compressed files that are read."""

_COMPRESSED: tuple[tuple[str, re.Pattern[bytes], Callable[[bytes], bytes]], ...] = (
    ("gzip", re.compile(rb"\x1f\x8b"), gzip.decompress),
    ("bzip2", re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"), bz2.decompress),
    ("xz", re.compile(rb"\xfd7zXZ\0"), lzma.decompress),
)

_MARKS = (  # UTF-32 first: its little-endian mark begins with that of UTF-16
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)

_PARQUET = re.compile(rb"PAR1(?s:.*)(?:\0|PAR1\Z)")
"""A Parquet file. A text may begin with the same letters."""

_UNPACK = "unpack it, and give the text files in it"
_CONVERT = "save its text as a UTF-8 file first"
_OTHER_FORMATS: tuple[tuple[str, re.Pattern[bytes], str], ...] = (
    ("zstd-compressed", re.compile(rb"\x28\xb5\x2f\xfd"), "decompress it first, with `zstd -d`"),
    ("lz4-compressed", re.compile(rb"\x04\x22\x4d\x18"), "decompress it first, with `lz4 -d`"),
    ("compressed by `compress`", re.compile(rb"\x1f\x9d"), "decompress it first, with `gzip -d`"),
    ("a zip archive (as docx, epub and npz files are)", re.compile(rb"PK(?:\x03\x04|\x05\x06|\x07\x08)"), _UNPACK),
    ("a 7z archive", re.compile(rb"7z\xbc\xaf\x27\x1c"), _UNPACK),
    ("a rar archive", re.compile(rb"Rar!\x1a\x07"), _UNPACK),
    ("a tar archive", re.compile(rb"(?s:.{257})ustar[\0 ]"), _UNPACK),
    ("a PDF", re.compile(rb"%PDF-"), "extract its text first, with `pdftotext`"),
    ("an RTF document", re.compile(rb"\{\\rtf"), _CONVERT),
    ("an Office document", re.compile(rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"), _CONVERT),
    ("an Arrow file", re.compile(rb"ARROW1\0|\xff\xff\xff\xff(?s:.{3})\0"), "export its texts as JSON lines (.jsonl)"),
    ("an Avro file", re.compile(rb"Obj\x01"), "export its texts as JSON lines (.jsonl)"),
    ("an SQLite database", re.compile(rb"SQLite format 3\0"), "export its texts as JSON lines (.jsonl)"),
    ("an HDF5 file", re.compile(rb"\x89HDF\r\n"), "export its texts as JSON lines (.jsonl)"),
    ("a GGUF model", re.compile(rb"GGUF(?s:.{0,20}\0)"), "give a text, not a model"),
    ("an image", re.compile(rb"\x89PNG\r\n|\xff\xd8\xff|GIF8[79]a|RIFF(?s:.{4})WEBP"), _CONVERT),
)


def read_documents(file: Path) -> tuple[str, ...]:
    """The documents of a file: its text, or the field `text` of every JSON record or Parquet row.

    A byte order mark is dropped and decides between UTF-8, UTF-16 and UTF-32. Without one the text is UTF-8. Line ends
    become "\\n". gzip, bzip2 and xz are decompressed. Records are read from a file named .jsonl, .ndjson or .json
    (.json may be one array, too), and from any other file whose first line is a JSON object with a `text`. Parquet
    needs the package pyarrow.

    Raises:
        DataError: it has another format, which the message names, or is not UTF-8, or has records without `text`.
        OSError: it cannot be read.
    """
    raw, name = _decompress(file.read_bytes(), str(file))
    if _PARQUET.match(raw):
        return tuple(map(_with_line_feeds, _parquet(raw, name)))
    text = _decode(raw, name)
    stem = file.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        stem = stem.removesuffix(suffix)
    if stem.endswith(_JSON_SUFFIXES) or _begins_with_a_record(text):
        return tuple(map(_with_line_feeds, _records(text, name)))
    return (_with_line_feeds(text),)


def read_prompt(raw: bytes, name: str) -> str | bytes:
    """The text of a prompt, read by the same rules, but without records.

    Args:
        name: of the source, for messages.

    Returns:
        The text. UTF-8 bytes if it ends inside a character, which the model can complete.

    Raises:
        DataError: it has another format, which the message names, or is not UTF-8.
    """
    raw, name = _decompress(raw, name)
    try:
        whole, partial = split_character(raw)
    except UnicodeDecodeError:
        whole, partial = raw, b""
    text = _with_line_feeds(_decode(whole, name))
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
    """The texts of JSON lines, or of one JSON array."""
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
            f"{where} is not JSON ({first_line(error)}); records are a JSON object a line, or one array of objects, "
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
        raise DataError(f"{name} is a Parquet file, but damaged ({first_line(error)}); copy it again") from None
    return [_field({"text": text}, f"{name}, row {n}") for n, text in enumerate(texts, 1)]


def _decompress(raw: bytes, name: str) -> tuple[bytes, str]:
    """The decompressed data, and the name for messages about them. Other data are returned as they are.

    Raises:
        DataError: the data are damaged or cut off.
    """
    for what, magic, unpack in _COMPRESSED:
        if magic.match(raw):
            try:
                return unpack(raw), f"{name} (decompressed)"
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise DataError(
                    f"{name} is {what}-compressed, and damaged or cut off ({first_line(error)}); copy it again"
                ) from None
    return raw, name


def _decode(raw: bytes, name: str) -> str:
    """Decode a text in the encoding of its byte order mark, which is dropped, or in UTF-8.

    Args:
        name: of the file, for messages.

    Raises:
        DataError: it has another format, which the message names, or another encoding, or NUL bytes.
    """
    for format_name, magic, advice in _OTHER_FORMATS:
        if magic.match(raw):
            raise DataError(f"{name} is {format_name}, not text; {advice}")
    if _PARQUET.match(raw):
        raise DataError(f"{name} is a Parquet file, not text; name the file, and its column `text` is read")
    mark, encoding = next((pair for pair in _MARKS if raw.startswith(pair[0])), (b"", "utf-8"))
    body = raw[len(mark) :]
    if encoding == "utf-8" and b"\0" in body:
        raise DataError(f"{name} {_explain_nul(body)}")
    try:
        return body.decode(encoding)
    except UnicodeDecodeError as error:
        offset = error.start + len(mark)
        where = f"byte 0x{raw[offset]:02x} at offset {offset}"
        if encoding != "utf-8":
            raise DataError(
                f"{name} has the byte order mark of {encoding.upper()}, but is not: {where}; it is damaged or cut off"
            ) from None
        raise DataError(f"{name} is not UTF-8: {where}; {_advice(body)}") from None


def _explain_nul(body: bytes) -> str:
    even, odd = body[::2].count(0), body[1::2].count(0)
    if max(even, odd) > len(body) // 8 and min(even, odd) < max(even, odd) // 8:
        encoding = "UTF-16LE" if odd > even else "UTF-16BE"
        return (
            f"is not UTF-8: it has NUL bytes at every other place, as {encoding} without a byte order mark has; "
            f"convert it first, with `iconv -f {encoding} -t UTF-8`"
        )
    return f"holds a NUL byte at offset {body.index(0)}, so it is not a text, or not in UTF-8; {_CONVERT}"


def _advice(body: bytes) -> str:
    if re.search(rb"[\x01-\x08\x0e-\x1a\x1c-\x1f]", body):
        return "it has control characters, so it is binary data, or UTF-16 without a byte order mark; " + _CONVERT
    return (
        "find out its encoding (`file -i` guesses), convert it with `iconv -f ENCODING -t UTF-8`, and look at the "
        "result: a wrong ENCODING often gives a text too"
    )
