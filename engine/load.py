"""`load`: a hub id, a folder, a GGUF file or a built-in name becomes a `Model`."""

from __future__ import annotations

import os
from numbers import Integral
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import AssetError, ConfigError, PatchError, Setting, did_you_mean
from ..scaling.rope import Scaler
from ..scaling.spec import parse
from . import tensor_parallel
from .attention import causal
from .cache import attends_to_everything
from .checkpoints.checkpoint import read_tokenizer, read_weights
from .checkpoints.config import find_config, named_scaler, primary_rope, trained_length
from .hf_model import weights_state
from .model import Model
from .patches.patch import patched_with
from .runners.choose import RunnerOptions
from .runners.cpu.kernels import UNAVAILABLE
from .runners.family import supported
from .runners.gpu.kernels import UNAVAILABLE as KERNELS_UNAVAILABLE

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def load(
    name: str | Path | PreTrainedModel,
    rope: str | Scaler | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    dtype: str = "auto",
    compile: bool | Literal["auto"] = "auto",
    kv_dtype: str = "auto",
    precision: str = "auto",
    offload: str | Path | None = None,
    device_map: str | dict[str, Any] | None = None,
    tp_plan: Literal["auto"] | None = None,
    max_length: int | None = None,
    special_tokens: bool = False,
) -> Model:
    """Load a language model with rotary positions and give it a position scaler.

        model = rw.load("smollm2-135m", rope="auto")
        model = rw.load(hf_model, rope="auto")  # a transformers model in memory

    Args:
        name: a built-in name (`ropewalk fetch` lists them), a folder, a `.gguf` file, a hub id, or a transformers model
            in memory. That model's weights are shared, and scalers are applied to it, too. After training or an
            adapter it has to be loaded again. Use `patch` to run it by transformers alone.
        tokenizer: used in place of the checkpoint's.
        rope: a scaler or a spec string, whose lengths may be multiples of the trained one ("rerope:0.5x"). None is the
            scaler that the config names (`export`), else "none", the model as it was trained. "auto" chooses by the
            length of each request: no scaler within the trained length, beyond it what `tune` stored for this model,
            else Self-Extend.
        dtype: "float32", "bfloat16", "float16", "float64" or "int8" (weights only, quantized when the model is
            loaded). "auto" is the checkpoint's dtype, but float32 where 16-bit products run several times slower: on
            CPUs without bfloat16 arithmetic, unless the compiled kernels run the model, which widen the weights. Under
            "auto" these use the quantized blocks of a `.gguf` file as they are, and the file stays mapped; any other
            dtype expands them in memory.
        compile: "auto" uses the compiled kernels where they know the model's family and reproduce its logits. True
            requires them, False uses transformers' modules. `model.describe()` says which run.
        kv_dtype: "float32", "bfloat16" or "int8" keys and values; "auto" is the dtype of the weights, and bfloat16
            with int8 weights and quantized blocks.
        precision: "float32" or "bfloat16" factors of the matrix products that read a prompt; sums are float32. "auto"
            is bfloat16 on CPUs that multiply it, unless the weights are float32. Single tokens are always computed in
            float32.
        offload: a folder for keys and values, in memory-mapped files that are removed when the process ends.
        device_map: as in accelerate ("auto", "cuda:0", {...}); None uses the GPU if there is one. Processes that
            were launched together get one GPU each.
        tp_plan: "auto" splits every layer over the processes that torchrun started. All of them have to make the same
            calls. None does not split.
        max_length: most tokens of a request, prompt and answer together. None is the reach of the scaler.
        special_tokens: True where texts come from a chat template: a name such as `<|im_start|>` then stands for the
            special token. Else it is ordinary text.

    Raises:
        AssetError: there is no such model, or it cannot be fetched. Or its files are damaged, hold a weight that is
            NaN or infinite, or could run code: pickled weights and the code of a checkpoint are never used.
        UnsupportedModel: it has no RoPE, or one that cannot be verified.
        ConfigError: the scaler or an option is wrong.
    """
    in_memory = name if isinstance(name, torch.nn.Module) else None
    if in_memory is None and not isinstance(name, str | Path):
        raise ConfigError(
            f"a model is a built-in name, a hub id, a folder, a .gguf file or a transformers model, not {name!r:.100}"
        )
    scaler = parse(rope, lambda: _trained_length(name))
    if dtype not in ("auto", "int8") and dtype not in _DTYPES:
        suggestion = did_you_mean(dtype, [*_DTYPES, "auto", "int8"])
        raise ConfigError("unknown ", Setting("dtype", repr(dtype), "given"), f".{suggestion}")
    folder = None if offload is None else Path(offload)
    if folder is not None and not folder.is_dir():
        raise ConfigError(
            Setting("offload", offload, "given"), " is not a folder; make it, on a disk with room for the cache"
        )
    runner_options = RunnerOptions(
        compile=compile,
        weights="int8" if dtype == "int8" else "own",
        cache=kv_dtype,
        folder=folder,
        precision=precision,
    )
    if tp_plan is not None:
        tensor_parallel.check(tp_plan, device_map, needs_kernels=runner_options.needs_kernels)
        runner_options = RunnerOptions(compile=False)
    if max_length is not None and not (isinstance(max_length, Integral) and max_length >= 1):
        raise ConfigError(Setting("max_length", repr(max_length), "given"), " must be a whole number of at least 1")
    if in_memory is not None:
        _check_in_memory(in_memory, dtype, device_map, tp_plan)
        model = Model(
            in_memory,
            tokenizer or _tokenizer_of(in_memory),
            name=str(in_memory.name_or_path) or type(in_memory).__name__,
            rope=scaler,
            max_length=max_length,
            options=runner_options,
            special_tokens=special_tokens,
        )
        model.weights_at_load = weights_state(in_memory)
        return model
    source, config = find_config(str(name))
    primary_rope(config)  # refuses what has no RoPE before any weight is read
    if rope is None and (named := named_scaler(source)) is not None:
        scaler = named.scaler
    placement = device_map if device_map is not None else _default_device()
    on_cpu = _is_cpu(placement)
    if not on_cpu:
        _check_off_cpu(runner_options, placement, config)
    compile = runner_options.compile
    widens = on_cpu and compile is not False and supported(config) and UNAVAILABLE is None
    chosen = _choose_dtype("auto" if dtype == "int8" else dtype, config, on_cpu, widens)
    options: dict[str, Any] = {"dtype": chosen, "keep_blocks": dtype == "auto" and widens}
    options |= {"device_map": placement} if tp_plan is None else tensor_parallel.options(tp_plan)
    hf = read_weights(source, config, **options)
    tokenizer = tokenizer or read_tokenizer(source)
    text_config = hf.config.get_text_config()
    if text_config._attn_implementation == "sdpa" and getattr(text_config, "attn_logit_softcapping", None):
        hf.set_attn_implementation("eager")  # transformers up to 5.20 leaves the cap out in SDPA
    is_plain = text_config._attn_implementation == "sdpa" and attends_to_everything(text_config)
    if is_plain and hf.device.type in ("cpu", "cuda"):
        hf.set_attn_implementation(causal.register())  # in place of SDPA only: others cap scores or have sinks
    if tp_plan is not None:
        tensor_parallel.begin()
    return Model(
        hf,
        tokenizer,
        name=str(name),
        rope=scaler,
        max_length=max_length,
        options=runner_options,
        special_tokens=special_tokens,
    )


def _trained_length(name: str | Path | PreTrainedModel) -> int:
    return primary_rope(name.config).max_length if isinstance(name, PreTrainedModel) else trained_length(str(name))


def _check_in_memory(hf: torch.nn.Module, dtype: str, device_map: Any, tp_plan: str | None) -> None:
    """Refuse a model in memory that cannot be used as it is, and options that only apply to reading weights.

    Raises:
        ConfigError, PatchError: with the next step.
    """
    if not isinstance(hf, PreTrainedModel):
        merge = ", such as model.merge_and_unload() of an adapter" if hasattr(hf, "merge_and_unload") else ""
        raise ConfigError(f"{type(hf).__name__} is not a transformers model; give the model itself{merge}")
    if (patched := patched_with(hf)) is not None:
        raise PatchError(f"the model is patched with {patched}; undo that, and give rope= to rw.load")
    if getattr(hf, "_hf_peft_config_loaded", False):
        raise ConfigError("the model has an adapter; merge it into the weights first (merge_and_unload), or delete it")
    if hf.training:
        raise ConfigError("the model is in training mode, where dropout acts; call model.eval() first")
    if dtype not in ("auto", "int8"):
        raise ConfigError(Setting("dtype", repr(dtype), "given"), " is for loading weights; use model.to(torch.DTYPE)")
    if device_map is not None or tp_plan is not None:
        raise ConfigError("device_map and tp_plan are for loading weights; this model is in memory already")


def _tokenizer_of(hf: PreTrainedModel) -> PreTrainedTokenizerBase:
    """The tokenizer of the checkpoint that a model in memory came from.

    Raises:
        ConfigError: there is none.
    """
    if name := hf.name_or_path:
        try:
            return read_tokenizer(find_config(name)[0])
        except AssetError as error:
            raise ConfigError(
                f"give the tokenizer: rw.load(model, tokenizer=...); {name} has none ({error})"
            ) from error
    raise ConfigError("this model was not loaded from a checkpoint; give its tokenizer: rw.load(model, tokenizer=...)")


def _default_device() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}" if "LOCAL_RANK" in os.environ else "cuda"


def _is_cpu(placement: Any) -> bool:
    places = placement.values() if isinstance(placement, dict) else (placement,)
    return all(str(place) == "cpu" for place in places)


def _check_off_cpu(options: RunnerOptions, placement: Any, config: Any) -> None:
    """Refuse options that no engine of ours can honour there, before weights are read to another place than the CPU.

    Raises:
        ConfigError: with the options.
    """
    if not options.needs_kernels or not torch.cuda.is_available():  # "auto" is then the CPU
        return
    given: list[Setting] = []
    if options.precision != "auto":
        given.append(Setting("precision", options.precision, "given"))
    if options.folder is not None:
        given.append(Setting("offload", options.folder, "given"))
    reason = "only the engine for CPUs does this"
    if not given:
        if options.weights == "int8":
            given.append(Setting("dtype", "int8", "given"))
        if options.cache != "auto":
            given.append(Setting("kv_dtype", options.cache, "given"))
        if options.compile is True:
            given.append(Setting("compile", True, "given"))
        if KERNELS_UNAVAILABLE:
            reason = f"only our own engines do this, and {KERNELS_UNAVAILABLE}"
        elif not supported(config):
            reason = "only our own engines do this, and they do not know this family"
        else:
            return
    named = [part for setting in given for part in (setting, ", ")][:-1]
    raise ConfigError(
        *named,
        f": {reason}; the weights would go to {placement!r}; ",
        Setting("device_map", "cpu", "load"),
        " for the engine for CPUs, or leave this out",
    )


def _choose_dtype(dtype: str, config: Any, on_cpu: bool, widens: bool) -> torch.dtype:
    if dtype != "auto":
        return _DTYPES[dtype]
    configured: torch.dtype = getattr(config, "dtype", None) or torch.float32
    is_slow = configured == torch.float16 or (configured == torch.bfloat16 and not (widens or cpu_has_bfloat16()))
    return torch.float32 if on_cpu and is_slow else configured


def cpu_has_bfloat16() -> bool:
    """True on CPUs whose matrix products take bfloat16 natively; elsewhere they run at a quarter of float32's
    speed (17 against 68 GFLOP/s on two AVX2 cores)."""
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, probe, lambda: False)()) for probe in probes)
