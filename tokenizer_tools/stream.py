"""Text out of a token stream: whole characters, each once, up to a stop string (`StopStringMatcher`)."""

from __future__ import annotations

from .characters import unfinished
from .vocabulary import Vocabulary


class TextStream:
    """Turns tokens into text as they come; a character waits until its last byte is there.

    Args:
        vocabulary: of the tokenizer.
        pending: the bytes of half a character that the prompt ends in; the stream gives it whole.
        starts_text: True if no text comes before the first token: the space that some tokenizers put in front of a
            text is then left out.

    Attributes:
        unfinished: the bytes that wait for the rest of their character, those of `pending` included.
    """

    def __init__(self, vocabulary: Vocabulary, *, pending: bytes = b"", starts_text: bool = False) -> None:
        self._vocabulary = vocabulary
        self.unfinished = pending
        self._parts: list[bytes] = []
        self._drops_space = starts_text and vocabulary.adds_space

    def push(self, token: int, skip: int = 0) -> str:
        """The text that `token` completes, without its first `skip` bytes; empty while a character is unfinished."""
        data = self._vocabulary.tokens[token][skip:] if token < len(self._vocabulary.tokens) else b""
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        self._parts.append(data)
        every = self.unfinished + data
        self.unfinished = unfinished(every)
        return every[: len(every) - len(self.unfinished)].decode(errors="replace")

    @property
    def data(self) -> bytes:
        """The bytes of all tokens so far, without `pending`."""
        return b"".join(self._parts)

    def finish(self) -> str:
        """What is still held back, where nothing can come any more: half a character as U+FFFD."""
        shown, self.unfinished = self.unfinished.decode(errors="replace"), b""
        return shown


class StopStringMatcher:
    """Holds back text that may be the beginning of a stop string, and cuts at the first one complete."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""  # what may be the beginning of a stop string
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

    @property
    def hides_text(self) -> bool:
        """True if some of the text was not shown, or not yet."""
        return self.stopped or bool(self._held)

    def finish(self) -> str:
        """The text held back, once no more can come."""
        shown, self._held = self._held, ""
        return shown
