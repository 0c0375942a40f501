"""GGUF files, converted once to a Hugging Face folder (float32 safetensors and a tokenizer).

transformers reads the weights. What its reader leaves out and the model needs is added here, or the file is
refused: how the rotary frequencies are scaled, where a text ends, and most of the tokenizer (gguf_tokenizer.py).

Weights are kept in float32 because that is exact: rounding SmolLM2-135M's Q4_1 values to bfloat16 as well moves
the loss on 2048 tokens of kjv by 0.001 nat (1.6113 to 1.6100), and a caller can still load the folder in bfloat16.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import AssetError, UnsupportedModel, first_line
from ..storage import cache_dir, fill_once
from .quiet import quiet_transformers

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["conversion_folder", "convert_gguf", "converted_gguf", "gguf_tokenizer"]

_REVISION = 3
"""Raised when the conversion changes, so that folders of an older one are not used."""

_BUILT = ("gpt2", "llama")
"""Values of `tokenizer.ggml.model` whose tokenizer is built here; transformers does the others."""

_GEMMA = ("gemma", "gemma2", "gemma3")
"""Architectures whose merges do not follow their SentencePiece scores, which transformers knows."""


_ATTENTION = (
    ("attention.sliding_window", "sliding_window", 0),
    ("attn_logit_softcapping", "attn_logit_softcapping", 0.0),
    ("final_logit_softcapping", "final_logit_softcapping", 0.0),
)
"""Fields that change what is computed: their names in a config, and the value that means without."""


def converted_gguf(file: Path, *, quiet: bool = False) -> Path:
    """The Hugging Face folder of a GGUF file, converted on the first call and kept in the cache.

    Raises:
        AssetError: no such file, or no disk space.
        UnsupportedModel: a file that cannot be converted faithfully.
    """
    folder = conversion_folder(file)
    if not folder.exists():
        from .gguf_file import GgufFile

        opened = GgufFile(file)
        needed = 4 * opened.weights + 20_000_000
        with fill_once(folder, needed=needed, what=file.name) as work:
            if work is not None:
                _convert(opened, work, quiet=quiet)
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
    from .gguf_file import GgufFile

    _convert(GgufFile(file), out, quiet=quiet)
    return out


def gguf_tokenizer(file: Path) -> Any:
    """The transformers tokenizer of `file`, without its weights.

    Raises:
        AssetError: no such file.
        UnsupportedModel: transformers cannot read it.
    """
    from .gguf_file import GgufFile

    return _load_tokenizer(GgufFile(file))


@contextlib.contextmanager
def _parsed_once(reader: Any) -> Iterator[None]:
    """Gives transformers the reader that is there already, and one table of tensor names: by itself it parses the
    file three times and builds the table once for every module (SmolLM2-135M: 92 s against 23 s, on two busy
    cores). Its bar is left out, which it would draw whatever its settings say."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    replaced: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lambda *_, **__: reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced if hasattr(module, name)]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, _ in replaced:
            delattr(module, name)
        for module, name, value in before:
            setattr(module, name, value)


def _convert(file: GgufFile, out: Path, *, quiet: bool) -> None:
    from rich.console import Console
    from rich.markup import escape

    from .gguf_tokenizer import end_ids

    scaling = _rope_parameters(file)
    console = Console(stderr=True, quiet=quiet)
    shown = console.status(escape(f"converting {file.path.name}")) if console.is_terminal else contextlib.nullcontext()
    with shown, quiet_transformers():
        model, tokenizer = _load_model(file), _load_tokenizer(file)
        _set_rope(file, model.config, scaling or {})
        _set_attention(file, model.config)
        # transformers calls every model that came from a GGUF quantized, and would not save it.
        if hasattr(model, "hf_quantizer"):
            del model.hf_quantizer
        model.is_quantized = False
        for name in ("quantization_config", "_model_name_or_path"):
            model.config.__dict__.pop(name, None)
        _set_ends(model, end_ids(file))
        model.save_pretrained(out)
        tokenizer.save_pretrained(out)


@contextlib.contextmanager
def _read_by_transformers(file: GgufFile) -> Iterator[dict[str, Any]]:
    """Keywords with which transformers finds the file, and nothing that lies beside it.

    Raises:
        UnsupportedModel: it cannot read the file.
    """
    try:
        with tempfile.TemporaryDirectory() as alone, quiet_transformers(), _parsed_once(file.reader):
            (Path(alone) / file.path.name).symlink_to(file.path.resolve())
            where = {"pretrained_model_name_or_path": alone, "gguf_file": file.path.name}
            yield {**where, "local_files_only": True, "trust_remote_code": False}
    except Exception as error:  # from a parser of foreign files: KeyError, ValueError, RuntimeError and more
        raise UnsupportedModel(f"{file.path}: transformers cannot read this GGUF file ({first_line(error)})") from error


def _load_model(file: GgufFile) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from .gguf_file import check_loaded

    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
    with _read_by_transformers(file) as where:
        model, info = AutoModelForCausalLM.from_pretrained(**where, **_dequantize(), **options, dtype=torch.float32)
    check_loaded(file, model, info)
    return model


def _load_tokenizer(file: GgufFile) -> Any:
    from transformers import AutoTokenizer

    from .gguf_tokenizer import build_tokenizer

    if file.required("tokenizer.ggml.model") in _BUILT and file.arch not in _GEMMA:
        return build_tokenizer(file)
    with _read_by_transformers(file) as where:
        return AutoTokenizer.from_pretrained(**where)


def _dequantize() -> dict[str, Any]:
    """Options that keep transformers from leaving weights packed where it finds a kernel for them."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)  # older versions always unpack
    return {} if config is None else {"quantization_config": config(dequantize=True)}


def _set_ends(model: Any, ids: list[int]) -> None:
    """Let a text end at any of `ids`."""
    ends = ids if len(ids) > 1 else next(iter(ids), None)
    for config in (model.config.get_text_config(), model.generation_config):
        config.eos_token_id = ends


def _rope_parameters(file: GgufFile) -> dict[str, Any] | None:
    """`rope_parameters` entries for the file's rotary scaling, which transformers does not read."""
    rope = file.rope
    if not rope.scaling and rope.divisors is None:
        return None
    from ...scaling import hf_write

    configured = file.configured
    if not configured.scaler.parts:
        return None
    parameters = hf_write.write(configured.rope, configured.scaler)
    if parameters["rope_type"] == "linear" and "original_context_length" in rope.scaling:
        parameters["original_max_position_embeddings"] = configured.rope.trained_length
    return parameters


def _set_rope(file: GgufFile, config: Any, scaling: dict[str, Any]) -> None:
    """Write the file's rotary embedding into the config: of some families transformers leaves out the base, the width
    or both, and takes the defaults of another model.

    Raises:
        UnsupportedModel: the config cannot hold it.
    """
    parameters = getattr(config, "rope_parameters", None) or {}
    if "rope_theta" not in parameters:
        if scaling:
            raise UnsupportedModel(
                f"{file.path}: {scaling['rope_type']} scaling for a model without one common set of rotary frequencies "
                "cannot be carried over from a GGUF file; load the original checkpoint"
            )
        return
    from ...scaling import hf

    rope, head_dim = file.rope, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if rope.dim != head_dim or "partial_rotary_factor" in parameters:
        parameters = {**parameters, "partial_rotary_factor": rope.dim / head_dim}
    config.rope_parameters = {**parameters, "rope_theta": rope.base, **scaling}
    read = hf.read(config)[None].rope
    if (read.dim, read.base) != (rope.dim, rope.base):
        raise UnsupportedModel(
            f"{file.path}: it rotates {rope.dim} of {head_dim} dimensions with the base {rope.base:g}, and the config "
            f"that transformers makes of it {read.dim} with {read.base:g}; load the original checkpoint"
        )


def _set_attention(file: GgufFile, config: Any) -> None:
    """Write what else changes the attention into the config.

    Raises:
        UnsupportedModel: the config cannot hold it.
    """
    for key, setting, without in _ATTENTION:
        value = file.field(f"{{arch}}.{key}")
        if value in (None, without) or (
            setting == "sliding_window" and value >= file.required("{arch}.context_length")
        ):
            continue
        if not hasattr(config, setting):
            raise UnsupportedModel(
                f"{file.path}: its {file.arch}.{key} is {value}, which the {type(config).__name__} of transformers "
                "cannot say; load the original checkpoint"
            )
        setattr(config, setting, value)
