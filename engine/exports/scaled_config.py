"""What `export` writes: the static scaler that a file can hold, and whether the file holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ...errors import ConfigError, UnsupportedModel
from ...scaling import hf, hf_write
from ...scaling.interpolation import DynamicNTK
from ...scaling.lengths import format_length, parse_length
from ...scaling.longrope import LongRoPE, fix_length, follows_length
from ...scaling.rope import RopeSpec, Scaler
from ...scaling.spec import Auto, parse
from ..checkpoints.checkpoint import read_config
from ..patches.derived import derived_numbers, derives_numbers, parameters_under

__all__ = ["Derived", "check_written", "configured_in", "is_accepted", "scaler_to_write"]


def scaler_to_write(
    asked: str | Scaler | None, configured: hf.ConfiguredRope, length: int | str | None, target: str
) -> tuple[Scaler, int]:
    """The static scaler to be written, with the model's own frequencies where it sets none, and the length."""
    scaler = parse(asked, configured.max_length)
    if isinstance(scaler, Auto):
        raise ConfigError(
            "'auto' chooses for every request; name one scaler, such as the one that `tune` says a config holds"
        )
    tokens = None if length is None else parse_length(length, configured.max_length)
    _check_carried(scaler, configured)
    configured.check(scaler)
    reach = configured.reach(scaler)
    if tokens is not None and tokens > reach:
        raise ConfigError(
            f"{scaler} reaches {format_length(int(reach))} tokens on this model, fewer than the "
            f"{format_length(tokens)} asked for; take a larger factor, or a smaller length"
        )
    effective = configured.effective(scaler)
    if not follows_length(effective):
        return effective, tokens or int(reach)
    if tokens is not None:
        return fix_length(effective, configured.rope, tokens), tokens
    if target == "hf" and isinstance(effective, LongRoPE):
        return effective, int(reach)
    if target == "hf" and isinstance(effective, DynamicNTK):  # transformers counts it from the length of the config
        return effective, configured.rope.trained_length
    raise ConfigError(
        f"{effective} follows the length of the text in a way that {target} does not; give the length at which it is "
        "to be held still, such as 4x"
    )


def _check_carried(scaler: Scaler, configured: hf.ConfiguredRope) -> None:
    """Refuse what acts on more than the frequencies, and say what comes nearest."""
    try:
        hf_write.check_frequencies_only(scaler)
    except ConfigError as error:
        reach = configured.reach(scaler)
        own = scaler.member("frequencies")
        stretch = reach / configured.rope.trained_length
        nearest = str(own) if own else f"yarn:{stretch:g}" if math.isfinite(stretch) and stretch > 1 else "yarn:4"
        raise ConfigError(
            f"{error}. The nearest that can be carried is {nearest}; `ropewalk tune` measures which is the best"
        ) from None


def check_written(folder: Path, wanted: Mapping[str | None, tuple[RopeSpec, Scaler]]) -> None:
    """Refuse a folder whose config transformers does not accept, or from which it computes other frequencies."""
    try:
        found = configured_in(folder)
    except Exception as error:  # the config classes raise their own
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(
            f"transformers does not accept the scaled config of this model ({reason}); patch it where it runs instead"
        ) from error
    for kind, (rope, scaler) in wanted.items():
        if not _same(rope, scaler, found[kind]):
            raise UnsupportedModel(
                f"transformers would read {scaler} otherwise from the config of this model; patch it where it runs "
                "instead"
            )


def is_accepted(content: Mapping[str, Any], wanted: Mapping[str | None, tuple[RopeSpec, Scaler]]) -> bool:
    """True if transformers takes the content of a config.json and computes the frequencies of the scalers from it."""
    try:
        found = hf.read(content)
    except Exception:  # the config classes raise their own
        return False
    return all(_same(rope, scaler, found[kind]) for kind, (rope, scaler) in wanted.items())


def _same(rope: RopeSpec, scaler: Scaler, found: hf.ConfiguredRope) -> bool:
    for length in (1, 2 * rope.trained_length):
        ours, theirs = scaler.frequencies(rope, length), found.scaler.frequencies(found.rope, length)
        if not torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=1e-20):
            return False
        if not math.isclose(ours.attention_factor, theirs.attention_factor, rel_tol=1e-6):
            return False
    return True


@dataclass(frozen=True)
class Derived:
    """A model that derives numbers from `rope_parameters` outside of its rotary modules, such as a softmax scale."""

    kind: type[PreTrainedModel]
    config: Any

    @classmethod
    def of(cls, config: Any, model: PreTrainedModel | None) -> Self | None:
        """None for a model that derives nothing.

        Args:
            model: the model in memory, if it is there.

        Raises:
            UnsupportedModel: transformers has no causal language model for the config, or cannot build it.
        """
        if model is None:
            config = config.get_text_config()
            kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
            if kind is None:
                raise UnsupportedModel(f"transformers has no causal language model for {type(config).__name__}")
        else:
            kind = type(model)
        return cls(kind, config) if derives_numbers(kind, config) else None

    def check(self, folder: Path, wanted: Mapping[str | None, tuple[hf.ConfiguredRope, Scaler]]) -> None:
        """Refuse a folder from whose config transformers derives other numbers than those of the scalers."""
        written = read_config(str(folder))
        written = written if isinstance(written, type(self.config)) else written.get_text_config()
        found = derived_numbers(self.kind, written)
        changed = {
            kind: parameters_under(one, scaler)
            for kind, (one, scaler) in wanted.items()
            if scaler.member("frequencies") != one.scaler.member("frequencies")
        }
        for (name, attribute), value in derived_numbers(self.kind, self.config, changed).items():
            if not math.isclose(found[name, attribute], value, rel_tol=1e-6):
                scaler = next(scaler for _, scaler in wanted.values())
                raise UnsupportedModel(
                    f"{scaler} cannot be written for this model: from the config transformers would take "
                    f"{found[name, attribute]:.6g} for {name}.{attribute}, and {value:.6g} is right; leave out what is "
                    "laid over yarn, or patch the model where it runs"
                )


def configured_in(folder: Path) -> dict[str | None, hf.ConfiguredRope]:
    """The rotary embeddings of the checkpoint in a folder."""
    return hf.read(read_config(str(folder)).get_text_config())
