"""What the engine reads off a transformers model: its device, its end tokens, and hashes that identify it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModel

_SAMPLED = 64  # weights of each tensor, about


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


def stop_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-text tokens of a model's generation config and of its tokenizer."""
    configured = getattr(hf.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def fingerprint(hf: PreTrainedModel, stored_in: str) -> str:
    """Of a model as it runs: a hash of its config, of the dtype that its weights are stored in, and of some of each."""
    return _digest(hf, _as_text(_lasting(hf)) + stored_in, torch.float32)


def identity(hf: PreTrainedModel) -> str:
    """Of a model whatever dtype it runs in: float32, bfloat16 and int8 of one checkpoint are one model.

    Weights are compared as bfloat16 holds them, so float16 made of another dtype, which rounds them twice, is not.
    """
    return _digest(hf, _as_text(_without_dtypes(_lasting(hf))), torch.bfloat16)


def _lasting(hf: PreTrainedModel) -> dict[str, Any]:
    config = hf.config.to_dict()
    return {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}


def _without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    return {name: _without_dtypes(value) if isinstance(value, dict) else value for name, value in kept.items()}


def _as_text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, default=str)


def _digest(hf: PreTrainedModel, config: str, rounded_to: torch.dtype) -> str:
    found = hashlib.sha256(config.encode())
    for name, parameter in sorted(hf.named_parameters()):
        weight = _elsewhere(hf, name).to(parameter.dtype) if parameter.is_meta else parameter
        some = weight.detach().flatten()[:: max(1, weight.numel() // _SAMPLED)]
        if isinstance(some, DTensor):  # split over processes, each of which gets all of the sample
            some = some.full_tensor()
        found.update(f"{name} {tuple(weight.shape)}".encode() + some.to(rounded_to).float().cpu().numpy().tobytes())
    return found.hexdigest()


def _elsewhere(hf: PreTrainedModel, name: str) -> Tensor:
    """A weight that accelerate keeps on the disk, or in memory for a device that has no room."""
    module, _, own = name.rpartition(".")
    weight: Tensor = hf.get_submodule(module)._hf_hook.weights_map[own]
    return weight
