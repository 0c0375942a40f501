"""Finds out how the attention layers of a model use RoPE, by running the model.

No list of model families is needed. The model runs a short text twice, with its own rotation and without any. The
queries and keys that reach attention show the places of the rotary pairs in every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import RopewalkError, UnsupportedModel
from ...scaling.hf import is_local
from ..attention.rotation import Layout, angles
from ..hf_model import input_device
from ..rotary_site import RotarySite
from .attention_hook import AttentionHook, unpatched_attention, unpatched_mask
from .float32 import float32_arithmetic
from .positions import RotaryHook

TOKENS = 12
# largest difference, relative to the largest entry; transformers computes angles in float32
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
_TOLERANCE_16_BIT = 3e-2
_GAIN = 2.0  # on un-rotated pairs: a norm after the rotation would cancel it, as it would cancel YaRN's factor


@dataclass(frozen=True)
class LayerRope:
    """How one attention layer uses RoPE.

    Args:
        site: the rotary site with its frequencies; None for a layer without rotation.
        layout: the places of its rotary pairs; None for a layer without rotation.
        is_local: the layer has a sliding window, so its distances do not grow with the context.
    """

    site: RotarySite | None
    layout: Layout | None
    is_local: bool


@dataclass
class _Call:
    module: nn.Module
    query: Tensor
    key: Tensor
    sliding_window: int | None
    has_positions: bool  # position ids are among the arguments
    selects_keys: bool  # an indexer selects keys
    output: tuple[Tensor, Any] | None = None


class _Recorder:
    """Records all attention calls. It calls the model's own attention, or repeats the outputs of an earlier run.

    With repeated outputs, the later layers get the same input in both runs.
    """

    mask = staticmethod(unpatched_mask)

    def __init__(self, earlier: list[_Call] | None = None) -> None:
        self._earlier = earlier
        self.calls: list[_Call] = []

    def attention(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **others: Any
    ) -> Any:
        has_positions, selects_keys = (others.get(name) is not None for name in ("position_ids", "indices"))
        call = _Call(module, query, key, others.get("sliding_window"), has_positions, selects_keys)
        if self._earlier is None:
            call.output = unpatched_attention(module)(module, query, key, value, attention_mask, **others)
        else:
            call.output = self._earlier[len(self.calls)].output
        self.calls.append(call)
        return call.output


def probe_ids(model: PreTrainedModel) -> Tensor:
    """The token ids of the probe text, [1, TOKENS]."""
    vocabulary: int = model.config.get_text_config().vocab_size
    return (torch.arange(TOKENS) * 7 % (vocabulary - 1) + 1).to(input_device(model))[None]


def logits(model: PreTrainedModel, ids: Tensor | None = None) -> Tensor:
    """The logits [1, N, V] of a text in evaluation mode, or the last hidden states of a model without a head.

    Args:
        ids: token ids [1, N]; None is the probe text.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            out = model(input_ids=probe_ids(model) if ids is None else ids, use_cache=False)
            output: Tensor = out.logits if "logits" in out else out.last_hidden_state
    finally:
        for module in training:
            module.training = True
    return output


def layers_without_positions(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers of `model` that do not pass position ids to their attention function.

    Raises:
        UnsupportedModel: the model does not use transformers' attention registry, or all layers have a sliding window.
    """
    hook, recorder = AttentionHook(model), _Recorder()
    try:
        hook.install(recorder)
        logits(model)
    finally:
        hook.remove()
    if not recorder.calls:
        raise UnsupportedModel(
            f"{type(model).__name__} does not call attention through transformers' attention registry, so it takes no "
            "temperature; static frequency scalers such as yarn:4 can be patched"
        )
    if all(_is_local(model, call) for call in recorder.calls):
        raise UnsupportedModel(
            f"every layer of {type(model).__name__} sees a sliding window only, and a temperature does not change such "
            "layers, so it would do nothing; leave it out, or set config.sliding_window to None before loading"
        )
    return [call.module for call in recorder.calls if not call.has_positions]


def layer_ropes(model: PreTrainedModel, sites: list[RotarySite]) -> tuple[dict[int, LayerRope], list[nn.Module]]:
    """How every attention layer of `model` uses RoPE, by its index, and the layers that do not pass position ids on.

    Raises:
        UnsupportedModel: the model does not use transformers' attention registry, or a layer does more than rotate
            pairs.
    """
    name = type(model).__name__
    hook, rotary = AttentionHook(model), RotaryHook(site.module for site in sites)
    first = _Recorder()
    second = _Recorder(first.calls)
    try:
        with float32_arithmetic(model):
            hook.install(first)
            logits(model)
            if not first.calls:
                raise UnsupportedModel(
                    f"{name} does not call attention through transformers' attention registry, so it takes no position "
                    "map and no growing length; static frequency scalers such as yarn:4 can be patched, and dynamic "
                    "ones with a fixed length="
                )
            if any(call.selects_keys for call in first.calls):
                raise UnsupportedModel(
                    f"{name} picks keys with an indexer of its own, which a position map cannot follow"
                )
            hook.remove()
            hook.install(second)
            with rotary.rotation_disabled(_GAIN):
                logits(model)
    except RopewalkError:
        raise
    except Exception as error:
        raise UnsupportedModel(
            f"{name} does not run without its rotation ({type(error).__name__}: {error}); static frequency scalers "
            "such as yarn:4 can be patched"
        ) from error
    finally:
        hook.remove()
    layers: dict[int, LayerRope] = {}
    for rotated, plain in zip(first.calls, second.calls, strict=True):
        index = getattr(rotated.module, "layer_idx", None)
        if index is None:
            raise UnsupportedModel(f"{name}: its attention layers have no layer_idx; static scalers can be patched")
        layer = _layer(model, index, rotated, plain, sites)
        if layers.setdefault(index, layer) != layer:
            raise UnsupportedModel(
                f"{name}: two attention layers have the layer_idx {index} and rotate differently; static scalers can "
                "be patched"
            )
    return layers, [call.module for call in first.calls if not call.has_positions]


def check_frequencies_used(model: PreTrainedModel, sites: list[RotarySite]) -> None:
    """Check that the rotary modules of `sites` use the frequencies that are written into them.

    Raises:
        UnsupportedModel: they compute their angles from something else.
    """
    outputs: list[tuple[nn.Module, Any]] = []
    modules = dict.fromkeys(site.module for site in sites)
    hooks = [module.register_forward_hook(lambda module, _, out: outputs.append((module, out))) for module in modules]
    try:
        logits(model)
    finally:
        for hook in hooks:
            hook.remove()
    for site in sites:
        site_outputs = [output for module, output in outputs if module is site.module]
        if site_outputs and not any(_cosines_of(site, output) for output in site_outputs):
            raise UnsupportedModel(
                f"{type(model).__name__}: its rotary module computes its angles anew in every call, from the config "
                "and not from inv_freq, so its frequencies cannot be patched; write them into the config instead"
            )


def _cosines_of(site: RotarySite, output: Any) -> bool:
    """True if a rotary module's output has the cosines of the frequencies in `site`, in one of the usual layouts."""
    cos = output.real if isinstance(output, Tensor) and output.is_complex() else output[0]
    if cos.shape[-2] != TOKENS:  # these positions are not the tokens', but those of compressed keys, for example
        return False
    phases = torch.arange(TOKENS, dtype=torch.float64)[:, None] * site.inv_freq.double().cpu()
    expected = torch.cos(phases) * site.attention_scaling
    pairs = expected.shape[1]
    computed = cos.detach().double().cpu().reshape(-1, TOKENS, cos.shape[-1])[0]
    tolerance = 1e-4 if cos.dtype in _TOLERANCE else 2e-2
    return any(
        cosines.shape == expected.shape and torch.allclose(cosines, expected, rtol=0, atol=tolerance)
        for cosines in (computed[:, :pairs], computed[:, ::2])
    )


def _layer(model: PreTrainedModel, index: int, rotated: _Call, plain: _Call, sites: list[RotarySite]) -> LayerRope:
    local = _is_local(model, rotated)
    pairs = ((rotated.query, plain.query), (rotated.key, plain.key))
    if all(torch.equal(a, b) for a, b in pairs):
        return LayerRope(site=None, layout=None, is_local=local)
    for site in sorted(sites, key=lambda site: site.is_local != local):
        for layout in _layouts(2 * len(site.inv_freq), rotated.query.shape[-1]):
            if all(_rotates(layout, site, a, b) for a, b in pairs):
                return LayerRope(site=site, layout=layout, is_local=local)
    raise UnsupportedModel(
        f"{type(model).__name__}: layer {index} does more to queries and keys than rotate pairs of numbers (for "
        "example a norm after the rotation), so they cannot be rotated later; static frequency scalers such as yarn:4 "
        "can be patched"
    )


def _is_local(model: PreTrainedModel, call: _Call) -> bool:
    """True for a layer with a sliding window."""
    return call.sliding_window is not None or has_local_type(call.module, model.config.get_text_config())


def has_local_type(layer: nn.Module, config: Any) -> bool:
    """True if `config` gives an attention layer a type with a sliding window."""
    layer_types, index = getattr(config, "layer_types", None) or [], getattr(layer, "layer_idx", None)
    return index is not None and 0 <= index < len(layer_types) and is_local(layer_types[index])


def _layouts(dim: int, head_dim: int) -> list[Layout]:
    starts = {0, head_dim - dim} if dim <= head_dim else set()
    return [Layout(start, dim, interleaved) for start in sorted(starts) for interleaved in (False, True)]


def _rotates(layout: Layout, site: RotarySite, rotated: Tensor, plain: Tensor) -> bool:
    positions = torch.arange(plain.shape[2], dtype=torch.float64)[:, None]
    frequencies = site.configured.scaler.frequencies(site.configured.rope, plain.shape[2])
    pair_angles = angles(positions, frequencies.inv_freq, factor=frequencies.attention_factor / _GAIN, like=plain)
    expected = layout.rotate(plain, pair_angles)
    exact = _TOLERANCE.get(plain.dtype, _TOLERANCE_16_BIT)
    tolerance = max(exact, _TOLERANCE.get(site.inv_freq.dtype, _TOLERANCE_16_BIT)) * float(rotated.abs().max())
    return torch.allclose(expected, rotated, rtol=0, atol=tolerance)
