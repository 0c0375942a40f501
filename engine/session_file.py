"""The file of a session or a chat: its text or messages, and the keys and values of what was read."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..errors import ConfigError, DataError
from ..scaling.spec import parse
from .kv_cache import KVCache
from .prefix_cache import PrefixCache
from .scaled_model import ScaledModel
from .storage import make_readable

_SPARE = 256  # tokens of spare room after loading a file


def write_session_file(
    model: ScaledModel, path: str | Path, cached: PrefixCache, form: str, content: dict[str, Any]
) -> None:
    """Write a `.safetensors` file. A file at `path` is replaced when the new one is complete.

    Args:
        form: the name of the format. `read_session_file` refuses another one.
        content: the text or the messages, as JSON holds them.

    Raises:
        ConfigError: the model is not run by the compiled kernels; only their caches can be saved.
        DataError: the file cannot be written, or JSON cannot hold the content.
    """
    if cached.cache is not None and not isinstance(cached.cache, KVCache):
        raise ConfigError("only sessions of the compiled kernels can be saved; this model is run by transformers")
    tensors = {}
    for index, layer in enumerate(cached.cache.layers if cached.cache is not None else []):
        for name in layer.buffers:
            tensors[f"{index}.{name}"] = getattr(layer, name)[:, :, : layer.length].contiguous()
    scaler, length = cached.rope_state
    header = {"format": form, **content, "ids": cached.ids, "rope": str(scaler), "length": length}
    if cached.cache is not None:
        header["dropped"] = [cached.cache.layers[0].evicted, cached.cache.layers[0].needed]
    target = Path(path)
    try:
        metadata = {"session": json.dumps(header), "weights": model.fingerprint}
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as folder:
            written = Path(folder, "session")
            save_file(tensors, str(written), metadata=metadata)
            make_readable(written)
            written.replace(target)
    except (OSError, SafetensorError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be written: {error}") from error


def read_session_file(model: ScaledModel, path: str | Path, form: str) -> tuple[dict[str, Any], PrefixCache]:
    """The header of a file that `write_session_file` wrote, and its cache.

    Raises:
        ConfigError: the model is not run by the compiled kernels.
        ContextOverflow: the session does not fit into memory.
        DataError: the file is not a session of this format, or belongs to another model or kv_dtype.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if "session" not in metadata:
                raise DataError(f"{path} is not a session that ropewalk saved")
            header = json.loads(metadata["session"])
            if header["format"] != form:
                raise DataError(f"{path} is a {header['format']!r}; give a {form!r}")
            if metadata["weights"] != model.fingerprint:
                raise DataError(f"{path} was saved by another model than {model.name}")
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
            if not isinstance(cache, KVCache):
                raise ConfigError("sessions can be loaded by the compiled kernels only")
            _fill(cache, file, held, (evicted, needed), path)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, OverflowError, RecursionError) as error:
        if isinstance(error, ConfigError):  # a ValueError too
            raise
        raise DataError(f"{path} cannot be read as a session: {error}") from error
    cached = PrefixCache()
    cached.hold(cache, ids, rope_state)
    return header, cached


def _fill(cache: KVCache, file: Any, count: int, dropped: tuple[int, int], path: str | Path) -> None:
    cache.reserve(count)
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
    cache.advance(count)
    for layer in cache.layers:
        layer.evicted, layer.needed = dropped
