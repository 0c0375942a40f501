"""GGUF files, converted once to a Hugging Face folder (float32 safetensors and a tokenizer).

transformers reads the weights. What its reader leaves out and the model needs is added here, or the file is
refused: how the rotary frequencies are scaled, and how the tokenizer splits digits.

Weights are kept in float32 because that is exact: rounding SmolLM2-135M's Q4_1 values to bfloat16 as well moves
the loss on 2048 tokens of kjv by 0.001 nat (1.6113 to 1.6100), and a caller can still load the folder in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from ..errors import AssetError, UnsupportedModel
from .storage import cache_dir, filling

__all__ = ["conversion_folder", "convert_gguf", "converted_gguf"]

_REVISION = 1
"""Raised when the conversion changes, so that folders of an older one are not used."""

_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
"""Values of `tokenizer.ggml.pre` whose split is GPT-2's with every digit by itself; transformers 5.23 has no
entry for them and leaves digits together, which also joins differently the spaces before them."""


def converted_gguf(file: Path, *, quiet: bool = False) -> Path:
    """The Hugging Face folder of a GGUF file, converted on the first call and kept in the cache.

    Raises:
        AssetError: no such file, or no disk space.
        UnsupportedModel: a file that cannot be converted faithfully.
    """
    folder = conversion_folder(file)
    if not folder.exists():
        reader = _open(file)
        needed = 4 * sum(int(tensor.n_elements) for tensor in reader.tensors) + 20_000_000
        with filling(folder, needed=needed, what=file.name) as work:
            if work is not None:
                _convert(file, reader, work, quiet=quiet)
    return folder


def conversion_folder(file: Path) -> Path:
    """Where `converted_gguf` keeps the folder of `file`: another path, size or time of change is another folder.

    Raises:
        AssetError: no such file.
    """
    if not file.is_file():
        raise AssetError(f"{file}: no such file")
    state = file.stat()
    key = f"{_REVISION} {file.resolve()} {state.st_size} {state.st_mtime_ns}"
    return cache_dir() / f"gguf-{file.stem}-{hashlib.sha256(key.encode()).hexdigest()[:12]}"


def convert_gguf(file: Path, out: Path, *, quiet: bool = False) -> Path:
    """Write the model and tokenizer of `file` into the folder `out`, and return `out`.

    Raises:
        AssetError: no such file.
        UnsupportedModel: transformers cannot read it, tensors are missing, or its rotary scaling is one that
            cannot be carried over.
    """
    if not file.is_file():
        raise AssetError(f"{file}: no such file")
    _convert(file, _open(file), out, quiet=quiet)
    return out


def _open(file: Path) -> Any:
    import gguf
    import numpy as np

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Looks at the mapped file through a plain array: slicing a memmap costs three times as much, and parsing
        a vocabulary of 49k tokens is a million slices (4.5 s against 1.5 s)."""

        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: Any) -> None:
            self._data = mapped.view(np.ndarray)

    try:
        return Reader(file)
    except Exception as error:  # the reader parses bytes unchecked: a damaged file raises anything
        raise UnsupportedModel(f"{file}: not a readable GGUF file ({_first_line(error)})") from error


@contextlib.contextmanager
def _parsed_once(reader: Any) -> Iterator[None]:
    """Gives transformers the reader that is there already, and one table of tensor names: by itself it parses the
    file three times and builds the table once for every module (SmolLM2-135M: 92 s against 23 s, on two busy
    cores)."""
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", lambda *_, **__: reader),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield


def _convert(file: Path, reader: Any, out: Path, *, quiet: bool) -> None:
    from rich.console import Console

    scaling = _rope_scaling(file, reader)
    console = Console(file=sys.stderr, quiet=quiet)  # this very stream: transformers gets another one meanwhile
    shown = console.status(f"converting {file.name}") if console.is_terminal else contextlib.nullcontext()
    with shown, silent_transformers(), _parsed_once(reader):
        model, tokenizer = _load(file)
        if scaling is not None:
            _set_scaling(file, model.config, scaling)
        if _field(reader, "tokenizer.ggml.pre") in _SINGLE_DIGITS:
            _split_digits(tokenizer)
        # transformers calls every model that came from a GGUF quantized, and would not save it.
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        model.is_quantized = False
        for name in ("quantization_config", "_model_name_or_path"):
            model.config.__dict__.pop(name, None)
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


def _load(file: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": file.name, "local_files_only": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(file.parent), **where, **_dequantize(), dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(str(file.parent), **where)
    except Exception as error:  # from a parser of foreign files: KeyError, ValueError, RuntimeError and more
        raise UnsupportedModel(f"{file}: transformers cannot read this GGUF file ({_first_line(error)})") from error
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            f"{file}: {len(missing)} tensors of the model are not in the file, {missing[0]!r} first; "
            "transformers would fill them with random numbers"
        )
    return model, tokenizer


def _dequantize() -> dict[str, Any]:
    """Options that keep transformers from leaving weights packed where it finds a kernel for them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _split_digits(tokenizer: Any) -> None:
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )


def _rope_scaling(file: Path, reader: Any) -> dict[str, Any] | None:
    """`rope_parameters` entries for the file's rotary scaling, which transformers does not read.

    llama.cpp writes linear and yarn as metadata, Llama-3's as a tensor of d/2 divisors of the frequencies, and
    LongRoPE's as two of them.
    """
    prefix = f"{_field(reader, 'general.architecture')}.rope."
    fields = {
        name.removeprefix(prefix + "scaling."): _field(reader, name)
        for name in reader.fields
        if name.startswith(prefix + "scaling.")
    }
    fields.pop("finetuned", None)
    kind = fields.pop("type", "none")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "rope_freqs.weight" in tensors:
        base = float(_field(reader, prefix + "freq_base") or 10_000.0)
        return _llama3(file, tensors["rope_freqs.weight"].data, base)
    if kind == "none" and not fields:
        return None
    if kind == "linear" and set(fields) == {"factor"}:
        return {"rope_type": "linear", "factor": float(fields["factor"])}
    if kind == "yarn" and set(fields) == {"factor", "original_context_length"}:
        return {
            "rope_type": "yarn",
            "factor": float(fields["factor"]),
            "original_max_position_embeddings": int(fields["original_context_length"]),
        }
    raise UnsupportedModel(
        f"{file}: rotary scaling {kind!r} with {', '.join(sorted(fields)) or 'no fields'} cannot be carried over from "
        "a GGUF file; load the original checkpoint"
    )


def _llama3(file: Path, divisors: Any, base: float) -> dict[str, Any]:
    """The Llama-3 parameters that give these divisors [d/2], found by trying the released ones."""
    import torch

    from ..scaling.llama3 import Llama3
    from ..scaling.rope import RopeSpec

    given = torch.tensor(divisors, dtype=torch.float64).flatten()
    rope = RopeSpec(dim=2 * len(given), base=base, trained_length=8192)
    scaler = Llama3(factor=float(given.max()))
    if not torch.allclose(rope.theta / scaler.frequencies(rope).inv_freq, given, rtol=1e-4, atol=0):
        raise UnsupportedModel(
            f"{file}: its frequency divisors (rope_freqs.weight) are not those of Llama 3.1 with factor "
            f"{scaler.factor:g}; load the original checkpoint"
        )
    return {
        "rope_type": "llama3",
        "factor": scaler.factor,
        "low_freq_factor": scaler.low_freq_factor,
        "high_freq_factor": scaler.high_freq_factor,
        "original_max_position_embeddings": rope.trained_length,
    }


def _set_scaling(file: Path, config: Any, scaling: dict[str, Any]) -> None:
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        raise UnsupportedModel(
            f"{file}: {scaling['rope_type']} scaling for a model without one common set of rotary frequencies "
            "cannot be carried over from a GGUF file; load the original checkpoint"
        )
    config.rope_parameters = {**parameters, **scaling}


def _field(reader: Any, name: str) -> Any:
    field = reader.get_field(name)
    return None if field is None else field.contents()


def _first_line(error: Exception) -> str:
    text = re.sub(r"\s+", " ", str(error)).strip()
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        # One of its progress bars is drawn whatever the logging says.
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
