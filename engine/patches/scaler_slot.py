"""One scaler at a time in a model, and changes between them."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import ConfigError, PatchError, UnsupportedModel
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, depends_on_length
from ..runners.runner import Runner
from .patch import Patch, install
from .patch_record import patched_with, record_patch

_UNKNOWN = -1


class ScalerSlot:
    """Puts one scaler at a time into a model and its runner; at first none."""

    def __init__(self, hf: PreTrainedModel, sites: list[RotarySite], runner: Runner) -> None:
        self._hf, self._sites, self._runner = hf, sites, runner
        self._prepared: dict[Scaler, Patch] = {}
        self._refused: set[Scaler] = set()
        self._installed = install(hf, sites, Scaler(), grows=False)
        self._follows_length = False
        self._length: int | None = None
        self._begin()

    @property
    def scaler(self) -> Scaler:
        """The scaler in use."""
        return self._installed.scaler

    def put(self, scaler: Scaler, *, remember: bool = False) -> None:
        """Replace the scaler in use by `scaler`. It stays in use if this is refused or interrupted.

        Args:
            remember: how it is installed. The second time is free then; the first takes a few short forwards.

        Raises:
            ConfigError: the scaler cannot work on this model.
            UnsupportedModel: the model cannot be patched in the way that this scaler needs.
            PatchError: the model is patched from outside.
        """
        before = self._installed
        if (patched := patched_with(self._hf)) not in (None, before.scaler):
            raise PatchError(f"the model underneath is patched with {patched}; undo that first")
        before.restore()
        try:
            if remember and scaler in self._prepared:
                self._installed = self._prepared[scaler]
                self._installed.apply()
            else:
                self._installed = install(self._hf, self._sites, scaler, grows=False)
            if self._runner.is_compiled and self._installed.derived:
                raise UnsupportedModel(
                    f"{type(self._hf).__name__} takes more than its frequencies from rope_parameters, which the "
                    "compiled kernels do not follow; load it with compile=False"
                )
            self._begin()
        except BaseException:  # Ctrl-C too, or the model would run under none while `scaler` names another
            self._installed.restore()
            self._installed = before
            before.apply()
            self._begin()
            raise
        record_patch(self._hf, self._sites, scaler if scaler.parts else None)
        if remember:
            self._prepared[scaler] = self._installed

    def takes(self, scaler: Scaler) -> bool:
        """True if the model can be put under `scaler`; it is tried once."""
        if scaler not in self._prepared and scaler not in self._refused:
            before = self.scaler
            try:
                self.put(scaler, remember=True)
            except (ConfigError, UnsupportedModel):
                self._refused.add(scaler)
            else:
                self.put(before, remember=True)
        return scaler in self._prepared

    def prepare(self, scaler: Scaler, length: int | None) -> None:
        """Have `scaler` in place, ready for sequences of `length` tokens; nothing happens where it is already."""
        if scaler is not self._installed.scaler and scaler != self._installed.scaler:
            self.put(scaler, remember=True)
        if self._follows_length and length != self._length:
            self._write(length)

    def _begin(self) -> None:
        """After another scaler was installed: within the trained length, as before any request."""
        self._follows_length = depends_on_length(self._sites, self._installed.scaler)
        self._write(None)

    def _write(self, length: int | None) -> None:
        self._length = _UNKNOWN  # after an interruption everything is written again
        self._installed.set_length(length)
        self._runner.use(self._installed.scaler, length)
        self._length = length
