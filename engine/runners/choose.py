"""Which runner a model gets: compiled kernels where possible, else transformers' modules."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import PreTrainedModel

from ...errors import ConfigError, RopewalkWarning, Setting, UnsupportedModel, did_you_mean
from ..rotary_site import RotarySite
from .cpu.family import supported
from .cpu.kernels import FOLDER
from .cpu.runner import CompiledRunner
from .runner import Runner
from .transformers import TransformersRunner

CACHE_DTYPES = ("auto", "float32", "bfloat16", "int8")


@dataclass(frozen=True, kw_only=True)
class RunnerOptions:
    """How a model is to be run.

    Args:
        compile: "auto" takes the compiled kernels where they know the model and reproduce it; True insists on them;
            False runs the model's own modules.
        weights: "own" (as loaded), or "int8": 255 steps, with a step size for each row of a linear layer.
        cache: dtype of keys and values; "auto" is that of the model, and bfloat16 with int8 weights.
        folder: of the memory-mapped files that hold keys and values; None holds them in memory.
    """

    compile: bool | Literal["auto"] = "auto"
    weights: Literal["own", "int8"] = "own"
    cache: str = "auto"
    folder: Path | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.compile, bool) and self.compile != "auto":
            raise ConfigError(f"compile {self.compile!r} is none of 'auto', True, False")
        if self.cache not in CACHE_DTYPES:
            raise ConfigError(
                "unknown ",
                Setting("kv_dtype", repr(self.cache), "given"),
                f".{did_you_mean(self.cache, CACHE_DTYPES)}",
            )
        if self.compile is False and self.insists:
            raise ConfigError(
                "int8 weights, ",
                Setting("kv_dtype", form="name"),
                " and ",
                Setting("offload", form="name"),
                " need the compiled kernels; leave out ",
                Setting("compile", False),
            )

    @property
    def insists(self) -> bool:
        """True if only the compiled kernels will do."""
        return self.compile is True or self.weights != "own" or self.cache != "auto" or self.folder is not None


def choose_runner(hf: PreTrainedModel, sites: list[RotarySite], options: RunnerOptions) -> Runner:
    """The runner for a model as it was loaded, without any scaler.

    Raises:
        UnsupportedModel: the options need the compiled kernels and they cannot run this model.
    """
    if options.compile is False:
        return TransformersRunner(hf)
    if FOLDER is not None and not any(FOLDER.rglob("*.nbi")) and supported(hf.config) and sys.stderr.isatty():
        sys.stderr.write("ropewalk: compiling kernels for this machine, once (about half a minute)\n")
    try:
        return CompiledRunner(hf, sites, options.weights, options.cache, options.folder)
    except UnsupportedModel as reason:
        if options.insists:
            raise UnsupportedModel("the compiled kernels cannot run this model: ", *reason.args) from reason
        if supported(hf.config) and hf.device.type == "cpu":
            warnings.warn(
                RopewalkWarning(
                    "transformers' modules run this model, which is several times slower: ",
                    *reason.args,
                    "; ",
                    Setting("compile", False),
                    " asks for them without this warning",
                ),
                stacklevel=2,
            )
        return TransformersRunner(hf, why=str(reason))
