"""A prompt as the loop that generates reads it: its tokens, and the covers of its end."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ..errors import ConfigError, DataError, RopewalkWarning, Setting, warn
from ..tokenizer_tools.characters import split_character, unfinished
from ..tokenizer_tools.cover import Cover, cover
from ..tokenizer_tools.stream import TextStream
from ..tokenizer_tools.vocabulary import Vocabulary, check_ids, check_text
from .chat_template import chat_headers
from .sampling import ContinuationMode


def token_ids(prompt: object, size: int | None = None) -> list[int]:
    """Token ids as a list of int.

    Args:
        size: number of tokens of the model, if it is known.

    Raises:
        ConfigError: it is not a sequence of whole numbers.
        DataError: the model has no such token.
    """
    try:
        ids = list(map(operator.index, prompt))  # type: ignore[call-overload]
    except TypeError:
        if isinstance(prompt, Mapping):
            raise ConfigError("a prompt is text; messages are for model.chat(messages)") from None
        raise ConfigError(
            f"a prompt is text, UTF-8 bytes or a list of token ids, not {reprlib.repr(prompt)}; several go into a "
            "list, and so does one of token ids: [[1, 2, 3]]"
        ) from None
    if size is not None:
        check_ids(ids, size)
    return ids


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Tokens of a prompt.

    Attributes:
        ids: the tokens that the tokenizer makes of it.
        starts_text: True if it has no text, only special tokens.
        cover: its covers, if the first token of the answer is drawn among them.
        start: the tokenizer's start token.
        unfinished: the first bytes of a character, if it ends inside one.
    """

    ids: list[int]
    starts_text: bool
    cover: Cover | None = None
    start: int | None = None
    unfinished: bytes = b""

    @property
    def certain_ids(self) -> list[int]:
        """Tokens that are read whichever first token is drawn."""
        return self.ids if self.cover_to_weigh is None else list(self.cover_to_weigh.common_prefix)

    @classmethod
    def read(
        cls,
        prompt: str | bytes | Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        vocabulary: Vocabulary,
        continuation: ContinuationMode,
        *,
        broken: bool = False,
    ) -> Prompt:
        """The prompt of a request.

        Args:
            broken: whether bytes may hold some that are not UTF-8, as a model's answer may.

        Raises:
            ConfigError: it is empty, and the tokenizer has no start token, or it is neither text nor token ids.
            DataError: it is not UTF-8, or holds half a surrogate pair, or a token that the model does not have; or it
                ends inside a character whose bytes have no tokens, and `continuation` does not weigh its covers.
        """
        if isinstance(prompt, bytearray | memoryview):
            prompt = bytes(prompt)
        if not isinstance(prompt, str | bytes):
            prompt = token_ids(prompt)
        start = tokenizer.bos_token_id
        is_text = isinstance(prompt, str | bytes)
        if isinstance(prompt, str):
            check_text(prompt)
        if isinstance(prompt, str | bytes):
            _warn_of_special_names(vocabulary, prompt if isinstance(prompt, str) else prompt.decode(errors="replace"))
        if not isinstance(prompt, bytes) and (continuation == "off" or (continuation == "auto" and not is_text)):
            ids = vocabulary.encode(prompt) if isinstance(prompt, str) else prompt
            return cls(
                ids=vocabulary.checked(_with_start_token(ids, start)),
                starts_text=all(map(vocabulary.is_special, ids)),
                unfinished=b"" if is_text else _unfinished(vocabulary, ids),
            )
        covers = cover(vocabulary, vocabulary.encode_bytes(prompt) if broken and isinstance(prompt, bytes) else prompt)
        weighs = continuation == "exact"
        if continuation == "auto" and not covers.only_aligned:
            weighs = bool(covers.common_prefix or start is not None) and not _ends_in_header(prompt, tokenizer)
        half = split_character(covers.text)[1]
        if not weighs and not covers.nodes[0].aligned:
            raise DataError(
                f"the prompt ends in {half!r}, half a character that {vocabulary.name} has no tokens for; remove "
                "it, or set ",
                Setting("continuation", "exact"),
                ", which draws it with the rest of its character",
            )
        return cls(
            ids=vocabulary.checked(_with_start_token(list(covers.prompt), start)),
            cover=covers if weighs else None,
            start=start,
            unfinished=half,
            starts_text=not covers.text and all(map(vocabulary.is_special, covers.prompt[-1:])),
        )

    @property
    def cover_to_weigh(self) -> Cover | None:
        """Its covers. None if the answer can only begin where the prompt's tokens end."""
        return None if self.cover is None or self.cover.only_aligned else self.cover

    def text_stream(self, vocabulary: Vocabulary) -> TextStream:
        """A stream for the text of the answer."""
        return TextStream(vocabulary, pending=self.unfinished, starts_text=self.starts_text)


def _unfinished(vocabulary: Vocabulary, ids: Sequence[int]) -> bytes:
    """The first bytes of a character, if token ids end inside one."""
    end = b""
    for token in reversed(ids):
        if len(end) > 2 or vocabulary.is_special(token):
            break
        end = vocabulary.tokens[token] + end
    return unfinished(end)


def _warn_of_special_names(vocabulary: Vocabulary, text: str) -> None:
    if not vocabulary.special_tokens and (names := vocabulary.special_names_in(text)):
        warn(
            RopewalkWarning(
                f"the prompt holds {', '.join(names[:3])}, read as the characters that they are; if it comes from a "
                "chat template, ask for the tokens: ",
                Setting("special_tokens", True, "load"),
            ),
        )


def _with_start_token(ids: list[int], start: int | None) -> list[int]:
    if not ids and start is None:
        raise ConfigError("the prompt is empty and this tokenizer has no start token; give at least one character")
    return ids or [start]  # type: ignore[list-item]


def _ends_in_header(prompt: str | bytes | Sequence[int], tokenizer: PreTrainedTokenizerBase) -> bool:
    """True if the prompt ends in the header that the chat template writes before an answer: a token ends there."""
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several templates by name
        template = template.get("default")
    text = prompt if isinstance(prompt, str) else bytes(prompt).decode(errors="replace")
    return isinstance(template, str) and text.endswith(chat_headers(template))
