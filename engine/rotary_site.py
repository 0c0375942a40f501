"""The rotary modules of a transformers model: finding them, and checking them against the config."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import UnsupportedModel
from ..scaling.band import Band
from ..scaling.hf import ConfiguredRope, is_local, read
from ..scaling.rope import Scaler

# inv_freq must be what the config gives. A model that was cast to 16 bits has rounded it.
_TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-5}
_ROUNDED_TOLERANCE = 1e-2
_LONGEST = "max_seq_len_cached"  # transformers' name for the longest text so far


@dataclass(kw_only=True, eq=False)
class RotarySite:
    """One set of frequencies in one rotary module; models with several layer types have one each."""

    module: nn.Module
    layer_type: str | None
    configured: ConfiguredRope

    def attribute(self, name: str) -> str:
        """The module's name for `inv_freq` or `attention_scaling` of this layer type."""
        return name if self.layer_type is None else f"{self.layer_type}_{name}"

    @property
    def inv_freq(self) -> Tensor:
        """The buffer in use, [d/2]."""
        return getattr(self.module, self.attribute("inv_freq"))  # type: ignore[no-any-return]

    @property
    def attention_scaling(self) -> float:
        """The factor on cos and sin in use."""
        return float(getattr(self.module, self.attribute("attention_scaling")))

    @property
    def is_local(self) -> bool:
        """True for layers with a sliding window, where no distance grows with the context."""
        return is_local(self.layer_type)

    def bands(self, scaler: Scaler, length: int | None) -> tuple[Band, ...]:
        """The bands of `scaler` for a sequence of `length` tokens."""
        return self.configured.bands(scaler, length)

    def logit_factor(self, scaler: Scaler, positions: Tensor) -> Tensor:
        """Temperature of the queries at `positions`, as `ConfiguredRope.logit_factor` gives it."""
        return self.configured.logit_factor(scaler, positions)


def rotary_sites(model: PreTrainedModel) -> list[RotarySite]:
    """Every set of rotary frequencies of the text model, verified against its config.

    Those of vision and audio towers are left out.

    Raises:
        UnsupportedModel: there are none, or one is not what the config gives.
    """
    text = model.config.get_text_config()
    configured = read(text)
    sites = []
    for name, module in model.named_modules():
        if not any(key == "inv_freq" or key.endswith("_inv_freq") for key in module._buffers):
            continue
        if not isinstance(getattr(module, "config", text), type(text) | type(model.config)):
            continue
        for layer_type, rope in configured.items():
            site = RotarySite(module=module, layer_type=layer_type, configured=rope)
            if site.attribute("inv_freq") not in module._buffers:
                raise UnsupportedModel(
                    f"{type(model).__name__}: {name} has no {site.attribute('inv_freq')}; its position encoding is "
                    "laid out in a way ropewalk does not know"
                )
            _verify(type(model).__name__, name, site)
            sites.append(site)
    if not sites:
        raise UnsupportedModel(
            f"{type(model).__name__} has no rotary position embedding that ropewalk can find; "
            "only RoPE models can be scaled"
        )
    return sites


def _verify(model_name: str, module_name: str, site: RotarySite) -> None:
    rope = site.configured
    actual = site.inv_freq.detach().double().cpu()
    tolerance = _TOLERANCE.get(site.inv_freq.dtype, _ROUNDED_TOLERANCE)
    for length in _lengths_read(site):
        frequencies = rope.scaler.frequencies(rope.rope, length)
        expected = frequencies.inv_freq
        if actual.shape == expected.shape and torch.allclose(actual, expected, rtol=tolerance, atol=1e-12):
            _verify_factor(f"{model_name}: {module_name}", site, frequencies.attention_factor)
            return
    raise UnsupportedModel(
        f"{model_name}: the frequencies in {module_name} are not those of its config ({rope.scaler} at base "
        f"{rope.rope.base:g}); it was patched by other means, or computes them in a way that ropewalk does not know"
    )


def _verify_factor(name: str, site: RotarySite, expected: float) -> None:
    attribute = site.attribute("attention_scaling")
    actual = getattr(site.module, attribute, expected)
    if not math.isclose(actual, expected, rel_tol=1e-5):
        raise UnsupportedModel(
            f"{name}.{attribute}, the factor on cos and sin, is {actual:g}, and its config gives {expected:g}; set it "
            "to that, or write the factor into the config"
        )


def _lengths_read(site: RotarySite) -> list[int | None]:
    """Text lengths whose frequencies a module may hold: under a dynamic scaling it holds those of its last text."""
    rope = site.configured
    if not rope.scaler.depends_on_length:
        return [None]
    longest = getattr(site.module, site.attribute(_LONGEST), None)
    return [None, rope.rope.trained_length + 1, *([] if longest is None else [int(longest)])]


class SavedFrequencies:
    """The frequencies in rotary modules. With a dynamic scaling in its config, transformers changes them in place and
    stores the length of the longest text so far. Saved here, to be restored after casts, and after texts of ours."""

    def __init__(self, sites: list[RotarySite]) -> None:
        self._saved = [(site, site.inv_freq) for site in sites]
        self._dynamic = [
            (site, site.inv_freq, site.inv_freq.clone(), getattr(site.module, site.attribute(_LONGEST), None))
            for site in sites
            if site.configured.scaler.depends_on_length
        ]

    def restore(self) -> None:
        """Restore them in the same tensors."""
        for site, buffer, values, longest in self._dynamic:
            with torch.inference_mode():  # a text read in this mode may have made the buffer
                buffer.copy_(values)
            if longest is not None:
                setattr(site.module, site.attribute(_LONGEST), longest)
        for site, buffer in self._saved:
            site.module._buffers[site.attribute("inv_freq")] = buffer.to(site.inv_freq.device)


def depends_on_length(sites: list[RotarySite], scaler: Scaler) -> bool:
    """True if `scaler`, or a scaling of the model's own that it leaves in place, depends on length."""
    return any(
        site.configured.effective(each).depends_on_length for site in sites for each in site.configured.by_layer(scaler)
    )


def primary_rotary(sites: list[RotarySite]) -> RotarySite:
    """The site whose frequencies count as those of the model: that of the global layers."""
    return next((site for site in sites if not site.is_local), sites[0])
