"""SentencePiece models (BPE and Unigram), bare or inside a wrapper that keeps their ids."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedModel
from .encode import prompt_ids
from .huggingface import SPACE
from .vocab import Vocabulary


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

    def cuts(self, text: str) -> list[int]:
        return []  # a text is one piece

    def piece(self, data: bytes) -> list[int]:
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
