"""A model in memory compared with a new one that is built from its config and has its weights.

A checkpoint holds config and weights only. What else a model computes with (a hook, a replaced forward, a number that
was set on a module) is in no file, so it is looked for here: numbers by name, everything else by the logits.
"""

from __future__ import annotations

import copy
import inspect
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ...errors import UnsupportedModel
from ..checkpoints.quiet import quiet_transformers
from ..hf_model import input_device
from ..patches.float32 import float32_arithmetic
from ..patches.patch import install
from ..patches.patch_record import PatchRecord
from ..patches.probe import logits
from ..rotary_site import rotary_sites

__all__ = ["check_computes", "new_model"]

_TOKENS = 48
_TOLERANCE = 1e-4  # difference of the logits, of their size, in the Euclidean norm
_TOLERANCE_16_BIT = 2e-2  # of weights that cannot be widened, such as offloaded ones
_BUFFER_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of a buffer's entries; devices differ in the last bits
_ROUNDED_BUFFER_TOLERANCE = 1e-2
_HUGE = 1e30  # entries that only mask a token

_HARMLESS = re.compile(
    r"dropout|pdrop|^p$|jitter|_coef|loss|pad|training|gradient_checkpointing|vocab|_features|num_embeddings|inplace"
    r"|max_position|max_seq_len_cached|name_or_path|sparse|scale_grad|kernel_config|tie_word|^_|^ropewalk"
)
"""Numbers of a module that logits in evaluation mode do not depend on."""


def new_model(model: PreTrainedModel) -> PreTrainedModel:
    """What a program makes of the config of `model`, on the meta device and in evaluation mode.

    Raises:
        UnsupportedModel: it cannot be built.
    """
    kind, config = _class(model), copy.deepcopy(model.config)
    try:
        with quiet_transformers(), torch.device("meta"):
            return kind(config).eval()
    except Exception as error:  # the model's own code
        raise UnsupportedModel(
            f"{kind.__name__} cannot be built from the config of this model ({type(error).__name__}: {error}), so what "
            "is exported would be another model; correct model.config"
        ) from error


def _class(model: PreTrainedModel) -> Any:
    """The class that is built from the files: of transformers, also for a model of a class derived from it."""
    kind = type(model)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is kind:
        return kind
    return next((base for base in kind.__mro__ if base.__module__.startswith("transformers.models.")), kind)


def _check_numbers(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse a model one of whose modules holds another number than that of the new model, such as a norm's epsilon.

    Raises:
        UnsupportedModel: with its name.
    """
    modules = dict(model.named_modules())
    for name, said in new.named_modules():
        found = modules.get(name)
        if found is None or type(found) is not type(said):
            continue  # what a module of another class computes, the logits say
        for attribute, value in vars(said).items():
            other = vars(found).get(attribute, value)
            if _HARMLESS.search(attribute) or _is_unused(found, attribute):
                continue
            if _is_plain(value) and _is_plain(other) and value != other:
                raise UnsupportedModel(
                    f"{type(model).__name__} is not what its config says: {_attribute(name, attribute)} is {other!r}, "
                    f"and in a new model of the config {value!r}; set it to that, or correct model.config"
                )


def _attribute(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_unused(module: nn.Module, attribute: str) -> bool:
    """Only dynamic frequencies count from the length that a rotary module was built for."""
    return attribute == "original_max_seq_len" and "dynamic" not in str(getattr(module, "rope_type", ""))


def check_computes(model: PreTrainedModel, new: PreTrainedModel, setting: PatchRecord | None) -> None:
    """Refuse a model whose numbers and logits are not those of the new one with its weights.

    Args:
        model: under `setting`, in any mode; it is left as it is.
        new: of `new_model`; it shares the weights from here on.

    Raises:
        UnsupportedModel: with the module that differs, where it is seen.
    """
    name = type(model).__name__
    if reason := _why_not_run(model):
        if setting is None:
            _check_numbers(model, new)
        warnings.warn(
            f"{name} {reason}, so its logits were not compared with those of a new model of its config; what was "
            "changed in its modules by hand, such as a hook, is not in the export",
            stacklevel=2,
        )
        return
    _warn_of_classes(new)
    device = input_device(model)
    _fill(new, model)
    if setting is not None:
        installed = install(new, rotary_sites(new), setting.scaler, grows=setting.grows)
        installed.set_length(setting.length)
    _round_buffers(new, model)
    _check_numbers(model, new)
    ids = _text(model).to(device)
    with _lengths_restored(model):
        try:
            expected, found = (_logits(one, ids) for one in (new, model))
        except Exception as error:  # the model's own code
            raise UnsupportedModel(
                f"{name} does not run on a text of {ids.shape[1]} tokens ({type(error).__name__}: {error}), so it "
                "cannot be seen whether it computes what its config and weights say; undo what was changed in its "
                "modules"
            ) from error
        _check_buffers(model, new)
    difference = _difference(found, expected)
    tolerance = _TOLERANCE if found.dtype in (torch.float32, torch.float64) else _TOLERANCE_16_BIT
    if not difference < tolerance:
        raise UnsupportedModel(
            f"{name} computes something else than a new model of its config that has its weights: its logits differ "
            f"by {difference:.2g} of their size, and {tolerance:g} is allowed{_seen(model, new)}. Config and weights "
            "are all that a file holds, so undo what was changed in the modules, or correct model.config"
        )


def _warn_of_classes(new: PreTrainedModel) -> None:
    """Say that a class computes by a forward of others, for new models of this process too."""
    for kind in dict.fromkeys(base for module in new.modules() for base in type(module).__mro__):
        forward = vars(kind).get("forward")
        origin = getattr(inspect.unwrap(forward), "__module__", None) if callable(forward) else None
        if origin not in (None, kind.__module__):
            warnings.warn(
                f"the forward of the class {kind.__name__} was replaced by one of {origin}, for every model in this "
                "process, so it cannot be seen here whether it computes what transformers does; compare the export "
                "with the model in another process",
                stacklevel=2,
            )


def _why_not_run(model: PreTrainedModel) -> str | None:
    if getattr(model, "hf_quantizer", None) is not None:
        return "is quantized"
    if any(isinstance(weight.data, DTensor) for weight in model.parameters()):
        return "is split over processes"
    for weight, tensor in model.named_parameters():
        if tensor.is_meta and not _offloaded(model, weight):
            raise UnsupportedModel(
                f"the weight {weight!r} of this {type(model).__name__} is on the meta device, which holds no numbers; "
                "load the weights first"
            )
    return None


def _offloaded(model: PreTrainedModel, name: str) -> bool:
    """True for a weight that accelerate brings where it is needed."""
    parts = name.split(".")[:-1]
    return any(_hook(model.get_submodule(".".join(parts[:count]))) is not None for count in range(len(parts), -1, -1))


def _hook(module: nn.Module) -> Any:
    """accelerate's own hook, which moves weights and inputs of a module; hooks that change numbers are others'."""
    hook = vars(module).get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))
    return hook if all(type(part).__module__ == "accelerate.hooks" for part in parts) else None


def _fill(new: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give `new` the weights of `model`, without a copy, and what its config computes besides."""
    buffers = dict(model.named_buffers())
    stored = model.state_dict(keep_vars=True)
    for name, buffer in new.named_buffers():
        if name not in stored:
            device = buffers[name].device if name in buffers else input_device(model)
            _put(new, name, torch.empty_like(buffer, device=device))
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        new.initialize_weights()  # while all that is trained is on the meta device, where this changes nothing
    for name in new.state_dict(keep_vars=True):
        _put(new, name, stored[name].detach())
    modules = dict(model.named_modules())
    for name, module in new.named_modules():
        if (hook := _hook(modules.get(name, module))) is not None:
            _move_with(module, hook)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, own = name.rpartition(".")
    module = model.get_submodule(path)
    if own in module._parameters:
        module._parameters[own] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[own] = tensor


def _move_with(module: nn.Module, hook: Any) -> None:
    """Run `module` as accelerate does."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, inner(*args, **kwargs))

    vars(module).update(_hf_hook=hook, forward=forward)


def _round_buffers(new: PreTrainedModel, model: PreTrainedModel) -> None:
    """Round what the config computes as `model.bfloat16()` has rounded it, and say so for frequencies."""
    found, rounded = dict(model.named_buffers()), None
    for name, buffer in list(new.named_buffers()):
        other = found.get(name)
        if other is not None and buffer.is_floating_point() and other.dtype != buffer.dtype:
            _put(new, name, buffer.to(other.dtype))
            rounded = other.dtype if name.endswith("inv_freq") and other.itemsize < buffer.itemsize else rounded
    if rounded is not None:
        warnings.warn(
            f"the rotary frequencies of this {type(model).__name__} were rounded to {rounded} when it was cast as a "
            f"whole; what is exported has them exact, as a model loaded with dtype={rounded} does",
            stacklevel=2,
        )


def _text(model: PreTrainedModel) -> Tensor:
    """Tokens from all of the vocabulary, [1, N]: fewer than a scaling of the config's own counts as long."""
    config = model.config.get_text_config()
    rows = model.get_input_embeddings()
    vocabulary = min(config.vocab_size, getattr(rows, "num_embeddings", config.vocab_size))
    parameters = getattr(config, "rope_parameters", None) or {}
    entries = [parameters, *(entry for entry in parameters.values() if isinstance(entry, dict))]
    lengths = [entry.get("original_max_position_embeddings") for entry in entries]
    lengths += [getattr(config, key, None) for key in ("max_position_embeddings", "original_max_position_embeddings")]
    longest = min((length for length in lengths if length), default=_TOKENS + 1)
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(vocabulary, (1, max(1, min(_TOKENS, int(longest) - 1))), generator=drawn)


def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with float32_arithmetic(model):
        return logits(model, ids)


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    expected = expected.to(found.device)
    same = (found == expected) | (found.isnan() & expected.isnan())
    size = expected[expected.abs() < _HUGE].double().norm()
    apart = (found - expected)[~same].double().norm()
    return float(apart / size) if len(found[~same]) else 0.0


@contextmanager
def _lengths_restored(model: PreTrainedModel) -> Iterator[None]:
    """Put back what transformers keeps in rotary modules of the longest text so far."""
    kept = [
        (
            module,
            dict(vars(module)),
            dict(module._buffers),
            {n: b.clone() for n, b in module._buffers.items() if b is not None},
        )
        for module in model.modules()
        if any(name.endswith("inv_freq") for name in module._buffers)
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, values in kept:
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            with torch.inference_mode():
                for name, value in values.items():
                    if not torch.equal(buffers[name], value):
                        buffers[name].copy_(value)


def _check_buffers(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse other frequencies, whose slowest a short text hardly shows. After a text: before, they may be those that
    transformers took for a long one."""
    found = dict(model.named_buffers())
    for name, said in new.named_buffers():
        other = found.get(name)
        if other is None or other.is_meta or said.is_meta or name in new.state_dict():
            continue
        tolerance = _BUFFER_TOLERANCE.get(other.dtype, _ROUNDED_BUFFER_TOLERANCE)
        one, two = other.double().cpu(), said.double().cpu()
        if one.shape != two.shape or not torch.allclose(one, two, rtol=tolerance, atol=1e-12, equal_nan=True):
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: the buffer {name!r} holds other numbers than in "
                "a new model of the config; put back what was there, or correct model.config (frequencies of another "
                "scaling are put in by ropewalk.patch)"
            )


def _seen(model: PreTrainedModel, new: PreTrainedModel) -> str:
    """What differs, as far as it can be seen from outside."""
    said = dict(new.named_modules())
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if name in said and type(module) is not type(said[name]):
            kind, other = type(module).__name__, type(said[name]).__name__
            return f"; {where} is of the class {kind}, and in a new model {other}"
        if "forward" in vars(module) and _hook(module) is None:
            return f"; the forward of {where} was replaced"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"; {repr(name) if name else 'the model'} has a forward hook"
    return ""
