"""Single tokens as texts, for lists of log-probabilities."""

from __future__ import annotations

from typing import Any

from .vocabulary import Vocabulary


class TokenTexts:
    """The texts of single tokens.

    A token may be a part of a character. Texts of such tokens do not add up to the text of the answer; their bytes do.

    Args:
        tokenizer: a transformers tokenizer, which knows the names of special tokens.
    """

    def __init__(self, vocabulary: Vocabulary, tokenizer: Any) -> None:
        self._vocabulary, self._tokenizer = vocabulary, tokenizer

    def data(self, token: int) -> bytes:
        """The bytes of a token; of a special one, those of its name."""
        if self._vocabulary.is_special(token):
            return str(self._tokenizer.convert_ids_to_tokens(token) or f"<token {token}>").encode()
        return self._vocabulary.tokens[token]

    def text(self, token: int) -> str:
        r"""A token as text. One that is not whole characters is written as OpenAI does: bytes:\xe2\x80."""
        data = self.data(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
