"""Checks that a model in memory is what its config and weights say, so that a checkpoint can hold it."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ..checkpoints.tensors import untied
from ..packed import unpacked
from ..patches.patch import PatchRecord, patch_record
from ..scaled_model import ScaledModel
from .rebuilt import check_computes, new_model

__all__ = ["check_type", "check_unmodified"]


def check_type(model: Any) -> None:
    """Refuse an object that cannot be exported, such as the wrapper of an adapter.

    Raises:
        UnsupportedModel: the message says what to give instead.
    """
    if isinstance(model, str | Path | ScaledModel | PreTrainedModel):
        return
    remedy = "merge the adapter and export the result (peft: model = model.merge_and_unload())"
    if not hasattr(model, "merge_and_unload"):
        remedy = "give the transformers model inside it, without what the wrapper adds"
    raise UnsupportedModel(
        f"an object of type {type(model).__name__} cannot be exported; export takes a name, a folder, a model that "
        f"ropewalk.load returned, or a transformers model. So {remedy}"
    )


def check_unmodified(model: ScaledModel | PreTrainedModel) -> PreTrainedModel:
    """Refuse a model that computes something else than a new model of its config with the same weights.

    A checkpoint holds the config and the weights only. So these are refused: adapters that are not merged, parametrized
    weights, layers that were removed or are used twice, hooks, numbers that were changed.

    Args:
        model: a model that `load` returned, or a transformers model; patched or not.

    Returns:
        The transformers model, with the blocks of a GGUF file expanded to float32 weights.

    Raises:
        UnsupportedModel: the message names the first difference, and how to remove it.
    """
    if isinstance(model, PreTrainedModel):
        plain = unpacked(model)
        _check(plain, patch_record(model))
        return plain
    with model.running(None) as runner:
        scaler, length = runner.rope_state
        plain = unpacked(model.hf)
        _check(plain, PatchRecord(scaler, length=length))
    return plain


def _check(model: PreTrainedModel, patch: PatchRecord | None) -> None:
    class_name = type(model).__name__
    for name, module in model.named_modules():
        if hasattr(module, "base_layer") or hasattr(module, "modules_to_save"):
            raise UnsupportedModel(
                f"{class_name} holds an adapter at {name!r} beside its weights; merge it into them first (peft: model "
                "= model.merge_and_unload()), and export the result"
            )
        if torch.nn.utils.parametrize.is_parametrized(module):
            raise UnsupportedModel(
                f"{class_name} computes a weight of {name!r} from others (a parametrization); replace it by its result "
                "first (torch.nn.utils.parametrize.remove_parametrizations(module, name)), and export the model then"
            )
    if (output := untied(model)) is not None:
        raise UnsupportedModel(
            f"the config of {class_name} ties the output matrix to the embedding (tie_word_embeddings), but {output!r} "
            "is a different matrix; set model.config.tie_word_embeddings to False, or call model.tie_weights()"
        )
    new = new_model(model)
    if getattr(model, "hf_quantizer", None) is None:  # a quantizer replaces modules of the model
        _check_shapes(model, new)
    _check_shared(model, new)
    check_computes(model, new, patch)


def _check_shapes(model: PreTrainedModel, new: PreTrainedModel) -> None:
    weights, expected = _shapes(model), _shapes(new)
    for weight in sorted(weights.keys() | expected.keys()):
        shape, expected_shape = (shapes.get(weight, "none") for shapes in (weights, expected))
        if shape != expected_shape:
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: {weight!r} has the shape {shape}, and in a new "
                f"model of the config {expected_shape}; correct model.config, or build the model that it describes"
            )


def _shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.state_dict(keep_vars=True).items()}


def _check_shared(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse two weights that share memory and that the config does not tie, such as those of a layer that is used
    twice."""
    tied = new.state_dict(keep_vars=True)
    memory = {name: _memory_range(weight) for name, weight in model.state_dict().items()}
    ranges = sorted((*span, name) for name, span in memory.items() if span is not None)
    for (device, _, end, first), (other_device, start, _, second) in itertools.pairwise(ranges):
        if device == other_device and start < end and tied.get(first) is not tied.get(second, second):
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: {first!r} and {second!r} are the same memory, "
                "and in a new model of the config they are two weights; replace one of them by a copy (copy.deepcopy "
                "of the module, with its own layer_idx), or, if they are the embedding and the output matrix, set "
                "model.config.tie_word_embeddings to True"
            )


def _memory_range(weight: torch.Tensor) -> tuple[str, int, int] | None:
    """The device of a weight, its first byte and the byte after its last; None if the weight takes no memory here."""
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    if weight.is_meta or not weight.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return str(weight.device), weight.data_ptr(), weight.data_ptr() + (last + 1) * weight.element_size()
