"""`patch`: give a transformers model that you already have another position scaling, and take it back."""

from __future__ import annotations

import weakref

from transformers import PreTrainedModel

from ..errors import PatchError
from ..scaling.lengths import format_length
from ..scaling.rope import Scaler
from ..scaling.spec import parse
from .rotary import RotaryWriter, headline, rotary_sites

_patched: weakref.WeakKeyDictionary[PreTrainedModel, Scaler] = weakref.WeakKeyDictionary()
"""Models patched now; no reference from here to the model, or it would never be freed."""


class PatchHandle:
    """A patch in place. Also a context manager: `with patch(model, "yarn:4"): ...` undoes it at the end.

    Attributes:
        scaler: what was patched in.
        active: True until `undo`.
    """

    def __init__(self, model: PreTrainedModel, writer: RotaryWriter) -> None:
        self._model = model
        self._writer = writer
        self.scaler = writer.scaler
        self.active = True

    @property
    def reach(self) -> float:
        """Tokens that the model is now meant to carry."""
        return headline(self._writer.sites).reach(self.scaler)

    def undo(self) -> None:
        """Restore the model to what it was before, bit for bit.

        Raises:
            PatchError: it was undone already.
        """
        if not self.active:
            raise PatchError(f"the patch {self.scaler} was undone already")
        self._writer.restore()
        del _patched[self._model]
        self.active = False

    def describe(self) -> str:
        """What was done to the model, in a few lines."""
        sites = self._writer.scaled_sites
        site = headline(sites)
        lines = [
            f"scaler:  {self.scaler}",
            "tier:    static frequencies, written into the model's own rotary modules; every attention kernel works",
            f"layers:  {', '.join(s.layer_type or 'all' for s in sites)}"
            + (
                f" (left alone: {', '.join(s.layer_type or '' for s in self._writer.sites if s.is_local)})"
                if len(sites) < len(self._writer.sites)
                else ""
            ),
            f"reach:   {format_length(int(self.reach))} tokens (trained: {format_length(site.configured.max_length)})",
            f"factor on cos and sin: {site.attention_scaling:.6g}",
            "cost:    none",
        ]
        return "\n".join(lines)

    def __enter__(self) -> PatchHandle:
        return self

    def __exit__(self, *_: object) -> None:
        if self.active:
            self.undo()


def patch(model: PreTrainedModel, scaler: str | Scaler) -> PatchHandle:
    """Put `scaler` into a transformers causal language model, in place.

    The model goes on as a plain transformers model: `model(...)`, `model.generate(...)`, any attention
    implementation, any cache. Its weights and config are not touched.

        handle = patch(model, "yarn:4")
        model.generate(...)
        handle.undo()

    Args:
        model: any transformers model with RoPE that computes its frequencies as its config says.
        scaler: a spec string (`ropewalk scalers` lists them) or a scaler.

    Raises:
        ConfigError: the scaler is wrong, or cannot work on this model.
        UnsupportedModel: the model's position encoding cannot be verified.
        PatchError: the model is patched already, or the scaler needs to know each sequence's length.
    """
    scaler = parse(scaler)
    if model in _patched:
        raise PatchError(f"this model is patched with {_patched[model]} already; undo that first")
    if scaler.depends_on_length:
        raise PatchError(
            f"{scaler} depends on the length of each sequence, which a plain transformers model does not pass on; "
            "use ropewalk.load(..., rope=...), which fixes it per request, or a static scaler such as yarn:4"
        )
    writer = RotaryWriter(rotary_sites(model), scaler)
    writer.write()
    _patched[model] = scaler
    return PatchHandle(model, writer)
