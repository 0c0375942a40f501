"""The vocabulary of any tokenizer, by its kind.

- `tokenizers` and transformers, which wraps it: BPE of bytes or characters, Unigram.
- SentencePiece models (BPE and Unigram), bare or inside a wrapper that has the same ids.
- tiktoken encodings, and tekken (mistral_common), which puts special ids in front of one.
"""

from __future__ import annotations

import json
import pickle
import re
from functools import cached_property
from itertools import pairwise
from typing import Any

from ..errors import DataError, UnsupportedModel, first_line
from .encode import prompt_ids, start_ids
from .vocabulary import Vocabulary


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

    def special_names_in(self, text: str) -> list[str]:
        return sorted(set(self._names.findall(text))) if self._names else []

    @cached_property
    def _names(self) -> re.Pattern[str] | None:
        added = self._backend.get_added_tokens_decoder().values()
        names = [re.escape(token.content) for token in added if token.special]
        return re.compile("|".join(sorted(names, key=len, reverse=True))) if names else None

    def piece_starts(self, text: str) -> list[int]:
        splitter = self._backend.pre_tokenizer
        if splitter is None:
            return []
        marked = text.replace(" ", SPACE) if self._marks_spaces else text
        return sorted({start for _, (start, _) in splitter.pre_tokenize_str(marked)} - {0})

    def encode_piece(self, data: bytes) -> list[int]:
        return [token.id for token in self._backend.model.tokenize(self._written(data))]

    def encode_piece_start(self, data: bytes) -> list[int]:
        tokens = self.encode_piece(data)
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


class SentencePieceVocabulary(Vocabulary):
    """A `sentencepiece.SentencePieceProcessor`; `outer` is the tokenizer around it, if any."""

    byte_level = False

    def __init__(self, processor: Any, outer: Any, special_tokens: bool) -> None:
        self._processor, self._outer, self.special_tokens = processor, outer, special_tokens
        self.name = getattr(outer, "name_or_path", "") or type(outer).__name__
        model = _model(processor)
        kind = model.trainer_spec.ModelType.Name(model.trainer_spec.model_type)
        self.kind, self.unigram = f"SentencePiece {kind}", kind == "UNIGRAM"
        self._raw = _without_normalizer(model)
        size = processor.get_piece_size()
        convert = getattr(outer, "convert_ids_to_tokens", None)
        if convert and [convert(i) for i in range(3, size, 97)] != [
            processor.id_to_piece(i) for i in range(3, size, 97)
        ]:
            raise UnsupportedModel(f"{self.name} numbers its tokens otherwise than the SentencePiece model inside it")
        self.tokens, special_ids, self._bytes = [], set(), {}
        for i in range(size):
            data = processor.id_to_piece(i).replace(SPACE, " ").encode()
            if processor.is_byte(i):
                data = bytes([int(processor.id_to_piece(i)[3:5], 16)])
                self._bytes[data[0]] = i
            if processor.is_control(i) or processor.is_unused(i) or processor.is_unknown(i):
                data = b""
                special_ids.add(i)
            self.tokens.append(data)
        self.special_ids = frozenset(special_ids)

    def encode(self, text: str) -> list[int]:
        if callable(self._outer):
            return self.checked(prompt_ids(text, self._outer, special_tokens=self.special_tokens))
        ids: list[int] = self._processor.encode(text)  # with what the processor was told to add, at either end
        while ids and self._processor.is_control(ids[-1]):  # which no text gives
            ids.pop()
        return self.checked(ids)

    def piece_starts(self, text: str) -> list[int]:
        return []  # a text is one piece

    def encode_piece(self, data: bytes) -> list[int]:
        ids: list[int] = self._raw.encode(data.decode().replace(" ", SPACE))
        return ids

    def byte_tokens(self, data: bytes) -> list[int] | None:
        return [self._bytes[byte] for byte in data] if len(self._bytes) == 256 else None


def _model(processor: Any) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(processor.serialized_model_proto())
    return model


def _without_normalizer(model: Any) -> Any:
    """A tokenizer of the model that reads its own alphabet: nothing is normalized, trimmed or put in front."""
    import sentencepiece

    spec = model.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class TiktokenVocabulary(Vocabulary):
    """A `tiktoken.Encoding`.

    Args:
        outer: the tokenizer of tiktoken, mistral_common or transformers that it is in.
        offset: special ids of tekken in front of its own.
    """

    byte_level = True
    special_tokens = False

    def __init__(self, encoding: Any, outer: Any, offset: int) -> None:
        import regex  # type: ignore[import-untyped]  # comes with tiktoken

        self._encoding, self._outer, self._offset = encoding, outer, offset
        self.name = encoding.name
        self.kind = "byte-level BPE (tiktoken)"
        self._ranks: dict[bytes, int] = encoding._mergeable_ranks
        missing = [byte for byte in range(256) if bytes([byte]) not in self._ranks]
        if missing:  # tiktoken panics where it meets one
            others = f", nor for {len(missing) - 1} others" if missing[1:] else ""
            raise UnsupportedModel(f"{self.name} is damaged: it has no token for the byte {missing[0]:#04x}{others}")
        self._pattern = regex.compile(encoding._pat_str)
        self._inside: dict[int, list[int]] = {}
        self.tokens = [b""] * (self._offset + encoding.max_token_value + 1)
        used = set()
        for data, rank in self._ranks.items():
            self.tokens[rank + self._offset] = data
            used.add(rank + self._offset)
        self.special_ids = frozenset(range(len(self.tokens))) - used

    def encode(self, text: str) -> list[int]:
        try:
            ids = [rank + self._offset for rank in self._encoding.encode_ordinary(text)]
        except BaseException as error:  # the class of a panic has no other name that can be imported
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the tokenizer gave up on this text of {len(text):,} characters ({first_line(error)}); it may hold a "
                "very long run of spaces"
            ) from None
        return self.checked([*(start_ids(self._outer) if callable(self._outer) else []), *ids])

    def piece_starts(self, text: str) -> list[int]:
        return [found.start() for found in self._pattern.finditer(text) if found.start()]

    def encode_piece(self, data: bytes) -> list[int]:
        return [rank + self._offset for rank in self._encoding._encode_single_piece(data)] if data else []

    def encode_piece_start(self, data: bytes) -> list[int]:
        tokens = self.encode_piece(data)
        if len(tokens) != 1:
            return tokens
        if tokens[0] not in self._inside:  # a piece that is a token is taken whole, but the beginning of a longer one
            self._inside[tokens[0]] = [self._ranks[part] + self._offset for part in self._merged(data)]
        return self._inside[tokens[0]]

    def _merged(self, data: bytes) -> list[bytes]:
        parts = [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            ranks = [self._ranks.get(a + b, len(self.tokens)) for a, b in pairwise(parts)]
            best = min(ranks)
            if best == len(self.tokens):
                break
            i = ranks.index(best)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts
