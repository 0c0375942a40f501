"""UTF-8 that a model writes token by token: it may end inside a character, or hold bytes that are none.

Text shows whole characters, and U+FFFD for bytes that can be no character any more. The bytes of a character that is
not finished are no text yet; they are kept as bytes.
"""

from __future__ import annotations

_LONGEST = 4  # bytes of a character


def shown(data: bytes) -> str:
    """The text of UTF-8 `data`, without the character that it ends inside."""
    return data[: len(data) - len(unfinished(data))].decode(errors="replace")


def unfinished(data: bytes) -> bytes:
    """The beginning of a character that `data` ends in."""
    for count in range(1, _LONGEST):
        try:
            data[-count:].decode()
        except UnicodeDecodeError as error:
            if error.start == 0 and error.reason == "unexpected end of data":
                return data[-count:]
    return b""


def broken(data: bytes) -> list[tuple[int, int]]:
    """Where `data` holds bytes that are no character: [start, stop) of each run, but for a beginning at its end."""
    found: list[tuple[int, int]] = []
    at = 0
    while True:
        try:
            data[at:].decode()
            return found
        except UnicodeDecodeError as error:
            if error.reason == "unexpected end of data":
                return found
            start, at = at + error.start, at + error.end
            if found and found[-1][1] == start:
                start = found.pop()[0]
            found.append((start, at))


def first_characters(data: bytes, count: int) -> bytes:
    """The bytes of the first `count` characters of `shown(data)`; U+FFFD counts as one, and stands for its bytes."""
    at = 0
    while True:
        try:
            return data[: at + len(data[at:].decode()[:count].encode())]
        except UnicodeDecodeError as error:
            whole = data[at : at + error.start].decode()
            if len(whole) >= count or error.reason == "unexpected end of data":
                return data[: at + len(whole[:count].encode())]
            count, at = count - len(whole) - 1, at + error.end  # one U+FFFD stands for these bytes


def split_character(text: bytes) -> tuple[bytes, bytes]:
    """The whole characters of UTF-8 `text`, and the beginning of a character that it ends in.

    Raises:
        UnicodeDecodeError: it is not UTF-8 elsewhere.
    """
    try:
        text.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":
            raise
        return text[: error.start], text[error.start :]
    return text, b""
