"""Where a model takes its input, whose weights accelerate may have spread over devices, memory and the disk."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from ..errors import UnsupportedModel


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for token ids. It is where the embedding runs, which may be kept on the disk between calls.

    Raises:
        UnsupportedModel: the model has no weights.
    """
    device: torch.device | int | str | None = model.device
    if isinstance(device, torch.device) and device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if (device := getattr(one, "execution_device", None)) is not None:
            return torch.device(device)
    raise UnsupportedModel(
        f"the weights of this {type(model).__name__} are on the meta device, which holds no numbers; load them first"
    )
