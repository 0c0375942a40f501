"""Whether a model that was loaded from a GGUF file holds all of its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

from ...errors import UnsupportedModel
from .tensors import next_token_layers

if TYPE_CHECKING:
    from .gguf_file import GgufFile

__all__ = ["check_loaded"]

_ROTARY = re.compile(r"^rope_|(^|\.)rope_freqs\.|attn_rot_embd\.")
"""Tensors that the config says, or that other programs keep as they go."""


def check_loaded(file: GgufFile, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not all of its file. transformers' reader skips what it does not know, and reports only
    some of it, so the weights are counted: as many have to be in the model as in the file.

    Args:
        model: of transformers.
        info: what `from_pretrained` says with `output_loading_info`.

    Raises:
        UnsupportedModel: a tensor is missing, has another shape, or has no place in the model.
    """
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            f"{file.path}: {len(missing)} tensors of the model are not in the file, {missing[0]!r} first; "
            "transformers would fill them with random numbers"
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UnsupportedModel(
            f"{file.path}: its tensor {name!r} has the shape {list(found)}, and its fields say {list(expected)}"
        )
    needed = _needed(file, model)
    stored = sum(int(file.tensors[name].n_elements) for name in needed)
    held = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if stored == held:
        return
    unused = sorted(needed - _places(file, model)) or sorted(needed)
    raise UnsupportedModel(
        f"{file.path}: its tensors hold {stored} weights, and the {type(model).__name__} that transformers makes of "
        f"its fields holds {held}, so some are not used ({', '.join(unused[:3])}) and it would compute something "
        "else; load the original checkpoint"
    )


def _needed(file: GgufFile, model: Any) -> set[str]:
    """Tensors on which the logits depend."""
    config, extra = model.config.get_text_config(), next_token_layers(file.tensors)
    first_shared = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = set()
    for name, tensor in file.tensors.items():
        layer, _, kind = name.removeprefix("blk.").partition(".")
        number = int(layer) if layer.isdigit() else -1
        shared = number >= first_shared and kind.startswith(("attn_k", "attn_v"))
        if not (_ROTARY.search(name) or number in extra or shared or (tied and _is_embedding(file, name, tensor))):
            names.add(name)
    return names


def _is_embedding(file: GgufFile, name: str, tensor: Any) -> bool:
    """True for an output matrix that is the embedding once more."""
    rows = file.tensors.get("token_embd.weight")
    if name != "output.weight" or rows is None or rows.tensor_type != tensor.tensor_type:
        return False
    return rows.data.shape == tensor.data.shape and torch.equal(torch.tensor(rows.data), torch.tensor(tensor.data))


def _places(file: GgufFile, model: Any) -> set[str]:
    """The tensors that have a place in the model, by their names in the file."""
    arch = next((arch for arch, name in MODEL_ARCH_NAMES.items() if name == file.arch), None)
    if arch is None:
        return set()
    names = get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    found = (names.get_name(own, try_suffixes=(".weight", ".bias")) for own in model.state_dict())
    return {name for name in found if name is not None}
