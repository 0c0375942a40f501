"""The patch for position maps and growing lengths. It moves the rotation from the rotary modules into attention."""

from __future__ import annotations

import math
import sys
import threading
import weakref
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer, StaticLayer
from transformers.masking_utils import causal_mask_function

from ...errors import ConfigError, PatchError, UnsupportedModel, warn
from ...scaling.lengths import format_length
from ...scaling.rope import Scaler
from ..attention.banded import banded_attention
from ..attention.kernel import AttentionScore
from ..attention.plan import Plan, Segment
from ..attention.rows import KeyRun, key_runs, key_slots
from ..cache import adopt
from ..rotary_site import RotarySite, depends_on_length, primary_rotary
from .attention_hook import AttentionHook, unpatched_attention, unpatched_mask
from .derived import DerivedNumbers
from .float32 import float32_arithmetic
from .paged_call import is_paged, places_in_texts, text_runs, update_pages
from .positions import RotaryHook, positions_of_call
from .probe import LayerRope, layer_ropes, logits
from .window_rotation import WindowRotation, places_in_window

_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4}  # largest difference of logits, relative to the largest logit
_TOLERANCE_16_BIT = 5e-2

Work = list[tuple[KeyRun, list[Segment]]]

_NO_CALL: tuple[None, list[KeyRun], dict[Plan, Work]] = (None, [], {})

_last_call = threading.local()  # `last`: the last call of this thread, its runs, and the work of every plan


class BandPatch:
    """Queries, keys and the cache of a model stay un-rotated. Its attention rotates them for each band.

    Layers with a sliding window keep the model's own attention, at the model's own frequencies.

    Raises:
        UnsupportedModel: patched with its own frequencies, the model does not reproduce its own logits.
    """

    tier = "position bands: queries, keys and the cache stay un-rotated, attention rotates them band by band"
    cost = (
        "each (query, key) pair is scored once; transformers' default cache stores rotated copies of its keys, and any "
        "other cache has its keys rotated at every step"
    )

    def __init__(self, model: PreTrainedModel, sites: list[RotarySite], scaler: Scaler) -> None:
        self._model = model
        self.sites = sites
        self.scaler = scaler
        for site in self.scaled_sites:
            site.configured.check(scaler)
        self.derived = DerivedNumbers(model, self.scaled_sites, scaler)
        self._hook = AttentionHook(model)
        self._rotary = RotaryHook(site.module for site in sites)
        self._layers, self._without_positions = self._probed()
        self._check_layers()
        self._plan(Scaler(), None)
        self._windows = WindowRotation()
        self._warned = False
        self._install()

    @property
    def scaled_sites(self) -> list[RotarySite]:
        """The sites that the scaler changes: those of layers without a sliding window."""
        return [site for site in self.sites if not site.is_local]

    def set_length(self, length: int | None = None) -> None:
        """Fix the length of a scaler that depends on the length; None lets it grow with each sequence."""
        self.derived.apply()
        length = length if depends_on_length(self.scaled_sites, self.scaler) else None
        if self._planned != (self.scaler, length):
            self._plan(self.scaler, length)

    def restore(self) -> None:
        """Restore the model's rotary modules and attention. The model is then what it was, bit for bit."""
        for hook in self._hooks:
            hook.remove()
        self._rotary.restore()
        self._hook.remove()
        self.derived.restore()

    def _plan(self, scaler: Scaler, length: int | None) -> None:
        keys = {index: (rope.site, scaler.on(index)) for index, rope in self._layers.items() if not rope.is_local}
        plans = {key: Plan(key[0] or primary_rotary(self.sites), key[1], length) for key in set(keys.values())}
        self._plans = {index: plans[key] for index, key in keys.items()}
        self._planned = scaler, length

    def _probed(self) -> tuple[dict[int, LayerRope], list[nn.Module]]:
        layers, without_positions = layer_ropes(self._model, self.sites)
        if all(layer.is_local for layer in layers.values()):
            raise UnsupportedModel(
                f"every layer of {type(self._model).__name__} sees a sliding window only, so no distance grows with "
                "the context; set config.sliding_window to None before loading, or patch a static frequency scaler, or "
                "give length= to a scaler that depends on the length"
            )
        return layers, without_positions

    def _check_layers(self) -> None:
        """Refuse a part of the scaler for layers that the model does not have, or in which it does nothing."""
        last = max(self._layers)
        for part in self.scaler.parts:
            if not part.differs_by_layer:
                continue
            named = part.changed_layers[-1]
            if named.start > last or last + 1 < named.stop < sys.maxsize:
                raise ConfigError(f"{part}: the model has the layers 0 to {last} only")
            if not any(part.on(index).parts and _changes(part, rope) for index, rope in self._layers.items()):
                raise ConfigError(
                    f"{part} changes nothing: these layers of {type(self._model).__name__} see a sliding window only, "
                    "or do not rotate"
                )

    def _install(self) -> None:
        rounded = any(site.inv_freq.dtype not in _TOLERANCE for site in self.sites)  # as after `model.bfloat16()`
        with float32_arithmetic(self._model):
            # not the probe's logits: some models, such as Falcon, compute differently when attention is replaced
            before = logits(self._model)
            try:
                self.apply()
                self._verify(before, _TOLERANCE_16_BIT if rounded else _TOLERANCE.get(before.dtype, _TOLERANCE_16_BIT))
                self.set_length(None)
            except BaseException:  # also Ctrl-C, which must not leave half a patch
                self.restore()
                raise

    def apply(self) -> None:
        """Move the rotation into attention. After `restore` this needs no new check of the model."""
        self._hooks = []
        for module in self._model.modules():
            if isinstance(module, PreTrainedModel):  # each of them may be called alone
                self._hooks += [
                    module.register_forward_pre_hook(_use_rotated_layers, with_kwargs=True),
                    # positions may be changed in place between calls
                    module.register_forward_pre_hook(_clear_last_call),
                    # frees the work of the call
                    module.register_forward_hook(_clear_last_call),
                ]
        self._rotary.disable_rotation()
        self._rotary.pass_positions(self._without_positions)
        self._hook.install(self)

    def _verify(self, before: Tensor, tolerance: float) -> None:
        """Refuse a model whose logits, patched with its own frequencies, differ from those before."""
        name = type(self._model).__name__
        try:
            difference = (logits(self._model) - before).abs().max() / before.abs().max()
        except Exception as error:
            raise UnsupportedModel(f"{name} does not run with its rotation moved into attention: {error}") from error
        if not difference < tolerance:
            raise UnsupportedModel(
                f"{name} computes attention in a way that ropewalk does not reproduce (its logits differ by "
                f"{float(difference):.2g} of the largest); static frequency scalers such as yarn:4 can be patched"
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
        """None for causal attention over all keys; a tensor of `key_slots` with padding; else the model's own mask.

        Windows and packed texts get the model's own mask.
        """
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
        """Attention by the signature of transformers' registry; query [B, H, N, D] -> [B, N, H, Dv]."""
        _check_call(others)
        paged = others.get("cache") is not None
        if paged:
            key, value = update_pages(module, key, value, others)
        layer = self._layers[module.layer_idx]  # type: ignore[index]
        if layer.is_local:
            scaler, length = self._planned
            places = places_in_texts(query, key, others) if paged else places_in_window(query, key, attention_mask)
            query, key = self._windows.rotate(layer, scaler.on(module.layer_idx), length, query, key, places)  # type: ignore[arg-type]
            arguments = {**others, "position_ids": position_ids, "dropout": dropout, "scaling": scaling}
            arguments |= {k: v for k, v in (("softcap", softcap), ("s_aux", s_aux)) if v is not None}
            function = unpatched_attention(module, updated=paged)
            out, _ = function(module, query, key, value, attention_mask, **arguments)
            return out, None
        positions = positions_of_call(position_ids)
        scale = scaling if scaling is not None else query.shape[-1] ** -0.5
        out = banded_attention(
            query,
            key,
            value,
            AttentionScore(scale=scale, softcap=softcap, dropout=dropout if module.training else 0.0),
            layer.layout,
            self._work(self._plans[module.layer_idx], positions, attention_mask, query, key, others),  # type: ignore[index]
            s_aux,
            getattr(key, "rotated", None),
        )
        return out.transpose(1, 2).contiguous(), None

    def _work(
        self, plan: Plan, positions: Tensor, mask: Any, query: Tensor, key: Tensor, others: dict[str, Any]
    ) -> Work:
        """The runs of the call with their segments. All layers of a plan have the same, so it is made once."""
        call = (self._planned, key.shape[2], *map(_reference, (self, positions, mask)))
        last_call, runs, works = getattr(_last_call, "last", _NO_CALL)
        if last_call != call:
            if is_paged(others):
                runs = text_runs(positions, others)
            else:
                runs = key_runs(positions, mask, query.shape[0], query.shape[2], key.shape[2])
            self._warn_beyond_reach(runs)
            works = {}
            _last_call.last = call, runs, works
        if plan not in works:
            works[plan] = [(run, plan.segments(run, query.device)) for run in runs]
        return works[plan]

    def _warn_beyond_reach(self, runs: list[KeyRun]) -> None:
        reach = primary_rotary(self.sites).configured.reach(self.scaler)
        if self._warned or math.isinf(reach) or not self.scaler.member("positions"):
            return
        longest = max((run.first + run.key_stop - run.key_start for run in runs), default=0)
        if longest > reach:
            self._warned = True
            warn(
                f"{self.scaler} reaches {format_length(int(reach))} tokens on this model and the text has {longest}: "
                "some distances are longer than in training",
            )


def _check_call(others: dict[str, Any]) -> None:
    if others.get("output_attentions"):
        raise PatchError(
            "output_attentions=True does not work under this scaler, whose attention stores no weights; undo the patch "
            "first"
        )
    if others.get("position_bias") is not None:
        raise PatchError("position bias does not work under this scaler; undo the patch first")
    if others.get("is_causal") is False and others.get("cache") is None:  # continuous batching gives masks
        raise PatchError(
            "this scaler needs causal attention, and this call asks for attention in both directions; undo the "
            "patch first"
        )


def _use_rotated_layers(_module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give transformers' default cache layers that also store rotated keys. Refuse one that was filled before."""
    cache = kwargs.get("past_key_values")
    if cache is None:
        return
    if not hasattr(cache, "ropewalk_unrotated"):
        _check_empty(cache)
        cache.ropewalk_unrotated = True
    if not torch.is_grad_enabled():
        adopt(cache)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _check_empty(cache: Cache) -> None:
    """Refuse a cache of transformers that holds keys. Those that the model stored without the patch are rotated."""
    if any(isinstance(layer, DynamicLayer | StaticLayer) and layer.get_seq_length() for layer in cache.layers):
        raise PatchError(
            "this cache was filled without the patch, so its keys are rotated already, and this scaler needs them "
            "un-rotated; begin with an empty cache"
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _clear_last_call(*_: Any) -> None:
    _last_call.last = _NO_CALL


def _reference(value: Any) -> Any:
    """A weak reference that equals another one only for the same live object."""
    return None if value is None else _Reference(value)


class _Reference(weakref.ref):  # type: ignore[type-arg]
    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Reference) and self() is other() is not None

    __hash__ = weakref.ref.__hash__


def _changes(part: Scaler, layer: LayerRope) -> bool:
    """False if `part` of a scaler changes nothing in a layer."""
    if part.facet in ("positions", "temperature"):
        return not layer.is_local
    return layer.site is not None and not layer.site.is_local
