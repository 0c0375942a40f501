"""Runs a model on its own weights in float32 arithmetic. Every check compares with these logits.

The model's own 16-bit arithmetic is no reference. Its logits differ by a few per cent between CPUs and between
attention kernels, which can be more than the effect of a wrong computation.
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
    """Within this context a 16-bit model computes in float32. Afterwards its tensors are the same objects as before.

    Float32 matrix products are exact here, even if `torch.set_float32_matmul_precision` allows rounding. Weights are
    widened for one decoder layer at a time. The embedding keeps its dtype, because some models round the factor on it;
    its output is widened. A float32 model does not change, nor does a model that cannot be widened: its weights are
    quantized, offloaded or distributed, or its attention kernel takes only 16 bits.
    """
    if not _can_be_widened(model):
        with exact_products():
            yield
        return
    embedding = model.get_input_embeddings()
    layers = _layers(model)
    in_layers = {module for layer in layers for module in layer.modules()}
    others = [module for module in model.modules() if module not in in_layers and module is not embedding]
    with ExitStack() as undo:
        undo.enter_context(exact_products())
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
def exact_products() -> Iterator[None]:
    """Within this context products of float32 matrices are not rounded, whatever torch was set to."""
    torch_backends: Any = torch.backends  # has no types for these
    backends = [torch_backends.mkldnn.matmul, torch_backends.cuda.matmul]
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


class _Widened:
    """Modules whose 16-bit tensors are replaced by float32 ones from `begin` to `end`."""

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
    """The members of the outermost module lists, which are a model's decoder layers."""
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            layers += module
            inside.update(part for layer in module for part in layer.modules())
            inside.update(part for part in module.modules())
    return layers


def _can_be_widened(model: PreTrainedModel) -> bool:
    weights = list(model.parameters())
    plain = all(
        weight.is_floating_point() and not weight.is_meta and type(weight) is nn.Parameter for weight in weights
    )
    distributed = any(isinstance(weight.data, DTensor) for weight in weights)
    kernel = model.config.get_text_config()._attn_implementation
    takes_float32 = kernel in ("sdpa", "eager") or kernel.startswith("ropewalk")
    return model.dtype in _NARROW and plain and not distributed and takes_float32
