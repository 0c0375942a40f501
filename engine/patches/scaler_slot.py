"""The scaler of a model that changes its scaler from request to request."""

from __future__ import annotations

from transformers import PreTrainedModel

from ...errors import ConfigError, PatchError, Setting, UnsupportedModel
from ...scaling.rope import Scaler
from ..rotary_site import RotarySite, depends_on_length
from ..runners.runner import Runner
from .patch import Patch, install, patched_with, record_patch

_UNKNOWN = -1
_MOST_KEPT = 16  # patches, of the scalers used last


class ScalerSlot:
    """Puts one scaler at a time into a model and its runner, at first the empty one.

    Attributes:
        installed: the patch of the scaler in use.
        follows_length: True if that scaler depends on the length, so that `prepare` is due for every length.
    """

    def __init__(self, hf: PreTrainedModel, sites: list[RotarySite], runner: Runner) -> None:
        self._hf, self._sites, self._runner = hf, sites, runner
        self._prepared: dict[Scaler, Patch] = {}
        self._refused: set[Scaler] = set()
        self.installed = install(hf, sites, Scaler(), grows=False)
        self.follows_length = False
        self._length: int | None = None
        self._begin()

    def put(self, scaler: Scaler, *, remember: bool = False) -> None:
        """Replace the scaler in use by `scaler`. If that is refused or interrupted, the old one stays.

        Args:
            remember: keep the patch of `scaler`. The first time, the checks of a patch take a few short forward
                passes; after that a kept patch costs nothing.

        Raises:
            ConfigError: the scaler cannot work on this model.
            UnsupportedModel: the model does not allow the patch that this scaler needs.
            PatchError: another patch was put into the model from outside.
        """
        before = self.installed
        self.check_own()
        before.restore()
        try:
            if remember and scaler in self._prepared:
                self.installed = self._prepared[scaler]
                self.installed.apply()
            else:
                self.installed = install(self._hf, self._sites, scaler, grows=False)
            if self._runner.is_compiled and self.installed.derived:
                raise UnsupportedModel(
                    f"{type(self._hf).__name__} computes more than its frequencies from rope_parameters, which the "
                    "compiled kernels cannot change; ",
                    Setting("compile", False, "load"),
                )
            self._begin()
        except BaseException:  # also Ctrl-C: a model without a scaler must not be said to have one
            self.installed.restore()
            self.installed = before
            before.apply()
            self._begin()
            raise
        record_patch(self._hf, self._sites, scaler if scaler.parts else None)
        if remember:
            self._prepared.pop(scaler, None)
            self._prepared[scaler] = self.installed
            if len(self._prepared) > _MOST_KEPT:
                del self._prepared[next(iter(self._prepared))]

    def check_own(self) -> None:
        """Raise PatchError if another patch was put into the model from outside."""
        for site in self._sites:
            if (patched := patched_with(site.module)) not in (None, self.installed.scaler):
                raise PatchError(f"the model underneath is patched with {patched}; undo that first")

    def takes(self, scaler: Scaler) -> bool:
        """True if `scaler` can be put into the model. It is tried once."""
        if scaler not in self._prepared and scaler not in self._refused:
            before = self.installed.scaler
            try:
                self.put(scaler, remember=True)
            except (ConfigError, UnsupportedModel):
                self._refused.add(scaler)
            else:
                self.put(before, remember=True)
        return scaler in self._prepared

    def prepare(self, scaler: Scaler, length: int | None) -> None:
        """Make `scaler` ready for sequences of `length` tokens. Does nothing if it is ready already."""
        if scaler is not self.installed.scaler and scaler != self.installed.scaler:
            self.put(scaler, remember=True)
        if self.follows_length and length != self._length:
            self._write(length)

    def _begin(self) -> None:
        """Set a newly installed scaler to lengths within training, until `prepare` gives another length."""
        self.follows_length = depends_on_length(self._sites, self.installed.scaler)
        self._write(None)

    def _write(self, length: int | None) -> None:
        self._length = _UNKNOWN  # an interruption here makes the next `prepare` write everything again
        self.installed.set_length(length)
        self._runner.use(self.installed.scaler, length)
        self._length = length
