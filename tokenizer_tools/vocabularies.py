"""The vocabulary of any tokenizer."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModel
from .huggingface import HuggingFaceVocabulary
from .spm import SentencePieceVocabulary
from .tekken import TiktokenVocabulary
from .vocab import Vocabulary


def vocabulary(tokenizer: Any, *, special_tokens: bool = False, rows: int | None = None) -> Vocabulary:
    """The vocabulary of a tokenizer.

    Args:
        tokenizer: of transformers, `tokenizers`, `sentencepiece`, `tiktoken` or `mistral_common`; a vocabulary is
            returned as it is.
        special_tokens: whether names of special tokens in a text stand for them. Those of tiktoken and mistral_common
            never do, those of a bare SentencePiece model neither.
        rows: tokens that the model has, if it is for a model.

    Raises:
        UnsupportedModel: its tokens are not pieces of the text's bytes (WordPiece, word levels, dropout).
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    known = _vocabulary(tokenizer, special_tokens)
    known.rows = rows
    return known


def _vocabulary(tokenizer: Any, special_tokens: bool) -> Vocabulary:
    backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
    if hasattr(backend, "pre_tokenizer") and hasattr(backend, "to_str"):
        return HuggingFaceVocabulary(backend, tokenizer, special_tokens)
    layers = _layers(tokenizer)
    for inner in layers:
        if hasattr(inner, "serialized_model_proto"):
            return SentencePieceVocabulary(inner, tokenizer, special_tokens)
        if hasattr(inner, "_pat_str") and hasattr(inner, "_mergeable_ranks"):
            offset = next((layer.num_special_tokens for layer in layers if hasattr(layer, "num_special_tokens")), 0)
            return TiktokenVocabulary(inner, tokenizer, offset)
    raise UnsupportedModel(
        f"{type(tokenizer).__name__} is none of the tokenizers whose bytes ropewalk knows: those of transformers, "
        "tokenizers, sentencepiece, tiktoken and mistral_common"
    )


def _layers(tokenizer: Any) -> list[Any]:
    """A wrapper and the tokenizers inside it, outermost first."""
    found = [tokenizer]
    for inner in found:
        for name in ("sp_model", "tokenizer", "instruct_tokenizer", "_model", "model"):
            below = getattr(inner, name, None)
            if below is not None and not callable(below) and not any(below is known for known in found):
                found.append(below)
    return found
