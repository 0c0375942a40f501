"""Text from a stream of tokens: whole characters, each once. Stop strings are in `stop_strings.py`."""

from __future__ import annotations

from .characters import unfinished
from .vocabulary import Vocabulary


class TextStream:
    """Converts tokens to text as they arrive. A character appears when its last byte has arrived.

    Args:
        vocabulary: vocabulary of the tokenizer.
        pending: the bytes of an unfinished character at the end of the prompt. The stream returns the whole character.
        starts_text: True if no text comes before the first token. The space that some tokenizers add before a text is
            then removed.

    Attributes:
        unfinished: the bytes of the character that is not complete yet, including `pending`.
    """

    def __init__(self, vocabulary: Vocabulary, *, pending: bytes = b"", starts_text: bool = False) -> None:
        self._vocabulary = vocabulary
        self.unfinished = pending
        self._parts: list[bytes] = []
        self._drops_space = starts_text and vocabulary.adds_space

    def push(self, token: int, skip: int = 0) -> str:
        """The text that `token` completes, without its first `skip` bytes; empty while no character is complete."""
        data = self._vocabulary.tokens[token][skip:] if token < len(self._vocabulary.tokens) else b""
        if self._drops_space and data:
            data, self._drops_space = data.removeprefix(b" "), False
        self._parts.append(data)
        data = self.unfinished + data
        self.unfinished = unfinished(data)
        return data[: len(data) - len(self.unfinished)].decode(errors="replace")

    @property
    def data(self) -> bytes:
        """The bytes of all tokens so far, without `pending`."""
        return b"".join(self._parts)

    def finish(self) -> str:
        """The rest of the text at the end of the stream: U+FFFD for an unfinished character."""
        rest, self.unfinished = self.unfinished.decode(errors="replace"), b""
        return rest
