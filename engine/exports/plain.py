"""Whether a model in memory is what its config says, so that a checkpoint of its weights is the model."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ..checkpoints.tensors import untied
from ..patches.patch_record import PatchRecord, patch_record
from .rebuilt import check_computes, new_model

if TYPE_CHECKING:
    from ..model import Model

__all__ = ["check_kind", "check_plain"]


def check_kind(model: Any) -> None:
    """Refuse what is no model that can be written, such as the wrapper of an adapter.

    Raises:
        UnsupportedModel: with what to give instead.
    """
    from ..model import Model

    if isinstance(model, str | Path | Model | PreTrainedModel):
        return
    way = "merge the adapter and export the result (peft: model = model.merge_and_unload())"
    if not hasattr(model, "merge_and_unload"):
        way = "give the transformers model inside it, which leaves out what the wrapper adds"
    raise UnsupportedModel(
        f"an object of type {type(model).__name__} cannot be exported; it takes a name, a folder, what ropewalk.load "
        f"gave or a transformers model, so {way}"
    )


def check_plain(model: Model | PreTrainedModel) -> None:
    """Refuse a model that computes something else than a new model of its config with its weights: adapters that are
    not merged, parametrised weights, layers that were taken out or used twice, hooks, numbers that were changed.
    Readers of a checkpoint know its config and weights only.

    Args:
        model: what `load` gave, or a transformers model; patched or not.

    Raises:
        UnsupportedModel: with the first thing that config and weights do not say, and the way out.
    """
    if isinstance(model, PreTrainedModel):
        _check(model, patch_record(model))
        return
    with model.running(None) as runner:
        scaler, length = runner.rope_state
        _check(model.hf, PatchRecord(scaler, length=length))


def _check(model: PreTrainedModel, setting: PatchRecord | None) -> None:
    name = type(model).__name__
    for module, part in model.named_modules():
        if hasattr(part, "base_layer") or hasattr(part, "modules_to_save"):
            raise UnsupportedModel(
                f"{name} holds an adapter at {module!r} beside its weights; merge it into them first (peft: model = "
                "model.merge_and_unload()), and export the result"
            )
        if torch.nn.utils.parametrize.is_parametrized(part):
            raise UnsupportedModel(
                f"{name} computes a weight of {module!r} from others (a parametrization); put the result in its place "
                "first (torch.nn.utils.parametrize.remove_parametrizations(module, name)), and export that"
            )
    if (output := untied(model)) is not None:
        raise UnsupportedModel(
            f"the config of {name} ties its output matrix to the embedding (tie_word_embeddings), and {output!r} is "
            "another one; set model.config.tie_word_embeddings to False, or call model.tie_weights()"
        )
    new = new_model(model)
    if getattr(model, "hf_quantizer", None) is None:  # it puts modules of its own into the model that its config makes
        _check_shapes(model, new)
    _check_shared(model, new)
    check_computes(model, new, setting)


def _check_shapes(model: PreTrainedModel, new: PreTrainedModel) -> None:
    weights, expected = _shapes(model), _shapes(new)
    for weight in sorted(weights.keys() | expected.keys()):
        found, said = (shapes.get(weight, "none") for shapes in (weights, expected))
        if found != said:
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: {weight!r} has the shape {found}, and in a new "
                f"model of the config {said}; correct model.config, or build the model that it describes"
            )


def _shapes(model: PreTrainedModel) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.state_dict(keep_vars=True).items()}


def _check_shared(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse two weights in the same memory, such as those of a layer that is used twice, that the config does not
    tie."""
    tied = new.state_dict(keep_vars=True)
    places = sorted((*place, name) for name, weight in model.state_dict().items() if (place := _memory_range(weight)))
    for (memory, _, end, one), (same, start, _, other) in itertools.pairwise(places):
        if memory == same and start < end and tied.get(one) is not tied.get(other, other):
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: {one!r} and {other!r} are the same memory, and "
                "in a new model of the config they are two weights; put a copy in the place of one of them "
                "(copy.deepcopy of the module, with its own layer_idx), or set model.config.tie_word_embeddings to "
                "True where they are the embedding and the output matrix"
            )


def _memory_range(weight: torch.Tensor) -> tuple[str, int, int] | None:
    """Where a weight lies: its device, its first byte and the one behind its last; None for one that takes no memory
    here."""
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    if weight.is_meta or not weight.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
    return str(weight.device), weight.data_ptr(), weight.data_ptr() + (last + 1) * weight.element_size()
