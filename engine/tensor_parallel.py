"""Tensor parallelism: a model split over several processes, each with a part of every layer."""

from __future__ import annotations

import os
import secrets
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError, Setting

__all__ = ["begin", "broadcast_from_rank0", "check", "fresh_seed", "is_first", "is_split", "options", "refuse"]

_state = {"split": False}
"""Whether the processes that were launched with this one split a model."""


def check(tp_plan: str, device_map: object, *, needs_kernels: bool) -> None:
    """Refuse options that exclude each other.

    Raises:
        ConfigError: no launcher started several processes, or an option needs the whole model in one process.
    """
    if tp_plan != "auto":
        raise ConfigError(
            Setting("tp_plan", repr(tp_plan), "given"), " is not 'auto', the plan that the model's own config has"
        )
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE") == "1":
        raise ConfigError(
            Setting("tp_plan", form="name"),
            " splits the model over processes, and this one was started alone; start two or more by torchrun "
            "--nproc-per-node N",
        )
    if device_map is not None:
        names = Setting("tp_plan", form="name"), " and ", Setting("device_map", form="name")
        raise ConfigError(*names, " both say where the weights are; give one of them")
    if needs_kernels:
        raise ConfigError(
            "compiled kernels, int8 weights, ",
            Setting("kv_dtype", form="name"),
            ", ",
            Setting("precision", form="name"),
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
    """Record that this process is one of several that split a model."""
    _state["split"] = True


def is_split() -> bool:
    """True if this process is one of several that split a model. All of them must do the same."""
    return _state["split"]


def is_first() -> bool:
    """True for the first process of a launch (torchrun, `accelerate launch`), and for one that was started alone."""
    return os.environ.get("RANK", "0") == "0"


def refuse(what: str) -> None:
    """Raise ConfigError if the model is split over processes: `what` depends on the clock of a single one."""
    if is_split():
        raise ConfigError(f"{what} decides by the clock and needs the model in one process; leave out tp_plan")


def broadcast_from_rank0(value: Any) -> Any:
    """The first process's `value`. What depends on the clock or on chance has to be the same in all processes."""
    if not is_split():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def fresh_seed() -> int:
    """A random seed, the same in all processes of a split model."""
    return int(broadcast_from_rank0(secrets.randbits(63)))
