"""The patch for position maps and growing lengths: rotation moves from the rotary module into attention."""

from __future__ import annotations

import math
import threading
import warnings
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import causal_mask_function

from ...errors import PatchError, UnsupportedModel
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..attention.banded import banded_attention
from ..attention.kernel import AttentionScore
from ..attention.plan import Plan, Segment
from ..attention.rotation import angles
from ..attention.rows import KeyRun, key_runs, key_slots
from ..cache import adopt
from ..rotary_site import RotarySite, depends_on_length, primary_rotary
from .attention_hook import AttentionHook, unpatched_attention, unpatched_mask
from .float32 import float32_arithmetic
from .frequency_patch import derived_numbers
from .positions import RotaryHook, positions_of_call, visible_keys
from .probe import LayerRope, layer_ropes, logits

_VERIFIED = {torch.float64: 1e-5, torch.float32: 1e-4}  # largest difference of logits, of their largest
_VERIFIED_16_BIT = 5e-2

Work = list[tuple[KeyRun, list[Segment]]]

_last_call = threading.local()  # `last`: what this thread made work for last, and the work


class BandPatch:
    """Queries, keys and the cache of a model stay un-rotated; its attention rotates them band by band as it reads.

    Layers with a short window go on with the model's own attention, at the model's own frequencies.

    Raises:
        UnsupportedModel: the model is not reproduced by its own frequencies in this form.
    """

    tier = "position bands: queries, keys and the cache stay un-rotated, attention rotates them band by band"
    cost = (
        "each (query, key) pair is scored once; keys of a foreign or static cache are rotated at every step, "
        "those of transformers' default cache once; rotated copies of the keys are stored with it"
    )

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self._model = model
        self.sites = sites
        self.scaler = scaler
        for site in self.scaled_sites:
            site.configured.check(scaler)
        self.derived = derived_numbers(model, self.scaled_sites, scaler)
        self._hook = AttentionHook(model)
        self._rotary = RotaryHook(site.module for site in sites)
        self._layers, self._without_positions = self._probed()
        self._plan(Scaler(), None)
        self._warned = False
        self._install()

    @property
    def scaled_sites(self) -> list[RotarySite]:
        """The sites that the scaler applies to: all but sliding-window layers."""
        return [site for site in self.sites if not site.is_local]

    def set_length(self, length: int | None = None) -> None:
        """Fix the length that a scaler which depends on it is for; None lets it grow with each sequence."""
        self.derived.apply()
        length = length if depends_on_length(self.scaled_sites, self.scaler) else None
        if self._planned != (self.scaler, length):
            self._plan(self.scaler, length)

    def restore(self) -> None:
        """Give the model back its rotary modules and its attention; it is what it was, to the bit."""
        for hook in self._hooks:
            hook.remove()
        self._rotary.restore()
        self._hook.remove()
        self.derived.restore()

    def _plan(self, scaler: Scaler, length: int | None) -> None:
        used = {layer.site for layer in self._layers.values() if not layer.is_local}
        plans = {site: Plan(site or primary_rotary(self.sites), scaler, length) for site in used}
        self._plans, self._planned = plans, (scaler, length)

    def _probed(self) -> tuple[dict[int, LayerRope], list[nn.Module]]:
        layers, untold = layer_ropes(self._model, self.sites)
        if all(layer.is_local for layer in layers.values()):
            raise UnsupportedModel(
                f"every layer of {type(self._model).__name__} sees a sliding window only, so no distance grows with "
                "the context; set config.sliding_window to None before loading, or patch a static frequency scaler, or "
                "one that follows the length with a fixed length="
            )
        return layers, untold

    def _install(self) -> None:
        rounded = any(site.inv_freq.dtype not in _VERIFIED for site in self.sites)  # by `model.bfloat16()`, say
        with float32_arithmetic(self._model):
            # not the probe's logits: Falcon, for one, runs otherwise when its attention is replaced
            before = logits(self._model)
            try:
                self.apply()
                self._verify(before, _VERIFIED_16_BIT if rounded else _VERIFIED.get(before.dtype, _VERIFIED_16_BIT))
                self.set_length(None)
            except BaseException:  # Ctrl-C too must not leave half a patch
                self.restore()
                raise

    def apply(self) -> None:
        """Move the rotation into attention; after `restore` too, without looking at the model anew."""
        self._hooks = []
        for module in self._model.modules():
            if isinstance(module, PreTrainedModel):  # any of them may be called by itself
                self._hooks += [
                    module.register_forward_pre_hook(_use_rotated_layers, with_kwargs=True),
                    module.register_forward_pre_hook(
                        _clear_last_call
                    ),  # positions may be changed in place between calls
                    module.register_forward_hook(_clear_last_call),  # and need not be held until the next
                ]
        self._rotary.disable_rotation()
        self._rotary.pass_positions(self._without_positions)
        self._hook.install(self)

    def _verify(self, before: Tensor, tolerance: float) -> None:
        """Refuse unless the model's own frequencies, in this form, give the logits that they gave before."""
        name = type(self._model).__name__
        try:
            difference = (logits(self._model) - before).abs().max() / before.abs().max()
        except Exception as error:
            raise UnsupportedModel(f"{name} does not run with its rotation moved into attention: {error}") from error
        if not difference < tolerance:
            raise UnsupportedModel(
                f"{name} computes attention in a way that ropewalk does not reproduce (its "
                f"logits differ by {float(difference):.2g} of the largest); static frequency scalers such as yarn:4 "
                "can be patched"
            )

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = causal_mask_function,
        attention_mask: Tensor | None = None,
        **others: Any,
    ) -> Any:
        """Nothing for causal attention over everything, a tensor of key places with padding, the model's own mask
        for windows and packed texts."""
        if mask_function is not causal_mask_function:
            return unpatched_mask(
                batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask, **others
            )
        padded = attention_mask is not None and not bool(attention_mask.all())
        if not padded and not isinstance(q_offset, Tensor) and q_offset + q_length == kv_length + kv_offset:
            return None
        return key_slots(attention_mask if padded else None, batch_size, kv_length, kv_offset, q_offset)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        scaling: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        position_ids: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """The signature of transformers' attention registry; query [B, H, N, D] -> [B, N, H, Dv]."""
        _check_call(others)
        layer = self._layers[module.layer_idx]  # type: ignore[index]
        if layer.is_local:
            query, key = self._rotate_in_window(layer, query, key, attention_mask)
            own = {**others, "position_ids": position_ids, "dropout": dropout, "scaling": scaling}
            own |= {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
            out, _ = unpatched_attention(module)(module, query, key, value, attention_mask, **own)
            return out, None
        positions = positions_of_call(position_ids)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        out = banded_attention(
            query,
            key,
            value,
            AttentionScore(scale=scale, softcap=softcap, dropout=dropout if module.training else 0.0),
            layer.layout,
            self._work(layer.site, positions, attention_mask, query, key),
            s_aux,
            getattr(key, "rotated", None),
        )
        return out.transpose(1, 2).contiguous(), None

    def _work(
        self, site: RotarySite | None, positions: Tensor, mask: Tensor | None, query: Tensor, key: Tensor
    ) -> Work:
        """Runs and segments of the call: the same for all layers of one forward, so made once."""
        asked = (self._planned, key.shape[2], *map(_reference, (self, site, positions, mask)))
        seen, work = getattr(_last_call, "last", (None, []))
        if seen == asked:
            return work
        found = key_runs(positions, mask, query.shape[0], query.shape[2], key.shape[2])
        self._warn_beyond_reach(found)
        work = [(run, self._plans[site].segments(run)) for run in found]
        _last_call.last = asked, work
        return work

    def _warn_beyond_reach(self, found: list[KeyRun]) -> None:
        reach = primary_rotary(self.sites).configured.reach(self.scaler)
        if self._warned or math.isinf(reach) or not self.scaler.member("positions"):
            return
        longest = max((run.first + run.key_stop - run.key_start for run in found), default=0)
        if longest > reach:
            self._warned = True
            warnings.warn(
                f"{self.scaler} reaches {format_length(int(reach))} tokens on this model and the text has {longest}: "
                "distances that were never trained are in use",
                stacklevel=2,
            )

    def _rotate_in_window(self, layer: LayerRope, query: Tensor, key: Tensor, mask: Any) -> tuple[Tensor, Tensor]:
        """Queries and keys of a local layer, rotated as usual, with all positions shifted.

        Where local layers share their frequencies with the others, a scaler changes both, as it does in a config;
        but a length that grows leaves them alone.
        """
        if layer.layout is None or layer.site is None:
            return query, key
        offset = _first_query_index(mask, query.shape[2], key.shape[2])
        scaler, length = self._planned
        effective = layer.site.configured.effective(scaler)
        grows = effective.depends_on_length and length is None
        own = layer.site.configured.scaler if layer.site.is_local or grows else effective
        frequencies = own.frequencies(layer.site.configured.rope, length)
        rotated = []
        for x, start in ((query, offset), (key, 0)):
            positions = torch.arange(start, start + x.shape[2], dtype=torch.float64)
            found = angles(positions, frequencies.inv_freq, factor=frequencies.attention_factor, like=x)
            rotated.append(layer.layout.rotate(x, found))
        return rotated[0], rotated[1]


def _check_call(others: dict[str, Any]) -> None:
    if others.get("output_attentions"):
        raise PatchError(
            "output_attentions=True cannot be honoured under a position map, which never forms the weights; undo the "
            "patch first"
        )
    if others.get("position_bias") is not None or others.get("cache") is not None:
        raise PatchError("position bias and paged caches cannot be honoured under a position map; undo the patch first")
    if others.get("is_causal") is False:
        raise PatchError("a position map needs causal attention; this call asks for attention in both directions")


def _use_rotated_layers(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """transformers' default cache gets layers that store rotated keys."""
    cache = kwargs.get("past_key_values")
    if cache is not None and not torch.is_grad_enabled():
        adopt(cache)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _clear_last_call(*_: Any) -> None:
    _last_call.last = None, []


def _reference(value: Any) -> Any:
    """Equal for the same live object only, and keeps none alive."""
    return None if value is None else _Reference(value)


class _Reference(weakref.ref):  # type: ignore[type-arg]
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self() is other() is not None

    __hash__ = weakref.ref.__hash__


def _first_query_index(mask: Any, queries: int, keys: int) -> int:
    """The place of query 0 among the keys of a layer with a window: a static cache has room behind the last query.

    Args:
        mask: that of the model's own attention. The last key that a query sees is its own, unless it is padding.
    """
    if mask is None or (isinstance(mask, Tensor) and mask.dim() == 2) or queries == keys:
        return keys - queries
    seen = visible_keys(mask, keys).any(0)
    last = keys - 1 - seen.flip(1).to(torch.uint8).argmax(1)
    first_query = queries - len(last)
    return int((last - torch.arange(first_query, queries, device=last.device)).max())
