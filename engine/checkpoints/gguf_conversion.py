"""The Hugging Face folders of GGUF files, kept in the cache.

The small folder has a config, a tokenizer, and the path of the file, from which the weights are read at every load
(gguf_weights.py). For an architecture that is not read there, and for GPUs, transformers reads the weights once. They
are stored as float32 safetensors, which is exact. Rounding the Q4_1 values of SmolLM2-135M to bfloat16 changes the loss
on 2048 tokens of kjv by 0.001 nat (1.6113 to 1.6100). A caller can still load the folder in bfloat16.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AssetError
from ..storage import cache_dir, fill_once
from .quiet import quiet_transformers

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["convert_gguf", "converted_gguf", "file_behind", "folder_of_gguf", "prepared_gguf"]

_CONFIG_BYTES = 20_000_000  # of a config and tokenizer, at most
_REVISION = 5
"""Part of the cache key. Raise it when the folders change."""

_PATH = "gguf_path.txt"
"""The name of the file with the path of the GGUF file."""


def prepared_gguf(file: Path, *, quiet: bool = False) -> Path:
    """The Hugging Face folder of a GGUF file, made on the first call and cached.

    It holds the weights only if just transformers can read them; else they are read from the GGUF file.

    Args:
        quiet: show no progress, even on a terminal.

    Raises:
        AssetError: there is no such file, or no disk space.
        UnsupportedModel: transformers cannot read the file, or a config cannot hold its rotary scaling.
    """
    folder = folder_of_gguf(file)
    if folder.exists():
        return folder
    from .gguf_file import GgufFile
    from .gguf_weights import ARCHITECTURES

    opened = GgufFile(file)
    whole = opened.arch not in ARCHITECTURES
    if whole and not quiet:
        _say_converted(file, f"the blocks of a {opened.arch} model cannot be used as they are")
    with fill_once(folder, needed=4 * opened.weights * whole + _CONFIG_BYTES, what=file.name) as work:
        if work is not None:
            (_convert if whole else _write_small_folder)(opened, work, quiet=quiet)
    return folder


def folder_of_gguf(file: Path) -> Path:
    """The path of the folder that `prepared_gguf` makes. It depends on the path, size and modification time of `file`.

    Raises:
        AssetError: there is no such file.
    """
    return _folder(file, "gguf")


def file_behind(folder: Path) -> Path | None:
    """The GGUF file that holds the weights of a folder of `prepared_gguf`; None for any other folder."""
    path = folder / _PATH
    if folder.parent != cache_dir() or not path.is_file():  # a folder of someone else may not name a file outside
        return None
    return Path(path.read_text(encoding="utf-8"))


def converted_gguf(file: Path, *, quiet: bool = False) -> Path:
    """A Hugging Face folder with all of a GGUF file, which is converted on the first call and cached.

    Raises:
        AssetError: there is no such file, or no disk space.
        UnsupportedModel: a converted model would differ from the file.
    """
    folder = _folder(file, "gguf-float32")
    if not folder.exists():
        from .gguf_file import GgufFile

        opened = GgufFile(file)
        if not quiet:
            _say_converted(file, "GPUs and other devices of device_map, and tp_plan, cannot use its blocks")
        with fill_once(folder, needed=4 * opened.weights + _CONFIG_BYTES, what=file.name) as work:
            if work is not None:
                _convert(opened, work, quiet=quiet)
    return folder


def convert_gguf(file: Path, out: Path, *, quiet: bool = False) -> Path:
    """Write the model and tokenizer of `file` into the folder `out`, and return `out`.

    Raises:
        AssetError: there is no such file.
        UnsupportedModel: transformers cannot read the file, tensors are missing, or a config cannot hold its rotary
            scaling.
    """
    from .gguf_file import GgufFile

    _convert(GgufFile(file), out, quiet=quiet)
    return out


def _say_converted(file: Path, why: str) -> None:
    sys.stderr.write(f"{file.name}: its weights are stored once more, as float32, because {why}\n")


def _folder(file: Path, kind: str) -> Path:
    if not file.is_file():
        raise AssetError(f"{file}: no such file")
    state = file.stat()
    key = f"{_REVISION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return cache_dir() / f"{kind}-{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def _write_small_folder(file: GgufFile, out: Path, *, quiet: bool) -> None:
    from .gguf_config import write_config
    from .gguf_tokenizer import read_gguf_tokenizer

    with _shown(f"reading {file.path.name}", quiet), quiet_transformers():
        write_config(file, out)
        read_gguf_tokenizer(file).save_pretrained(out)
    (out / _PATH).write_text(str(file.path.resolve()), encoding="utf-8")


def _convert(file: GgufFile, out: Path, *, quiet: bool) -> None:
    from .gguf_config import rope_parameters, set_config
    from .gguf_tokenizer import read_gguf_tokenizer

    rope_parameters(file)  # refuses what no config can hold before the weights are read
    with _shown(f"converting {file.path.name}", quiet), quiet_transformers():
        model, tokenizer = _load_model(file), read_gguf_tokenizer(file)
        set_config(file, model)
        # transformers marks every model from a GGUF file as quantized, and refuses to save it.
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        model.is_quantized = False
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _shown(what: str, quiet: bool) -> Iterator[None]:
    """Show on a terminal what is being done."""
    from rich.console import Console
    from rich.markup import escape

    console = Console(stderr=True, quiet=quiet)
    with console.status(escape(what)) if console.is_terminal else contextlib.nullcontext():
        yield


def _load_model(file: GgufFile) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from .gguf_file import check_loaded, read_by_transformers

    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # check_loaded refuses other shapes
    with read_by_transformers(file) as source:
        model, info = AutoModelForCausalLM.from_pretrained(**source, **_dequantize(), **options, dtype=torch.float32)
    check_loaded(file, model, info)
    return model


def _dequantize() -> dict[str, Any]:
    """Options with which transformers unpacks all weights, also those for which it has a kernel."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {} if config is None else {"quantization_config": config(dequantize=True)}
