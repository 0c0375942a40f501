"""A text that grows, with the keys and values of everything read so far."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.cache_utils import Cache

from ..errors import ConfigError, DataError
from ..tokenizer_tools.cover import shared_length
from .answer import Answer
from .cache import can_rewind
from .completion import Completion
from .generation import check_length, pieces
from .kv_cache import KVCache
from .prefill import Progress, prefill
from .prompt import Prompt
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .api import Model

_FORMAT = "ropewalk session 1"


class Session:
    """A text under way: append to it, have it continued, fork it, go back, save it. `Model.session` makes one.

        with model.session() as chat:
            chat.append(report)
            print(chat.generate("\n\nIn one sentence:").text)

    What it writes is what `Model.generate` would write after the whole text; the session only saves reading it again.
    When `model.rope` changes, the keys are turned in place.

    Attributes:
        text: all that was appended and written.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.text = ""
        self._ids: list[int] = []  # what the cache holds
        self._cache: Cache | None = None
        self._setting = model.network.setting

    @property
    def tokens(self) -> int:
        """Tokens held."""
        return len(self._ids)

    def append(self, text: str, progress: Progress | None = None) -> None:
        """Read on. The last few tokens wait until it is known how they end.

        Raises:
            ContextOverflow: the text is longer than the scaler reaches, or than memory holds.
        """
        prompt = self._read(self.text + text)
        certain = prompt.certain
        check_length(self._model, len(certain), SamplingParams(max_new_tokens=1))
        self.text += text
        cache = self._ready(certain, len(certain) + 1)
        if len(certain) > len(self._ids):
            try:
                with torch.inference_mode():
                    prefill(self._model.network, certain[len(self._ids) :], cache, progress)
            except BaseException:  # Ctrl-C: keep what was there before
                self._settle(self._ids)
                raise
            self._ids = list(certain)

    def generate(self, text: str = "", params: SamplingParams | None = None) -> Completion:
        """Append `text` and continue; the answer becomes part of the session."""
        answer, written = self._start(text, params or SamplingParams())
        for _ in written:
            pass
        return answer.completion()

    def stream(self, text: str = "", params: SamplingParams | None = None) -> Iterator[str]:
        """The text of `generate`, piece by piece; what was written when it is closed stays in the session."""
        return self._start(text, params or SamplingParams())[1]

    def _start(self, text: str, params: SamplingParams) -> tuple[Answer, Iterator[str]]:
        prompt = self._read(self.text + text, params)
        check_length(self._model, len(prompt.ids), params)
        answer = Answer(prompt, params, self._model.vocabulary, self._model.stop_ids)
        return answer, self._written(text, prompt, params, answer)

    def _written(self, text: str, prompt: Prompt, params: SamplingParams, answer: Answer) -> Iterator[str]:
        cache = self._ready(prompt.certain, len(prompt.ids) + params.max_new_tokens)
        self.text += text
        before = list(self._ids)
        try:
            yield from pieces(self._model, prompt, params, answer, cache)
        finally:
            self.text += answer.text
            known = [*answer.prompt_ids, *(token.id for token in answer.tokens)] if answer.tokens else before
            self._settle(known)

    def fork(self) -> Session:
        """A session that goes on from here on its own. Nothing is copied before one of the two writes."""
        other = Session(self._model)
        other.text, other._ids, other._setting = self.text, list(self._ids), self._setting
        if isinstance(self._cache, KVCache):
            other._cache = self._cache.fork()
        else:  # transformers' caches are not shared: the fork reads again
            other._ids = []
        return other

    def crop(self, length: int) -> None:
        """Go back to the first `length` characters of the text."""
        if not 0 <= length <= len(self.text):
            raise ConfigError(f"crop {length} must be between 0 and the session's {len(self.text)} characters")
        self.text = self.text[:length]
        certain = self._read(self.text).certain if self.text else []
        self._settle(self._ids[: shared_length(self._ids, certain)])

    def save(self, path: str | Path) -> None:
        """Write text, keys and values to a `.safetensors` file. `Model.session(path)` goes on from it.

        Raises:
            ConfigError: the model is not run by the compiled kernels, whose caches alone have a form to keep.
        """
        if self._cache is not None and not isinstance(self._cache, KVCache):
            raise ConfigError("only sessions of the compiled kernels can be saved; this model is run by transformers")
        tensors = {}
        for index, layer in enumerate(self._cache.layers if self._cache is not None else []):
            for name in layer.buffers:
                tensors[f"{index}.{name}"] = getattr(layer, name)[:, :, : len(self._ids)].contiguous()
        scaler, length = self._setting
        header = {"format": _FORMAT, "text": self.text, "ids": self._ids, "rope": str(scaler), "length": length}
        save_file(tensors, str(path), metadata={"session": json.dumps(header), "weights": self._model.fingerprint})

    def load(self, path: str | Path) -> None:
        """Go on from a file that `save` wrote."""
        from ..scaling.spec import parse

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if "session" not in metadata:
                    raise DataError(f"{path} is not a session that ropewalk saved")
                header = json.loads(metadata["session"])
                if metadata["weights"] != self._model.fingerprint:
                    raise DataError(f"{path} was saved by another model than {self._model.name}")
                self.text, self._ids = header["text"], header["ids"]
                self._setting = parse(header["rope"]), header["length"]
                cache = self._model.network.new_cache(len(self._ids) + 256)
                if not isinstance(cache, KVCache):
                    raise ConfigError("sessions can be loaded by the compiled kernels only")
                if self._ids and file.get_tensor("0.keys").dtype != cache.layers[0].keys.dtype:
                    raise DataError(
                        f"{path} holds {file.get_tensor('0.keys').dtype} keys, and this model "
                        f"{cache.layers[0].keys.dtype}; load the model with the same dtype and kv_dtype"
                    )
                for index, layer in enumerate(cache.layers):
                    for name in layer.buffers if self._ids else ():
                        getattr(layer, name)[:, :, : len(self._ids)] = file.get_tensor(f"{index}.{name}")
                cache.advance(len(self._ids))
                self._cache = cache
        except (OSError, SafetensorError) as error:
            raise DataError(f"{path} cannot be read as a session: {error}") from error

    def close(self) -> None:
        """Give the memory back; the text stays."""
        self._cache, self._ids = None, []

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, text: str, params: SamplingParams | None = None) -> Prompt:
        continuation = (params or SamplingParams()).continuation
        return Prompt.read(text, self._model.tokenizer, self._model.vocabulary, continuation)

    def _ready(self, certain: list[int], length: int) -> Cache:
        """The cache under the scaler in use, holding no more than the beginning it shares with `certain`."""
        model = self._model
        model.prepare(length)
        if self._cache is not None and self._setting != model.network.setting:
            if isinstance(self._cache, KVCache):
                with torch.inference_mode():
                    model.network.retune(self._cache, self._setting)
            else:
                self._cache = None
        self._setting = model.network.setting
        shared = shared_length(self._ids, certain)
        if self._cache is not None and shared < len(self._ids) and not can_rewind(self._cache):
            self._cache = None
        if self._cache is None:
            self._cache, shared = model.network.new_cache(length), 0
        self._settle(self._ids[:shared])
        return self._cache

    def _settle(self, known: list[int]) -> None:
        """Keep what the cache holds of `known`, in all layers alike: Ctrl-C may have come between two of them."""
        if self._cache is None:
            self._ids = []
            return
        if not can_rewind(self._cache):
            self._ids = known[: self._cache.get_seq_length()]
            return
        held = min(len(known), *(layer.get_seq_length() for layer in self._cache.layers)) if self._cache.layers else 0
        for layer in self._cache.layers:
            excess = layer.get_seq_length() - held
            if excess:
                layer.crop(-excess)
        self._ids = known[:held]
