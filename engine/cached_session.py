"""What sessions and chats share: a cache of what was read, one stream at a time, and the file of both."""

from __future__ import annotations

import json
import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from ..errors import ConfigError, DataError, Setting
from ..scaling.spec import parse
from .cache import ContiguousLayer
from .completion import Completion
from .hf_model import input_device, key_shape
from .kv_cache import KVCache
from .prefill import Progress
from .prefix_cache import PrefixCache
from .prompt import Prompt
from .sampling import SamplingParams
from .scaled_model import ScaledModel
from .sequence import Sequence
from .storage import make_readable

_SPARE = 256  # tokens of spare room after loading a file


class CachedSession(ABC):
    """A text or a chat with the keys and values of what was read of it.

    Every call ends a stream that is in progress. The keys and values belong to token ids: before each use the tokens of
    the text are compared with them, so a file may be read under another tokenizer or chat template.
    """

    _format: ClassVar[str]
    """Name of the format of its files. Files of another format are refused."""

    def __init__(self, model: ScaledModel) -> None:
        self._model = model
        self._cached = PrefixCache()
        self._stream: weakref.ref[Generator[str, None, None]] | None = None  # dropping a stream closes it

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return len(self._cached.ids)

    def save(self, path: str | Path) -> None:
        """Write the text or the messages, with keys and values, to a `.safetensors` file.

        `Model.session(path)` or `Model.chat_session(path=...)` continues from it. A file at `path` is replaced when the
        new one is complete.

        Raises:
            ConfigError: the model has layers with a window or a state under transformers' modules.
            DataError: the file cannot be written, or JSON cannot hold a message.
        """
        self._end_stream()
        _write_file(self._model, Path(path), self._cached, {"format": self._format, **self._content()})

    def load(self, path: str | Path) -> None:
        """Replace the text or the messages, and the cache, by those of a file that `save` wrote.

        After an error nothing has changed.

        Raises:
            ConfigError: as for `save`.
            ContextOverflow: the session does not fit into memory.
            DataError: the file is not such a session, or belongs to another model, engine or kv_dtype.
        """
        self._end_stream()
        header, cached = _read_file(self._model, path, self._format)
        self._restore(header, path)
        self._cached = cached

    def close(self) -> None:
        """Free the cache; the text or the messages stay."""
        self._end_stream()
        self._cached.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def _content(self) -> dict[str, Any]:
        """The text or the messages, as JSON holds them."""

    @abstractmethod
    def _restore(self, content: dict[str, Any], path: str | Path) -> None:
        """Take over what `_content` gave.

        Raises:
            DataError: it is damaged. Nothing has changed then.
        """

    def _start(
        self,
        prompt: Prompt,
        params: SamplingParams,
        progress: Progress | None,
        stream: Callable[[Sequence, int], Generator[str, None, None]],
    ) -> tuple[Sequence, Iterator[str]]:
        """The answer to a prompt, and its stream, which is the one in progress from now on.

        Args:
            stream: generates the answer; it gets the sequence, and the tokens of prompt and answer together.
        """
        model = self._model
        length = model.check_length(len(prompt.ids), params, self._cached.cache)
        sequence = Sequence(prompt, model.resolved(params), model.vocabulary, model.stop_ids, progress=progress)
        pieces = stream(sequence, length)
        self._stream = weakref.ref(pieces)
        return sequence, pieces

    def _end_stream(self) -> None:
        if self._stream is not None and (stream := self._stream()) is not None:
            stream.close()
        self._stream = None


def completed(sequence: Sequence, pieces: Iterator[str]) -> Completion:
    """Run a stream to its end."""
    for _ in pieces:
        pass
    return sequence.completion()


def _write_file(model: ScaledModel, path: Path, cached: PrefixCache, content: dict[str, Any]) -> None:
    if cached.cache is not None:
        _check_layers(cached.cache)
    tensors = {}
    for index, layer in enumerate(cached.cache.layers if cached.cache is not None and cached.ids else []):
        for name in layer.buffers:
            tensors[f"{index}.{name}"] = getattr(layer, name)[:, :, : layer.length].contiguous().cpu()
    scaler, length = cached.rope_state
    header = {**content, "ids": cached.ids, "rope": str(scaler), "length": length, "compiled": model.is_compiled}
    if cached.cache is not None:
        header["dropped"] = [cached.cache.layers[0].evicted, cached.cache.layers[0].needed]
    try:
        metadata = {"session": json.dumps(header), "weights": model.fingerprint}
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as folder:
            written = Path(folder, "session")
            save_file(tensors, str(written), metadata=metadata)
            make_readable(written)
            written.replace(path)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def _read_file(model: ScaledModel, path: str | Path, form: str) -> tuple[dict[str, Any], PrefixCache]:
    """The header of a file that `_write_file` wrote, and its cache."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "session" not in metadata:
                raise DataError(f"{path} is not a session that ropewalk saved")
            header = json.loads(metadata["session"])
            if (saved := str(header["format"])) != form:
                if saved.rpartition(" ")[0] == form.rpartition(" ")[0]:
                    raise DataError(
                        f"{path} is a {saved!r} of another version of ropewalk, and this one reads {form!r}; read its "
                        "text again"
                    )
                raise DataError(f"{path} is a {saved!r}; give a {form!r}")
            if metadata["weights"] != model.fingerprint:
                raise DataError(f"{path} was saved by another model than {model.name}")
            if header["compiled"] != model.is_compiled:  # under a position map their keys are rotated differently
                wrote = "the compiled kernels" if header["compiled"] else "transformers' modules"
                raise DataError(
                    f"{path} was saved by {wrote}, which rotate keys at another place; ",
                    Setting("compile", header["compiled"], "load"),
                )
            ids, rope_state = header["ids"], (parse(header["rope"]), header["length"])
            if not (isinstance(ids, list) and all(isinstance(i, int) for i in ids)):
                raise TypeError("its token ids have the wrong type")
            if not isinstance(rope_state[1], int | None):
                raise TypeError("its length is not a number")
            evicted, needed = map(int, header.get("dropped", (0, 0)))
            held = len(ids) - evicted
            if not 0 <= needed <= held <= len(ids):
                raise ValueError("its number of keys does not match its tokens")
            model.check_room(held + _SPARE, length=held)
            cache = model.new_cache(held + _SPARE)
            _check_layers(cache)
            if not isinstance(cache, KVCache):
                _allocate(cache, model.hf)
            _fill(cache, file, held, (evicted, needed), path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, ConfigError):  # a ValueError too
            raise
        raise DataError(f"{path} cannot be read as a session: {error}") from error
    cached = PrefixCache()
    cached.hold(cache, ids, rope_state)
    return header, cached


def _check_layers(cache: Cache) -> None:
    if not all(isinstance(layer, ContiguousLayer) for layer in cache.layers):
        raise ConfigError(
            "this model has layers with a sliding window or a state, whose sessions only the compiled kernels save and "
            "load; keep the text, and append it to a new session"
        )


@torch.inference_mode()  # as a forward pass makes them
def _allocate(cache: Cache, hf: PreTrainedModel) -> None:
    """Give a cache of transformers' modules its memory, which its layers otherwise get with their first keys."""
    (heads, dim), first = key_shape(hf.config), input_device(hf)
    places = {
        getattr(m, "layer_idx", None): next(m.parameters(), None) for m in hf.modules() if hasattr(m, "layer_idx")
    }
    for index, layer in enumerate(cache.layers):
        weight = places.get(index)
        device = first if weight is None or weight.is_meta else weight.device
        like = torch.empty(1, heads, 0, dim, dtype=hf.dtype, device=device)
        layer.lazy_initialization(like, like)


@torch.inference_mode()
def _fill(cache: Cache, file: Any, count: int, dropped: tuple[int, int], path: str | Path) -> None:
    for layer in cache.layers:
        layer.reserve(count)
    for index, layer in enumerate(cache.layers if count else ()):
        for name in layer.buffers:
            saved, rows = file.get_tensor(f"{index}.{name}"), getattr(layer, name)[:, :, :count]
            if saved.dtype != rows.dtype:
                raise DataError(
                    f"{path} holds {saved.dtype} {name}, and this model {rows.dtype}; load the model with the same "
                    "dtype and kv_dtype"
                )
            if saved.shape != rows.shape:
                raise DataError(f"{path} holds {name} {list(saved.shape)} where {list(rows.shape)} belong")
            rows.copy_(saved)
    for layer in cache.layers:
        layer.length += count
        layer.evicted, layer.needed = dropped
