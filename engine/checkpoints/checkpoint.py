"""Checkpoints are read as data: none of their code runs, nothing is unpickled, no file outside is opened."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...errors import AssetError, ConfigError, Setting, UnsupportedModel, first_line
from ...scaling.hf import check_counts
from ...scaling.named_scaler import as_trained, names_scaler
from ..hf_model import dtype_name
from ..packed import packed_weights
from ..storage import cache_dir
from .gguf_conversion import converted_gguf, file_behind
from .gguf_file import GgufFile
from .gguf_weights import read_gguf_weights, scales_are_finite, why_not_packed
from .hub import hub_error, hub_file, hub_folder
from .quiet import quiet_transformers
from .tensors import Shapes, check_loaded, stored_shapes, tensors_by_weight

__all__ = ["config_content", "read_config", "read_tokenizer", "read_weights", "weight_files"]

# Without this, transformers asks on the terminal whether to run code, and may read a `y` from a piped prompt.
_DATA_ONLY = {"trust_remote_code": False}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_MOST_PER_BYTE = 8  # weights in a byte of a file with quantized weights
_GGUF_OPTIONS = {"dtype", "device_map", "attn_implementation"}  # a GGUF file is converted for all others
_PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential")  # of accelerate; all else names devices


def config_content(source: str) -> dict[str, Any]:
    """The content of the config.json of a folder or hub id, as transformers reads it.

    Raises:
        AssetError: the hub does not give it, or it cannot be read.
    """
    folder = _config_folder(source)
    try:
        content: dict[str, Any] = dict(PreTrainedConfig.get_config_dict(folder)[0])
    except Exception as error:  # of the file system, or of the parser
        raise _unusable_config(source, error) from error
    return content


@quiet_transformers()
def read_config(source: str) -> Any:
    """The transformers config of a folder or hub id. If it names a scaler, it is the one from before that.

    Raises:
        AssetError: the hub does not give it, or transformers cannot read it.
    """
    folder, content = _config_folder(source), config_content(source)
    try:
        check_counts(content)
        if names_scaler(content):
            config = _trained_config(folder, content)
        else:
            config = AutoConfig.from_pretrained(folder, **_DATA_ONLY)
    except Exception as error:  # each config class raises other errors
        raise _unusable_config(source, error) from error
    if "/" in str(config._attn_implementation):
        config._attn_implementation = None  # this kernel would be fetched from the hub
    return config


def _config_folder(source: str) -> Path:
    return Path(source) if Path(source).is_dir() else hub_file(source, "config.json").parent


def _unusable_config(source: str, error: Exception) -> AssetError:
    return AssetError(f"{source}: its config.json cannot be used ({_reason(error)})")


def _trained_config(folder: Path, content: Mapping[str, Any]) -> Any:
    with tempfile.TemporaryDirectory() as trained:
        Path(trained, "config.json").write_text(json.dumps(as_trained(content)), encoding="utf-8")
        config = AutoConfig.from_pretrained(trained, **_DATA_ONLY)
    config.name_or_path = str(folder)
    return config


@quiet_transformers()
def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a folder or hub id.

    Raises:
        AssetError: the hub does not give it, or transformers cannot read it without running code of the checkpoint.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **_DATA_ONLY)
    except Exception as error:  # the parsers raise many kinds of errors
        if not Path(source).is_dir() and (unreachable := hub_error(str(source), error)) is not None:
            raise unreachable from error
        raise AssetError(f"{source}: its tokenizer cannot be read ({_reason(error)})") from error
    return tokenizer


@quiet_transformers()
def read_weights(source: str, config: Any, *, keep_blocks: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder or hub id, in eval mode. Every weight comes from its safetensors files, or the GGUF file
    behind the folder, and is finite.

    Args:
        config: the result of `read_config`.
        keep_blocks: leave the matrices of a GGUF file packed on the CPU, whatever the dtype, if the kernels know all
            of its formats.
        options: options of transformers' `from_pretrained`.

    Raises:
        ConfigError: torch cannot use a device of `device_map`.
        AssetError: weights are pickled, damaged, missing, not finite, or not used by the model.
        UnsupportedModel: transformers has no causal language model for the config.
    """
    _check_devices(options.get("device_map"))
    folder = Path(source) if Path(source).is_dir() else hub_folder(source, "*.json")
    if (file := file_behind(folder)) is not None:
        if options.keys() <= _GGUF_OPTIONS and options.get("device_map") in (None, "cpu"):
            options.pop("device_map", None)
            return _read_gguf(GgufFile(file), config, keep_blocks, **options)
        folder = converted_gguf(file)
    stored, empty = _check_size(folder, config)
    tensor_names = tensors_by_weight(source, empty, stored)
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **_DATA_ONLY, **options)
    except Exception as error:  # transformers and what it calls raise anything
        raise AssetError(f"{source}: its weights cannot be loaded ({first_line(error)})") from error
    check_loaded(source, model, info, stored, tensor_names)
    _check_numbers(source, model)
    return model.eval()


def _read_gguf(
    file: GgufFile, config: Any, keep_blocks: bool, dtype: torch.dtype | Literal["auto"] = "auto", **options: Any
) -> PreTrainedModel:
    """The model of a GGUF file on the CPU."""
    wanted: torch.dtype = config.dtype if dtype == "auto" else dtype
    if keep_blocks and (reason := why_not_packed(file)) is not None:
        sys.stderr.write(f"{file.path.name}: its weights are expanded to {dtype_name(wanted)}, because {reason}\n")
        keep_blocks = False
    model = read_gguf_weights(file, config, dtype=None if keep_blocks else wanted, **options)
    _check_numbers(str(file.path), model)
    return model


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of a folder.

    Raises:
        AssetError: there are none, or the index names another file.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            raise AssetError(
                f"{folder} holds an adapter; merge it into its model first (peft: merge_and_unload), or remove {name} "
                "if it is merged already"
            )
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
            raise AssetError(
                f"{folder}: its weights are pickled ({pickles[0]}), and a pickle may hold code; if you trust it, "
                "write safetensors with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) of "
                "transformers, copy the tokenizer's files to OUT, and load OUT"
            )
        raise AssetError(f"{folder}: it has no {_WEIGHTS}{_remedy(folder)}")
    try:
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    except Exception as error:
        raise AssetError(f"{folder / _INDEX} cannot be read ({first_line(error)}){_remedy(folder)}") from error
    present = {file.name for file in folder.glob("*.safetensors")}
    for name in names:
        if name not in present:
            raise AssetError(
                f"{folder / _INDEX} names {name!r}, which is no .safetensors file of its folder{_remedy(folder)}"
            )
    if not names:
        raise AssetError(f"{folder / _INDEX} names no file{_remedy(folder)}")
    return [folder / name for name in sorted(names)]


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs its own code, which ropewalk never runs; give a model whose code is in transformers"
    return first_line(error)


def _remedy(folder: Path) -> str:
    """What to do about damaged files in `folder`, as the end of a sentence."""
    if folder.parent == cache_dir():
        return "; this is ropewalk's converted copy, so delete the folder, and run again to convert the model again"
    return "; get the files again"


def _check_devices(device_map: str | Mapping[str, Any] | None) -> None:
    """Refuse a device that torch cannot use, before the weights are read."""
    if device_map is None or device_map in _PLACEMENTS:
        return
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in dict.fromkeys(devices):
        if device == "disk":
            continue
        try:
            torch.empty(0, device=device)
        except Exception as error:  # torch raises AssertionError, RuntimeError and more
            raise ConfigError(
                Setting("device_map", repr(device_map), "given"),
                f": torch {torch.__version__} cannot use the device {device!r} here ({first_line(error)}); leave out ",
                Setting("device_map", form="name"),
                " for the CPU or the GPU of this machine, or install a torch for the device",
            ) from error


def _check_size(folder: Path, config: Any) -> tuple[Shapes, PreTrainedModel]:
    """The shapes in the files, and the model without weights. A config with more weights than the files is refused
    before memory is allocated for it."""
    remedy, files = _remedy(folder), weight_files(folder)
    shapes = stored_shapes(files, remedy)
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    if getattr(config, "quantization_config", None):
        stored += _MOST_PER_BYTE * sum(file.stat().st_size for file in files)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 1 <= layers <= len(shapes):
        raise AssetError(f"{folder}: its config has {layers} layers, and its files hold {len(shapes)} tensors{remedy}")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
            expected = sum(tensor.numel() for tensor in empty.parameters())
    except ValueError as error:
        raise UnsupportedModel(f"{folder}: transformers has no causal language model for it: {error}") from error
    except Exception as error:
        raise AssetError(
            f"{folder}: transformers cannot build the model of its config ({first_line(error)})"
        ) from error
    if expected > stored:
        raise AssetError(f"{folder}: its config needs {expected} weights, and its files hold {stored}{remedy}")
    return shapes, empty


def _check_numbers(source: str, model: PreTrainedModel) -> None:
    for name, tensor in _numbers(model):
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass; NaN gives NaN
            raise _not_finite(source, name)
    for name, packed in packed_weights(model).items():
        if not scales_are_finite(packed):
            raise _not_finite(source, name)


def _not_finite(source: str, name: str) -> AssetError:
    return AssetError(f"{source}: its weight {name!r} holds NaN or infinity; get an undamaged copy of the model")


def _numbers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The floating-point weights on this machine, without those of 8 bits, which torch cannot compare."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta and tensor.numel():
            yield name, tensor
