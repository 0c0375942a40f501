"""Checkpoints from anywhere, read as data: no code of theirs runs, nothing is unpickled, nothing outside is opened."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

from ...errors import AssetError, UnsupportedModel, first_line
from ...scaling.hf import check_counts
from ..storage import cache_dir
from .quiet import quiet_transformers
from .tensors import Shapes, check_loaded, stored_shapes, tensors_by_weight

__all__ = ["from_hub", "read_config", "read_tokenizer", "read_weights", "weight_files"]

# Left open, transformers asks on the terminal whether to run code, and takes a `y` that was piped in for a prompt.
_DATA_ONLY = {"trust_remote_code": False}
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_PACKED = 8  # weights in a stored byte at most, where a config says that they are quantized


@quiet_transformers()
def read_config(source: str) -> Any:
    """The transformers config of a folder or hub id.

    Raises:
        AssetError: it is none that transformers can read.
        OSError, ValueError: the hub did not give it.
    """
    try:
        content, _ = PreTrainedConfig.get_config_dict(source)
        check_counts(content)
        config = AutoConfig.from_pretrained(source, **_DATA_ONLY)
    except Exception as error:  # each family's config class raises its own
        if isinstance(error, OSError | ValueError) and not Path(source).is_dir():
            raise  # it may not even be a name of the hub
        raise AssetError(f"{source}: its config.json cannot be used ({_reason(error)})") from error
    if "/" in str(config._attn_implementation):
        config._attn_implementation = None  # a kernel that would be fetched from the hub
    return config


@quiet_transformers()
def read_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """The transformers tokenizer of a folder or hub id.

    Raises:
        AssetError: there is none that transformers can read without running code of the checkpoint.
    """
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **_DATA_ONLY)
    except Exception as error:  # from parsers of foreign files
        raise AssetError(f"{source}: its tokenizer cannot be read ({_reason(error)})") from error
    return tokenizer


@quiet_transformers()
def read_weights(source: str, config: Any, **options: Any) -> PreTrainedModel:
    """The model of a folder or hub id, in eval mode; every weight is from its safetensors files, and a number.

    Args:
        config: of `read_config`.
        options: of transformers' `from_pretrained`.

    Raises:
        AssetError: weights that are pickled, damaged, not all there, not finite, or that the model does not use.
        UnsupportedModel: transformers has no causal language model for the config.
    """
    folder = Path(source) if Path(source).is_dir() else from_hub(source, "*.json")
    stored, empty = _check_size(folder, config)
    places = tensors_by_weight(source, empty, stored)
    options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, config=config, **_DATA_ONLY, **options)
    except Exception as error:  # transformers and what it calls raise anything
        raise AssetError(f"{source}: its weights cannot be loaded ({first_line(error)})") from error
    check_loaded(source, model, info, stored, places)
    _check_numbers(source, model)
    return model.eval()


def from_hub(name: str, *patterns: str) -> Path:
    """The folder of a hub id: its weights, and the files beside them whose names match `patterns`.

    Raises:
        AssetError: the hub did not give them.
    """
    from huggingface_hub import snapshot_download

    wanted = ["model*.safetensors", *patterns]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise AssetError(f"the hub did not give the files of {name} ({first_line(error)})") from error


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the weights of a folder.

    Raises:
        AssetError: there are none, or its index names what is none.
    """
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if (folder / name).exists():
            raise AssetError(
                f"{folder} holds an adapter; merge it into its model first (peft: merge_and_unload), or remove {name} "
                "if that is done"
            )
    if (folder / _WEIGHTS).exists():
        return [folder / _WEIGHTS]
    if not (folder / _INDEX).exists():
        if pickles := sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES):
            raise AssetError(
                f"{folder}: its weights are pickled ({pickles[0]}), and a pickle may hold code; if you trust it, "
                "convert it with AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(OUT) of transformers, "
                "which writes safetensors, copy the tokenizer's files to OUT, and load that"
            )
        raise AssetError(f"{folder}: no {_WEIGHTS} there.{_again(folder)}")
    try:
        names = set(json.loads((folder / _INDEX).read_bytes())["weight_map"].values())
    except Exception as error:
        raise AssetError(f"{folder / _INDEX} cannot be read ({first_line(error)})") from error
    there = {file.name for file in folder.glob("*.safetensors")}
    for name in names:
        if name not in there:
            raise AssetError(f"{folder / _INDEX} names {name!r}, which is no .safetensors file of its folder")
    if not names:
        raise AssetError(f"{folder / _INDEX} names no file")
    return [folder / name for name in sorted(names)]


def _reason(error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which ropewalk never runs; give a model whose code transformers has"
    return first_line(error)


def _again(folder: Path) -> str:
    return " It is ropewalk's own copy: delete its folder, and it is made anew" if folder.parent == cache_dir() else ""


def _check_size(folder: Path, config: Any) -> tuple[Shapes, PreTrainedModel]:
    """The tensors of the files, and the model without weights; a config that promises more is refused before memory is
    taken for it."""
    again, files = _again(folder), weight_files(folder)
    shapes = stored_shapes(files, again)
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    if getattr(config, "quantization_config", None):
        stored += _PACKED * sum(file.stat().st_size for file in files)
    layers = getattr(config.get_text_config(), "num_hidden_layers", 1)
    if not 1 <= layers <= len(shapes):
        raise AssetError(f"{folder}: its config has {layers} layers, and its files hold {len(shapes)} tensors.{again}")
    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config)
            promised = sum(tensor.numel() for tensor in empty.parameters())
    except ValueError as error:
        raise UnsupportedModel(f"{folder}: transformers has no causal language model for it: {error}") from error
    except Exception as error:
        raise AssetError(
            f"{folder}: transformers cannot build the model of its config ({first_line(error)})"
        ) from error
    if promised > stored:
        raise AssetError(f"{folder}: its config promises {promised} weights, and its files hold {stored}.{again}")
    return shapes, empty


def _check_numbers(source: str, model: PreTrainedModel) -> None:
    for name, tensor in _numbers(model):
        if not all(bound.isfinite() for bound in tensor.aminmax()):  # one pass, and NaN comes through
            raise AssetError(
                f"{source}: its weight {name!r} holds NaN or infinity; get it again, or from before it was damaged"
            )


def _numbers(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The floating-point weights that are on this machine and that torch can compare: not 8 bits wide."""
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        if tensor.is_floating_point() and tensor.element_size() > 1 and not tensor.is_meta and tensor.numel():
            yield name, tensor
