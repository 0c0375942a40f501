"""A model in memory is compared with a new model that is built from its config and has the same weights.

A checkpoint holds the config and the weights only. A model may compute with more: a hook, a replaced forward, a number
that was set on a module. Numbers are compared by name; everything else shows in the logits.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ...errors import UnsupportedModel, warn
from ..checkpoints.quiet import quiet_transformers
from ..hf_model import input_device
from ..patches.float32 import float32_arithmetic
from ..patches.patch import PatchRecord, install
from ..patches.probe import logits
from ..rotary_site import rotary_sites

__all__ = ["check_computes", "new_model"]

_TOKENS = 48
_TOLERANCE = 1e-4  # norm of the difference of the logits, relative to their norm
_TOLERANCE_16_BIT = 2e-2  # for 16-bit weights that cannot be widened, such as offloaded ones
_BUFFER_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}  # of a buffer's entries; devices differ in the last bits
_ROUNDED_BUFFER_TOLERANCE = 1e-2
_HUGE = 1e30  # larger logits only mask a token

_HARMLESS = re.compile(
    r"dropout|pdrop|^p$|jitter|_coef|loss|pad|training|gradient_checkpointing|vocab|_features|num_embeddings|inplace"
    r"|max_position|max_seq_len_cached|name_or_path|sparse|scale_grad|kernel_config|tie_word|^_|^ropewalk"
)
"""Attributes of a module on which the logits in evaluation mode do not depend."""


def new_model(model: PreTrainedModel) -> PreTrainedModel:
    """A new model of the config of `model`, on the meta device and in evaluation mode.

    Raises:
        UnsupportedModel: it cannot be built.
    """
    model_class, config = _class(model), copy.deepcopy(model.config)
    try:
        with quiet_transformers(), torch.device("meta"):
            return model_class(config).eval()
    except Exception as error:  # the model's own code
        raise UnsupportedModel(
            f"{model_class.__name__} cannot be built from the config of this model ({type(error).__name__}: {error}), "
            "so the export would be a different model; correct model.config"
        ) from error


def _class(model: PreTrainedModel) -> Any:
    """The class of transformers that loads the files, also if the class of `model` is derived from it."""
    model_class = type(model)
    if MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None) is model_class:
        return model_class
    bases = (base for base in model_class.__mro__ if base.__module__.startswith("transformers.models."))
    return next(bases, model_class)


def _check_numbers(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse a model if a number of a module, such as a norm's epsilon, differs from that of the new model.

    Raises:
        UnsupportedModel: the message names the number.
    """
    modules = dict(model.named_modules())
    for name, new_module in new.named_modules():
        module = modules.get(name)
        if module is None or type(module) is not type(new_module):
            continue  # the logits show what a module of another class computes
        for attribute, expected in vars(new_module).items():
            value = vars(module).get(attribute, expected)
            if _HARMLESS.search(attribute) or _is_unused(module, attribute):
                continue
            if _is_plain(expected) and _is_plain(value) and expected != value:
                raise UnsupportedModel(
                    f"{type(model).__name__} is not what its config says: {_attribute(name, attribute)} is {value!r}, "
                    f"and in a new model of the config {expected!r}; set it to that, or correct model.config"
                )


def _attribute(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _is_unused(module: nn.Module, attribute: str) -> bool:
    """True for the length that a rotary module was built for, unless its frequencies are dynamic."""
    return attribute == "original_max_seq_len" and "dynamic" not in str(getattr(module, "rope_type", ""))


def check_computes(model: PreTrainedModel, new: PreTrainedModel, patch: PatchRecord | None) -> None:
    """Refuse a model whose numbers or logits differ from those of a new model with the same weights.

    Args:
        model: a model under `patch`, in any mode. It is not changed.
        new: the result of `new_model`. It shares the weights of `model` afterwards.

    Raises:
        UnsupportedModel: the message names the module that differs, if it can be found.
    """
    name = type(model).__name__
    if reason := _why_not_run(model):
        if patch is None:
            _check_numbers(model, new)
        warn(
            f"{name} {reason}, so its logits were not compared with those of a new model of its config; changes of its "
            "modules by hand, such as a hook, are not in the export",
        )
        return
    _warn_of_classes(new)
    device = input_device(model)
    _fill(new, model)
    if patch is not None:
        installed = install(new, rotary_sites(new), patch.scaler, grows=patch.grows)
        installed.set_length(patch.length)
    _round_buffers(new, model)
    _check_numbers(model, new)
    ids = _text(model).to(device)
    with _lengths_restored(model):
        try:
            expected, computed = _logits(new, ids), _logits(model, ids)
        except Exception as error:  # the model's own code
            raise UnsupportedModel(
                f"{name} does not run on a text of {ids.shape[1]} tokens ({type(error).__name__}: {error}), so it "
                "cannot be compared with a new model of its config; undo the changes of its modules"
            ) from error
        _check_buffers(model, new)
    difference = _difference(computed, expected)
    tolerance = _TOLERANCE if computed.dtype in (torch.float32, torch.float64) else _TOLERANCE_16_BIT
    if not difference < tolerance:
        raise UnsupportedModel(
            f"{name} computes something else than a new model of its config with the same weights: its logits differ "
            f"by {difference:.2g} of their size, and {tolerance:g} is allowed{_visible_change(model, new)}. A file "
            "holds config and weights only, so undo the changes of the modules, or correct model.config"
        )


def _warn_of_classes(new: PreTrainedModel) -> None:
    """Warn if the forward of a class was replaced: then new models of this process compute with it too."""
    for cls in dict.fromkeys(base for module in new.modules() for base in type(module).__mro__):
        forward = vars(cls).get("forward")
        origin = getattr(inspect.unwrap(forward), "__module__", None) if callable(forward) else None
        if origin not in (None, cls.__module__):
            warn(
                f"the forward of the class {cls.__name__} was replaced by one of {origin} for every model in this "
                "process, so it cannot be compared here with that of transformers; compare the export with the model "
                "in another process",
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
    """True for a weight that accelerate loads when it is needed."""
    parts = name.split(".")[:-1]
    return any(_hook(model.get_submodule(".".join(parts[:count]))) is not None for count in range(len(parts), -1, -1))


def _hook(module: nn.Module) -> Any:
    """The hook of accelerate, which moves weights and inputs of a module; None if the module has another hook, which
    may change numbers."""
    hook = vars(module).get("_hf_hook")
    parts = getattr(hook, "hooks", (hook,))
    return hook if all(type(part).__module__ == "accelerate.hooks" for part in parts) else None


def _fill(new: PreTrainedModel, model: PreTrainedModel) -> None:
    """Give `new` the weights of `model` without a copy, and compute its other buffers from its config."""
    buffers = dict(model.named_buffers())
    stored = model.state_dict(keep_vars=True)
    for name, buffer in new.named_buffers():
        if name not in stored:
            device = buffers[name].device if name in buffers else input_device(model)
            _put(new, name, torch.empty_like(buffer, device=device))
    with quiet_transformers(), torch.random.fork_rng(devices=[]), torch.no_grad():
        new.initialize_weights()  # the weights are still on the meta device, where this changes nothing
    for name in new.state_dict(keep_vars=True):
        _put(new, name, stored[name].detach())
    modules = dict(model.named_modules())
    for name, module in new.named_modules():
        if (hook := _hook(modules.get(name, module))) is not None:
            _move_with(module, hook)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    if attribute in module._parameters:
        module._parameters[attribute] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[attribute] = tensor


def _move_with(module: nn.Module, hook: Any) -> None:
    """Run `module` as accelerate does."""
    inner = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, inner(*args, **kwargs))

    vars(module).update(_hf_hook=hook, forward=forward)


def _round_buffers(new: PreTrainedModel, model: PreTrainedModel) -> None:
    """Round the buffers of `new` as `model.bfloat16()` rounded those of `model`, and warn if they are frequencies."""
    buffers, rounded = dict(model.named_buffers()), None
    for name, buffer in list(new.named_buffers()):
        other = buffers.get(name)
        if other is not None and buffer.is_floating_point() and other.dtype != buffer.dtype:
            _put(new, name, buffer.to(other.dtype))
            rounded = other.dtype if name.endswith("inv_freq") and other.itemsize < buffer.itemsize else rounded
    if rounded is not None:
        warn(
            f"the rotary frequencies of this {type(model).__name__} were rounded to {rounded} when it was cast as a "
            f"whole; the export has the exact frequencies, as a model loaded with dtype={rounded} does",
        )


def _text(model: PreTrainedModel) -> Tensor:
    """Random tokens from the whole vocabulary, [1, N]: too few for a scaling of the config to treat them as long."""
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


def _difference(computed: Tensor, expected: Tensor) -> float:
    """The norm of the difference, relative to the norm of `expected`."""
    if computed.shape != expected.shape:
        return float("inf")
    expected = expected.to(computed.device)
    differs = (computed != expected) & ~(computed.isnan() & expected.isnan())
    if not differs.any():
        return 0.0
    size = expected[expected.abs() < _HUGE].double().norm()
    return float((computed - expected)[differs].double().norm() / size)


@contextmanager
def _lengths_restored(model: PreTrainedModel) -> Iterator[None]:
    """Restore the state of the rotary modules, where transformers stores the longest length so far."""
    states = [
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
        for module, attributes, buffers, values in states:
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            with torch.inference_mode():
                for name, value in values.items():
                    if not torch.equal(buffers[name], value):
                        buffers[name].copy_(value)


def _check_buffers(model: PreTrainedModel, new: PreTrainedModel) -> None:
    """Refuse different frequencies; the slowest hardly change the logits of a short text.

    Call this after both models have read the text. Before, the frequencies may be those of an earlier, long text.
    """
    buffers = dict(model.named_buffers())
    for name, new_buffer in new.named_buffers():
        buffer = buffers.get(name)
        if buffer is None or buffer.is_meta or new_buffer.is_meta or name in new.state_dict():
            continue
        tolerance = _BUFFER_TOLERANCE.get(buffer.dtype, _ROUNDED_BUFFER_TOLERANCE)
        values, expected = buffer.double().cpu(), new_buffer.double().cpu()
        same_shape = values.shape == expected.shape
        if not same_shape or not torch.allclose(values, expected, rtol=tolerance, atol=1e-12, equal_nan=True):
            raise UnsupportedModel(
                f"{type(model).__name__} is not what its config says: the buffer {name!r} holds other numbers than in "
                "a new model of the config; restore them, or correct model.config (ropewalk.patch sets the frequencies "
                "of another scaling)"
            )


def _visible_change(model: PreTrainedModel, new: PreTrainedModel) -> str:
    """The change of `model`, as the end of a sentence; empty if it is not visible in its modules."""
    new_modules = dict(new.named_modules())
    for name, module in model.named_modules():
        where = repr(name) if name else "the model"
        if name in new_modules and type(module) is not type(new_modules[name]):
            class_name, expected = type(module).__name__, type(new_modules[name]).__name__
            return f"; {where} is of the class {class_name}, and in a new model {expected}"
        if "forward" in vars(module) and _hook(module) is None:
            return f"; the forward of {where} was replaced"
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return f"; {repr(name) if name else 'the model'} has a forward hook"
    return ""
