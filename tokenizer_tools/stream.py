"""Text out of a token stream: only whole characters, each exactly once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Decoder(Protocol):
    """The one method of a tokenizer that streaming needs."""

    def decode(self, token_ids: list[int], **kwargs: bool) -> str:
        """Text of `token_ids`."""


class TextStream:
    """Turns tokens into text as they come.

    Tokens are decoded together with the few before them, since SentencePiece drops the space of a first token
    and one character may be spread over several; text that ends in half a character waits for the rest.
    """

    def __init__(self, tokenizer: Decoder, prompt: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt[-8:])
        self._shown = 0  # ids before this are in the text handed out already
        self._read = len(self._ids)

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(
            self._ids[start:stop], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )

    def push(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        self._ids.append(token)
        before, now = self._decode(self._shown, self._read), self._decode(self._shown, len(self._ids))
        if now.endswith(REPLACEMENT):
            return ""
        self._shown, self._read = self._read, len(self._ids)
        return now[len(before) :]

    def finish(self) -> str:
        """What is still held back, half characters as U+FFFD."""
        before, now = self._decode(self._shown, self._read), self._decode(self._shown, len(self._ids))
        self._shown = self._read = len(self._ids)
        return now[len(before) :]


class StopWatch:
    """Holds back text that may be the beginning of a stop string, and cuts at the first one complete."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """The part of the text so far that is safe to show."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)], ""
            return shown
        keep = max(
            (n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """The text held back, once no more can come."""
        shown, self._held = self._held, ""
        return shown
