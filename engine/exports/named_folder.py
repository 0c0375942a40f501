"""A config that names its scaler, for ropewalk, and for engines with ropewalk installed: maps, log n, temperatures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ...errors import ConfigError, Setting, UnsupportedModel
from ...scaling import hf
from ...scaling.lengths import parse_length
from ...scaling.named_scaler import (
    NamedScaler,
    as_trained,
    changed_keys,
    check_named,
    ropes_of_layers,
    with_named_scaler,
)
from ...scaling.rope import Scaler
from ...scaling.spec import parse
from ..vllm_plugin.vllm_objects import architecture_of

__all__ = ["NamedExport", "needs_name"]


def needs_name(scaler: Scaler) -> bool:
    """True if a scaler acts on more than the frequencies, so that a config cannot hold it as numbers."""
    return any(part.facet in ("positions", "temperature") for part in scaler.parts)


@dataclass(frozen=True, kw_only=True)
class NamedExport:
    """A scaler on a model, to be named in its config.

    Attributes:
        named: the scaler.
        tokens: the tokens to be served.
    """

    named: NamedScaler
    tokens: int

    @classmethod
    def of(
        cls,
        asked: str | Scaler | None,
        configured: Mapping[str | None, hf.ConfiguredRope],
        length: int | str | None,
        vllm_config: Any,
    ) -> Self:
        """The export of the scaler `asked`.

        Args:
            configured: the rotary embeddings of the model by layer type.
            length: tokens to be served; None is the scaler's reach.
            vllm_config: transformers' config of a model for vLLM, else None.

        Raises:
            ConfigError: the scaler does not work on the model, does not reach `length`, or needs one.
            UnsupportedModel: layers of several kinds see the whole text, or the plug-in for vLLM was not verified with
                the model.
        """
        try:
            if vllm_config is not None:
                architecture_of(vllm_config)
            rope, local = ropes_of_layers(configured)
        except UnsupportedModel as error:
            raise UnsupportedModel(f"{asked} acts on more than the frequencies, and {error}") from None
        scaler = parse(asked, rope.max_length)
        tokens = None if length is None else parse_length(length, rope.max_length)
        fixed = tokens if rope.effective(scaler).depends_on_length else None
        check_named(scaler, rope, fixed)
        reach = rope.reach(scaler)
        if tokens is None and math.isinf(reach):
            raise ConfigError(
                f"{scaler} reaches any length; give the number of tokens to be served, such as ",
                Setting("length", "4x"),
            )
        if tokens is not None and tokens > reach and scaler.member("positions") is not None:
            raise ConfigError(
                f"{scaler} reaches {int(reach)} tokens on this model, fewer than the requested {tokens}; take a larger "
                "group or factor, or a smaller length"
            )
        named = NamedScaler(configured=rope, scaler=scaler, length=fixed, local=local)
        return cls(named=named, tokens=tokens or int(reach))

    def change(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The content of a config.json that names the scaler."""
        return with_named_scaler(as_trained(config), self.named, self.tokens)

    def overrides(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The keys by which the changed config differs from `config`."""
        return changed_keys(as_trained(config), self.named, self.tokens)

    def check(self, folder: Path) -> None:
        """Refuse a written folder from which the scaler, or the model's own rotary embedding, is not read back."""
        found = NamedScaler.read(json.loads((folder / "config.json").read_text(encoding="utf-8")))
        if found != self.named:
            raise UnsupportedModel(f"the config of this model does not hold {self.named.scaler}; use ropewalk.patch")
