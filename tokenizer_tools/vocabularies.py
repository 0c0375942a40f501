"""The vocabulary of any tokenizer, with one class for each library.

- `tokenizers`, also inside transformers: BPE of bytes or characters, and Unigram.
- SentencePiece models (BPE and Unigram), alone or inside a wrapper with the same ids.
- tiktoken encodings, and tekken (mistral_common), which has special ids before those of an encoding.
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
        tokenizer: a tokenizer of transformers, `tokenizers`, `sentencepiece`, `tiktoken` or `mistral_common`. A
            vocabulary is returned unchanged.
        special_tokens: True if names of special tokens in a text mean these tokens. In tiktoken, mistral_common and a
            SentencePiece model alone they never do.
        rows: the number of tokens of the model, if the vocabulary is for a model.

    Raises:
        UnsupportedModel: its tokens are not parts of the text's bytes (WordPiece, word levels, dropout).
    """
    if isinstance(tokenizer, Vocabulary):
        return tokenizer
    new = _vocabulary(tokenizer, special_tokens)
    new.rows = rows
    return new


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
        f"{type(tokenizer).__name__} is not supported; ropewalk reads tokenizers of transformers, tokenizers, "
        "sentencepiece, tiktoken and mistral_common"
    )


def _layers(tokenizer: Any) -> list[Any]:
    """A wrapper and the tokenizers inside it, outermost first."""
    layers = [tokenizer]
    for layer in layers:
        for name in ("sp_model", "tokenizer", "instruct_tokenizer", "_model", "model"):
            inner = getattr(layer, name, None)
            if inner is not None and not callable(inner) and not any(inner is known for known in layers):
                layers.append(inner)
    return layers


SPACE = "\N{LOWER ONE EIGHTH BLOCK}"  # a space in SentencePiece


def byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE uses for bytes: printable Latin-1 for itself, U+0100 and up for the rest."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


class HuggingFaceVocabulary(Vocabulary):
    """A `tokenizers.Tokenizer`. `outer` is the transformers tokenizer around it, or itself."""

    def __init__(self, backend: Any, outer: Any, special_tokens: bool) -> None:
        self._backend, self._outer, self.special_tokens = backend, outer, special_tokens
        self.name = getattr(outer, "name_or_path", "") or type(outer).__name__
        kind = type(backend.model).__name__
        if kind not in ("BPE", "Unigram"):
            raise UnsupportedModel(f"{self.name} is a {kind} tokenizer; only BPE and Unigram are supported")
        for field in ("dropout", "end_of_word_suffix", "continuing_subword_prefix") if kind == "BPE" else ():
            if value := getattr(backend.model, field):
                raise UnsupportedModel(f"{self.name} has {field} = {value!r}, so the bytes do not determine its tokens")
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
        if not (ids or added):
            raise UnsupportedModel(f"{self.name} has no tokens; get the tokenizer again")
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
        """Compare the bytes of a sample's tokens with the tokenizer's decoder, and refuse a tokenizer that differs."""
        sample = " (the) Ropes\n\twalk 1234, naïve 中文"
        ids = self._backend.encode(sample, add_special_tokens=False).ids
        ids = [i for i in ids if i not in self.special_ids]
        decoded = self._backend.decode(ids, skip_special_tokens=True).strip()
        expected = self.text_bytes(ids).decode(errors="replace").strip()
        if decoded != expected:
            raise UnsupportedModel(f"{self.name} decodes {decoded!r}, but its tokens' bytes are {expected!r}")

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
        """The model without its shortcut for pieces that are tokens, which is correct only for whole pieces."""
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
    """The types of a pre-tokenizer or decoder and of its parts."""
    if component is None:
        return set()

    def kinds(state: dict[str, Any]) -> set[str]:
        below = state.get("pretokenizers") or state.get("decoders") or []
        return {state["type"]}.union(*(kinds(part) for part in below))

    return kinds(json.loads(component.__getstate__()))


class SentencePieceVocabulary(Vocabulary):
    """A `sentencepiece.SentencePieceProcessor`. `outer` is the tokenizer around it, or itself."""

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
            raise UnsupportedModel(f"{self.name} has other token ids than the SentencePiece model inside it")
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
        ids: list[int] = self._processor.encode(text)  # with the tokens that the processor adds at both ends
        while ids and self._processor.is_control(ids[-1]):  # a text gives no control tokens
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
    """A tokenizer of the model for its own alphabet, without normalization, trimming or an added space."""
    import sentencepiece

    spec = model.normalizer_spec
    spec.name, spec.precompiled_charsmap = "identity", b""
    spec.add_dummy_prefix = spec.remove_extra_whitespaces = False
    return sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())


class TiktokenVocabulary(Vocabulary):
    """A `tiktoken.Encoding`.

    Args:
        outer: the tokenizer of tiktoken, mistral_common or transformers around it.
        offset: the number of tekken's special ids before its own.
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
        if missing:  # tiktoken panics at such a byte
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
        except BaseException as error:  # the class of a panic cannot be imported
            if type(error).__name__ != "PanicException":
                raise
            raise DataError(
                f"the tokenizer failed on this text of {len(text):,} characters ({first_line(error)}); it may have a "
                "very long run of spaces"
            ) from None
        return self.checked([*(start_ids(self._outer) if callable(self._outer) else []), *ids])

    def piece_starts(self, text: str) -> list[int]:
        return [match.start() for match in self._pattern.finditer(text) if match.start()]

    def encode_piece(self, data: bytes) -> list[int]:
        return [rank + self._offset for rank in self._encoding._encode_single_piece(data)] if data else []

    def encode_piece_start(self, data: bytes) -> list[int]:
        tokens = self.encode_piece(data)
        if len(tokens) != 1:
            return tokens
        if tokens[0] not in self._inside:  # a piece that is a token is not merged, but the start of a longer one is
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
