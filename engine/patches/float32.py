"""A model run in float32 arithmetic on its own weights, which is what every check compares with.

The model's own 16-bit arithmetic is no reference: its logits differ by a few per cent of their size between CPUs and
between attention kernels, which is more than a wrong computation may change them by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

_NARROW = (torch.bfloat16, torch.float16)


@contextmanager
def float32_arithmetic(model: PreTrainedModel) -> Iterator[None]:
    """Within it a 16-bit model computes in float32; afterwards its tensors are the very same objects as before.

    Products of float32 matrices are not rounded either, where `torch.set_float32_matmul_precision` asks for it. Weights
    are widened for one decoder layer at a time. The embedding stays as it is, since some models round what they
    multiply it by, and its output is widened. No tensor changes in a float32 model, nor in one that cannot be widened:
    one with quantized, offloaded or distributed weights, or with an attention kernel that takes only 16 bits.
    """
    if not _can_be_widened(model):
        with _exact_products():
            yield
        return
    embedding = model.get_input_embeddings()
    layers = _layers(model)
    in_layers = {module for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if module not in in_layers and module is not embedding]
    with ExitStack() as undo:
        undo.enter_context(_exact_products())
        hooks = [embedding.register_forward_hook(lambda _module, _args, out: out.float())]
        for layer in layers:
            widened = _Widened(list(layer.modules()))
            hooks.append(layer.register_forward_pre_hook(widened.begin))
            hooks.append(layer.register_forward_hook(widened.end, always_call=True))
            undo.callback(widened.end)
        for hook in hooks:
            undo.callback(hook.remove)
        rest = _Widened(others)
        undo.callback(rest.end)
        rest.begin()
        yield


@contextmanager
def _exact_products() -> Iterator[None]:
    places: Any = torch.backends  # typed in part only
    backends = [places.mkldnn.matmul, places.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _Widened:
    """Some modules whose 16-bit tensors give place to float32 ones from `begin` to `end`."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._modules = modules
        self._replaced: list[tuple[dict[str, Any], str, Tensor]] = []

    def begin(self, *_: Any) -> None:
        for module in self._modules:
            tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
            for table in tables:
                for name, tensor in table.items():
                    if tensor is not None and tensor.dtype in _NARROW:
                        self._replaced.append((table, name, tensor))
                        wide = tensor.detach().float()
                        table[name] = nn.Parameter(wide, requires_grad=False) if table is module._parameters else wide

    def end(self, *_: Any) -> None:
        while self._replaced:
            table, name, tensor = self._replaced.pop()
            table[name] = tensor


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """The members of the outermost module lists: a model's decoder layers."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found += module
            inside.update(part for layer in module for part in layer.modules())
            inside.update(part for part in module.modules())
    return found


def _can_be_widened(model: PreTrainedModel) -> bool:
    weights = list(model.parameters())
    plain = all(
        weight.is_floating_point() and not weight.is_meta and type(weight) is nn.Parameter for weight in weights
    )
    distributed = any(isinstance(weight.data, DTensor) for weight in weights)
    kernel = model.config.get_text_config()._attn_implementation
    takes_float32 = kernel in ("sdpa", "eager") or kernel.startswith("ropewalk")
    return model.dtype in _NARROW and plain and not distributed and takes_float32
