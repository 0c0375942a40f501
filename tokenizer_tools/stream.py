"""Text out of a token stream: only whole characters, each exactly once."""

from __future__ import annotations

import codecs

from .vocab import Vocabulary


class TextStream:
    """Turns tokens into text as they come; a character waits until its last byte is there.

    Args:
        vocabulary: of the tokenizer.
        pending: the bytes of half a character that the prompt ends in; the stream gives it whole.
        starts_text: True if no text comes before the first token: the space that some tokenizers put in front of a
            text is then left out.
    """

    def __init__(self, vocabulary: Vocabulary, *, pending: bytes = b"", starts_text: bool = False) -> None:
        self._vocabulary = vocabulary
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._decoder.decode(pending)
        self._drops_space = starts_text and vocabulary.puts_space_first

    def push(self, token: int, skip: int = 0) -> str:
        """The text that `token` completes, without its first `skip` bytes; empty while a character is unfinished."""
        data = self._vocabulary.tokens[token][skip:] if token < len(self._vocabulary.tokens) else b""
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        return self._decoder.decode(data)

    def finish(self) -> str:
        """What is still held back, half characters as U+FFFD."""
        return self._decoder.decode(b"", final=True)


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
