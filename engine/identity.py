"""What tells a model from others: of the caches that it filled, and of the scalers that were tuned for it."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_SAMPLED = 64  # weights of each tensor, about


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
