"""Tokenizers of the `tokenizers` library and of transformers, which wraps it: BPE of bytes or characters, Unigram."""

from __future__ import annotations

import json
import pickle
import re
from functools import cached_property
from typing import Any

from ..errors import UnsupportedModel
from .encode import prompt_ids
from .vocab import Vocabulary

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # how SentencePiece writes a space


def byte_alphabet() -> dict[str, int]:
    """The characters in which byte-level BPE writes bytes: printable Latin-1 as itself, the rest from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class HuggingFaceVocabulary(Vocabulary):
    """A `tokenizers.Tokenizer`; `outer` is the transformers tokenizer around it, if any."""

    def __init__(self, backend: Any, outer: Any, special_tokens: bool) -> None:
        self._backend, self._outer, self.special_tokens = backend, outer, special_tokens
        self.name = getattr(outer, "name_or_path", "") or type(outer).__name__
        kind = type(backend.model).__name__
        if kind not in ("BPE", "Unigram"):
            raise UnsupportedModel(f"{self.name} is a {kind} tokenizer; ropewalk knows the bytes of BPE and Unigram")
        for field in ("dropout", "end_of_word_suffix", "continuing_subword_prefix") if kind == "BPE" else ():
            if value := getattr(backend.model, field):
                raise UnsupportedModel(f"{self.name} has {field} = {value!r}: its tokens do not follow from the bytes")
        self.unigram = kind == "Unigram"
        decoders = _types(backend.decoder)
        self.byte_level = "ByteLevel" in decoders | _types(backend.pre_tokenizer)
        self.kind = f"byte-level {kind}" if self.byte_level else kind
        self._marks_spaces = not self.byte_level and bool(decoders & {"Replace", "Metaspace"})
        self._alphabet = byte_alphabet()
        self._characters = {byte: character for character, byte in self._alphabet.items()}
        self._read_tokens()
        self._check()

    def _read_tokens(self) -> None:
        ids = self._backend.get_vocab(with_added_tokens=True)
        added = self._backend.get_added_tokens_decoder()
        unknown = ids.get(getattr(self._backend.model, "unk_token", None))
        fallback = not self.byte_level and "<0x00>" in ids
        self.tokens = [b""] * (max([*ids.values(), *added]) + 1)
        used = set()
        for token, i in ids.items():
            if i in added:
                continue
            data = self._data(token, fallback)
            if data is not None and i != unknown:
                self.tokens[i] = data
                used.add(i)
        for i, token in added.items():
            self.tokens[i] = b"" if token.special else token.content.encode()
        self.special_ids = frozenset(i for i in range(len(self.tokens)) if i not in used)
        self._bytes = [ids[f"<0x{byte:02X}>"] for byte in range(256)] if fallback else None

    def _data(self, token: str, fallback: bool) -> bytes | None:
        if self.byte_level:
            try:
                return bytes(self._alphabet[character] for character in token)
            except KeyError:
                return None
        if fallback and len(token) == 6 and token.startswith("<0x"):
            return bytes([int(token[3:5], 16)])
        return (token.replace(SPACE, " ") if self._marks_spaces else token).encode()

    def _check(self) -> None:
        """Compare with the tokenizer's own decoder, so that one that means something else by its tokens is refused."""
        sample = " (the) Ropes\n\twalk 1234, naïve 中文"
        ids = self._backend.encode(sample, add_special_tokens=False).ids
        ids = [i for i in ids if i not in self.special_ids]
        own = self._backend.decode(ids, skip_special_tokens=True).strip()
        ours = self.text_bytes(ids).decode(errors="replace").strip()
        if own != ours:
            raise UnsupportedModel(f"{self.name} decodes {own!r} where its tokens' bytes are {ours!r}")

    def encode(self, text: str) -> list[int]:
        return self.checked(prompt_ids(text, self._outer, special_tokens=self.special_tokens))

    def names_in(self, text: str) -> list[str]:
        return sorted(set(self._names.findall(text))) if self._names else []

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        added = self._backend.get_added_tokens_decoder().values()
        names = [re.escape(token.content) for token in added if token.special]
        return re.compile("|".join(sorted(names, key=len, reverse=True))) if names else None

    def cuts(self, text: str) -> list[int]:
        splitter = self._backend.pre_tokenizer
        if splitter is None:
            return []
        marked = text.replace(" ", SPACE) if self._marks_spaces else text
        return sorted({start for _, (start, _) in splitter.pre_tokenize_str(marked)} - {0})

    def piece(self, data: bytes) -> list[int]:
        return [token.id for token in self._backend.model.tokenize(self._written(data))]

    def beginning(self, data: bytes) -> list[int]:
        tokens = self.piece(data)
        if len(tokens) == 1 and getattr(self._backend.model, "ignore_merges", False):
            return [token.id for token in self._merging.tokenize(self._written(data))]
        return tokens

    @cached_property
    def _merging(self) -> Any:
        """The model without its short cut for pieces that are tokens, which only whole pieces may take."""
        model = pickle.loads(pickle.dumps(self._backend.model))
        model.ignore_merges = False
        return model

    def byte_tokens(self, data: bytes) -> list[int] | None:
        return [self._bytes[byte] for byte in data] if self._bytes else None

    def _written(self, data: bytes) -> str:
        if self.byte_level:
            return data.decode("latin-1").translate(self._characters)
        return data.decode().replace(" ", SPACE) if self._marks_spaces else data.decode()


def _types(component: Any) -> set[str]:
    """The kinds of a pre-tokenizer or decoder and of those it is composed of."""
    if component is None:
        return set()

    def kinds(state: dict[str, Any]) -> set[str]:
        below = state.get("pretokenizers") or state.get("decoders") or []
        return {state["type"]}.union(*(kinds(part) for part in below))

    return kinds(json.loads(component.__getstate__()))
