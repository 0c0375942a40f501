"""Whether a model in memory is what its config says, so that a checkpoint of its weights is the model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ...errors import UnsupportedModel
from ..checkpoints.quiet import quiet_transformers
from ..checkpoints.tensors import untied

__all__ = ["check_kind", "check_plain"]


def check_kind(model: Any) -> None:
    """Refuse what is no model that can be written, such as the wrapper of an adapter.

    Raises:
        UnsupportedModel: with what to give instead.
    """
    from ..api import Model

    if isinstance(model, str | Path | Model | PreTrainedModel):
        return
    way = "merge the adapter and export the result (peft: model = model.merge_and_unload())"
    if not hasattr(model, "merge_and_unload"):
        way = "give the transformers model inside it, which leaves out what the wrapper adds"
    raise UnsupportedModel(
        f"an object of type {type(model).__name__} cannot be exported; it takes a name, a folder, what ropewalk.load "
        f"gave or a transformers model, so {way}"
    )


def check_plain(model: Any) -> None:
    """Refuse a model whose modules are others than a new model of its config has: adapters that are not merged,
    parametrised weights, layers that were taken out. Readers of a checkpoint know the config's modules only.

    Args:
        model: of transformers.

    Raises:
        UnsupportedModel: with the first weight that the config does not say, and the way out.
    """
    name, weights = type(model).__name__, _shapes(model)
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
    if getattr(model, "hf_quantizer", None) is not None:
        return  # it puts modules of its own into the model that its config makes
    with quiet_transformers(), torch.device("meta"):
        expected = _shapes(type(model)(copy.deepcopy(model.config)))
    for weight in sorted(weights.keys() | expected.keys()):
        found, said = (shapes.get(weight, "none") for shapes in (weights, expected))
        if found != said:
            raise UnsupportedModel(
                f"{name} is not what its config says: {weight!r} has the shape {found}, and in a new model of the "
                f"config {said}; correct model.config, or build the model that it describes"
            )


def _shapes(model: Any) -> dict[str, list[int]]:
    return {name: list(weight.shape) for name, weight in model.state_dict(keep_vars=True).items()}
