"""A model split over several processes (tensor parallelism): each has a part of every layer, and all work in step."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError, Setting

__all__ = ["begin", "broadcast_from_rank0", "check", "fresh_seed", "is_first", "is_split", "options", "refuse"]

_state = {"split": False}
"""Of this process: the processes of a launch split one model, or none."""


def check(tp_plan: str, device_map: object, *, needs_kernels: bool) -> None:
    """Refuse what cannot go together.

    Raises:
        ConfigError: no launcher started this process, or an option needs the whole model in one process.
    """
    if tp_plan != "auto":
        raise ConfigError(
            Setting("tp_plan", repr(tp_plan), "given"), " is not 'auto', the plan that the model's own config has"
        )
    if "RANK" not in os.environ:
        raise ConfigError(
            Setting("tp_plan", form="name"),
            " splits the model over processes, and this one stands alone; start it by torchrun --nproc-per-node N",
        )
    if device_map is not None:
        names = Setting("tp_plan", form="name"), " and ", Setting("device_map", form="name")
        raise ConfigError(*names, " both say where the weights are; give one of them")
    if needs_kernels:
        raise ConfigError(
            "compiled kernels, int8 weights, ",
            Setting("kv_dtype", form="name"),
            " and ",
            Setting("offload", form="name"),
            " need the whole model in one process; leave them out, or ",
            Setting("tp_plan", form="name"),
        )


def options(tp_plan: str) -> dict[str, Any]:
    """Keywords of transformers' `from_pretrained`."""
    try:
        from transformers.distributed import DistributedConfig
    except ImportError:  # before transformers 5.1x
        return {"tp_plan": tp_plan}
    return {"distributed_config": DistributedConfig(tp_plan=tp_plan)}


def begin() -> None:
    """From now on this process is one of several that split a model."""
    _state["split"] = True


def is_split() -> bool:
    """True where the processes of a launch split one model, so that all must do the same."""
    return _state["split"]


def is_first() -> bool:
    """True unless a launcher (torchrun, `accelerate launch`) started this process as one of several, and not first."""
    return os.environ.get("RANK", "0") == "0"


def refuse(what: str) -> None:
    """Raise ConfigError where the processes of a launch split one model, which `what` cannot do."""
    if is_split():
        raise ConfigError(f"{what} decides by the clock, and needs the model in one process; leave out tp_plan")


def broadcast_from_rank0(value: Any) -> Any:
    """`value` as the first process has it; what depends on the clock or on chance has to be the same in all."""
    if not is_split():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def fresh_seed() -> int:
    """A seed that nobody knows, the same one in all processes of a split model."""
    return int(broadcast_from_rank0(secrets.randbits(63)))
