"""Chooses the runner of a model: compiled kernels if they can run it, else transformers' modules."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from subprocess import SubprocessError
from typing import Literal

import torch
from transformers import PreTrainedModel

from ...errors import ConfigError, RopewalkWarning, Setting, UnsupportedModel, did_you_mean, warn
from ..cache import is_lack_of_memory
from ..rotary_site import RotarySite
from .cpu.kernels import FOLDER
from .cpu.runner import CompiledRunner
from .family import supported
from .gpu.kernels import UNAVAILABLE as KERNELS_UNAVAILABLE
from .gpu.runner import GpuRunner
from .gpu.step import capture
from .runner import Runner
from .transformers import TransformersRunner

CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")
PRECISIONS = ("auto", "float32", "bfloat16")


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """Options for the runner of a model.

    Args:
        compile: "auto" uses the compiled kernels if they reproduce the model's logits; True requires them; False uses
            the model's own modules.
        weights: "own" (as loaded), or "int8": 255 steps, with one step size for each row of a linear layer.
        cache: the dtype of keys and values; "auto" is the dtype of the model, and bfloat16 for int8 weights.
        folder: the folder of memory-mapped files for keys and values; None keeps them in memory.
        precision: the dtype of the factors of the matrix products that read a prompt; "auto" is bfloat16 on CPUs that
            multiply it, unless the weights are float32.
    """

    compile: bool | Literal["auto"] = "auto"
    weights: Literal["own", "int8"] = "own"
    cache: str = "auto"
    folder: Path | None = None
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ConfigError(Setting("compile", repr(self.compile), "given"), " is none of 'auto', True, False")
        for name, value, known in (
            ("kv_dtype", self.cache, CACHE_DTYPES),
            ("precision", self.precision, PRECISIONS),
        ):
            if value not in known:
                raise ConfigError("unknown ", Setting(name, repr(value), "given"), f".{did_you_mean(value, known)}")
        if self.compile is False and self.needs_kernels:
            raise ConfigError(
                "int8 weights, ",
                Setting("kv_dtype", form="name"),
                ", ",
                Setting("precision", form="name"),
                " and ",
                Setting("offload", form="name"),
                " need the compiled kernels; leave out ",
                Setting("compile", False),
            )

    @property
    def needs_kernels(self) -> bool:
        """True if only the compiled kernels can honour these options."""
        own = self.weights == "own" and self.cache == "auto" and self.precision == "auto" and self.folder is None
        return self.compile is True or not own


def choose_runner(hf: PreTrainedModel, sites: list[RotarySite], options: RunnerOptions) -> Runner:
    """The runner for a freshly loaded model, without any scaler.

    Raises:
        UnsupportedModel: the options need the compiled kernels and they cannot run this model.
    """
    if options.compile is False:
        return TransformersRunner(hf)
    if hf.device.type == "cuda":
        return _on_gpu(hf, sites, options)
    if FOLDER is not None and not any(FOLDER.rglob("*.nbi")) and supported(hf.config) and sys.stderr.isatty():
        sys.stderr.write("ropewalk: compiling kernels for this machine, once (about ten seconds)\n")
    try:
        return CompiledRunner(hf, sites, options.weights, options.cache, options.folder, options.precision)
    except UnsupportedModel as reason:
        return _by_transformers(hf, options, reason)


def _on_gpu(hf: PreTrainedModel, sites: list[RotarySite], options: RunnerOptions) -> Runner:
    try:
        for is_set, name in (
            (options.folder is not None, "a cache in files"),
            (options.precision != "auto", "a precision of its own"),
            (hf.dtype == torch.float64, "float64"),
        ):
            if is_set:
                raise UnsupportedModel(f"the engine for GPUs does not have {name}")
        if KERNELS_UNAVAILABLE:
            raise UnsupportedModel(KERNELS_UNAVAILABLE)
        from .gpu.kernels.ops import KernelError, TritonOps

        try:
            return GpuRunner(hf, sites, TritonOps(), options.weights, options.cache, capture)
        except (KernelError, AssertionError, OSError, RuntimeError, SubprocessError) as error:  # no C compiler, say
            if is_lack_of_memory(error):
                raise
            why = str(error).strip().partition("\n")[0]
            raise UnsupportedModel(f"Triton's kernels do not run here ({type(error).__name__}: {why})") from error
    except UnsupportedModel as reason:
        return _by_transformers(hf, options, reason)


def _by_transformers(hf: PreTrainedModel, options: RunnerOptions, reason: UnsupportedModel) -> Runner:
    """The runner of transformers' modules, because of `reason`, with a warning if it is slower than ours would be."""
    if options.needs_kernels:
        raise UnsupportedModel("the compiled kernels cannot run this model: ", *reason.args) from reason
    if supported(hf.config) and hf.device.type in ("cpu", "cuda"):
        warn(
            RopewalkWarning(
                "transformers' modules run this model, which is several times slower: ",
                *reason.args,
                "; ",
                Setting("compile", False),
                " uses them without this warning",
            ),
        )
    return TransformersRunner(hf, why=str(reason))
