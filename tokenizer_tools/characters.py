"""UTF-8 that arrives token by token: it can end inside a character, or have bytes that are not UTF-8.

A text has whole characters, and U+FFFD for bytes that cannot become a character. The bytes of an unfinished character
at the end are not text yet, so they stay bytes.
"""

from __future__ import annotations

_LONGEST = 4  # bytes of the longest character


def finished_text(data: bytes) -> str:
    """The text of UTF-8 `data`, without an unfinished character at its end."""
    return data[: len(data) - len(unfinished(data))].decode(errors="replace")


def unfinished(data: bytes) -> bytes:
    """The bytes of an unfinished character at the end of `data`."""
    for count in range(1, _LONGEST):
        try:
            data[-count:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[-count:]
    return b""


def invalid_runs(data: bytes) -> list[tuple[int, int]]:
    """[start, stop) of each run of bytes in `data` that are not UTF-8, without an unfinished character at its end."""
    runs: list[tuple[int, int]] = []
    at = 0
    while True:
        try:
            data[at:].decode()
            return runs
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return runs
            start, at = at + error.start, at + error.end
            if runs and runs[-1][1] == start:
                start = runs.pop()[0]
            runs.append((start, at))


def first_characters(data: bytes, count: int) -> bytes:
    """The bytes of the first `count` characters of `finished_text(data)`. U+FFFD counts as one, for all its bytes."""
    at = 0
    while True:
        try:
            return data[: at + len(data[at:].decode()[:count].encode())]
        except UnicodeDecodeError as error:
            whole = data[at : at + error.start].decode()
            if len(whole) >= count or error.reason == "unexpected end of data":
                return data[: at + len(whole[:count].encode())]
            count, at = count - len(whole) - 1, at + error.end  # these bytes are one U+FFFD


def split_character(text: bytes) -> tuple[bytes, bytes]:
    """The whole characters of UTF-8 `text`, and the bytes of an unfinished character at its end.

    Raises:
        UnicodeDecodeError: it is not UTF-8 at another place.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise
        return text[: error.start], text[error.start :]
    return text, b""
