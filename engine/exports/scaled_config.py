"""The static scaler that a file can hold, and the check that a written file holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from ...errors import ConfigError, Setting, UnsupportedModel
from ...scaling import hf, hf_write
from ...scaling.interpolation import DynamicNTK
from ...scaling.lengths import format_length, parse_length
from ...scaling.longrope import LongRoPE, fix_length, follows_length
from ...scaling.rope import Scaler
from ...scaling.spec import Auto, parse
from ..checkpoints.checkpoint import read_config
from ..checkpoints.quiet import quiet_transformers
from ..patches.derived import derived_numbers, derives_numbers, parameters_under

__all__ = ["Derived", "check_written", "is_accepted", "scaler_to_write"]


def scaler_to_write(
    asked: str | Scaler | None, configured: hf.ConfiguredRope, length: int | str | None, target: str
) -> tuple[Scaler, int]:
    """The static scaler to be written, and the length in tokens.

    A scaler that sets no frequencies gets the model's own.

    Raises:
        ConfigError: the scaler acts on more than the frequencies, does not reach `length`, or depends on the length
            in a way that the target does not know, and `length` is None.
    """
    scaler = parse(asked, configured.max_length)
    if isinstance(scaler, Auto):
        raise ConfigError(
            "'auto' chooses a scaler for every request, and a file holds one; name it, for example the best one that "
            "`ropewalk tune` finds for a config"
        )
    tokens = None if length is None else parse_length(length, configured.max_length)
    _check_carried(scaler, configured)
    configured.check(scaler)
    reach = configured.reach(scaler)
    if tokens is not None and tokens > reach:
        raise ConfigError(
            f"{scaler} reaches {format_length(int(reach))} tokens on this model, fewer than the requested "
            f"{format_length(tokens)}; take a larger factor, or a smaller length"
        )
    effective = configured.effective(scaler)
    if not follows_length(effective):
        return effective, tokens or int(reach)
    if tokens is not None:
        return fix_length(effective, configured.rope, tokens), tokens
    if target == "hf" and isinstance(effective, LongRoPE):
        return effective, int(reach)
    if target == "hf" and isinstance(effective, DynamicNTK):  # transformers counts from the length of the config
        return effective, configured.rope.trained_length
    raise ConfigError(
        f"{effective} depends on the length of the text in a way that {target} does not know; give a length to which "
        "it is fixed, such as ",
        Setting("length", "4x"),
    )


def _check_carried(scaler: Scaler, configured: hf.ConfiguredRope) -> None:
    """Refuse a scaler that acts on more than the frequencies, and name the nearest one that does not."""
    try:
        hf_write.check_frequencies_only(scaler)
    except ConfigError as error:
        if scaler.differs_by_layer:
            raise
        reach = configured.reach(scaler)
        member = scaler.member("frequencies")
        factor = reach / configured.rope.trained_length
        nearest = str(member) if member else f"yarn:{factor:g}" if math.isfinite(factor) and factor > 1 else "yarn:4"
        raise ConfigError(
            f"{error}. The nearest scaler that a config can hold is {nearest}; `ropewalk tune` measures which is best. "
            "vLLM and transformers with ropewalk installed serve it by name: ",
            Setting("target", "vllm"),
            " or ",
            Setting("target", "hf"),
        ) from None


Wanted = Mapping[str | None, tuple[hf.ConfiguredRope, Scaler]]
"""The model's rotary embedding and the scaler to be written, of each layer type."""


def check_written(folder: Path, wanted: Wanted) -> None:
    """Refuse a folder if transformers does not accept its config, or computes other frequencies from it."""
    try:
        configured = hf.read(read_config(str(folder)).get_text_config())
    except Exception as error:  # the config classes raise their own
        reason = " ".join(str(error).split())[:200]
        raise UnsupportedModel(
            f"transformers does not accept the scaled config of this model ({reason}); use ropewalk.patch instead"
        ) from error
    for layer_type, (rope, scaler) in wanted.items():
        if not _same(rope, scaler, configured[layer_type]):
            raise UnsupportedModel(
                f"transformers would compute other frequencies than those of {scaler} from the config of this model; "
                "use ropewalk.patch instead"
            )


def is_accepted(content: Mapping[str, Any], wanted: Wanted) -> bool:
    """True if transformers accepts the content of a config.json and computes the frequencies of the scalers from it."""
    try:
        with quiet_transformers():  # it warns of keys that are for vLLM and SGLang only
            configured = hf.read(content)
    except Exception:  # the config classes raise their own
        return False
    return all(_same(rope, scaler, configured[layer_type]) for layer_type, (rope, scaler) in wanted.items())


def _same(source: hf.ConfiguredRope, scaler: Scaler, configured: hf.ConfiguredRope) -> bool:
    rope = source.rope
    if source.temperature != configured.temperature:
        return False
    for length in (1, 2 * rope.trained_length):
        ours, theirs = scaler.frequencies(rope, length), configured.scaler.frequencies(configured.rope, length)
        if not torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=1e-20):
            return False
        if not math.isclose(ours.attention_factor, theirs.attention_factor, rel_tol=1e-6):
            return False
    return True


@dataclass(frozen=True)
class Derived:
    """A model that derives numbers from `rope_parameters` outside of its rotary modules, such as a softmax scale."""

    model_class: type[PreTrainedModel]
    config: Any

    @classmethod
    def of(cls, config: Any, model: PreTrainedModel | None) -> Self | None:
        """None for a model that derives no such number.

        Args:
            model: the model in memory, if there is one.

        Raises:
            UnsupportedModel: transformers has no causal language model for the config, or cannot build it.
        """
        if model is None:
            config = config.get_text_config()
            model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
            if model_class is None:
                raise UnsupportedModel(f"transformers has no causal language model for {type(config).__name__}")
        else:
            model_class = type(model)
        return cls(model_class, config) if derives_numbers(model_class, config) else None

    def check(self, folder: Path, wanted: Wanted) -> None:
        """Refuse a folder if transformers derives other numbers from its config than those of the scalers."""
        written = read_config(str(folder))
        written = written if isinstance(written, type(self.config)) else written.get_text_config()
        derived = derived_numbers(self.model_class, written)
        changed = {
            layer_type: parameters_under(rope, scaler)
            for layer_type, (rope, scaler) in wanted.items()
            if scaler.member("frequencies") != rope.scaler.member("frequencies")
        }
        for (name, attribute), expected in derived_numbers(self.model_class, self.config, changed).items():
            if not math.isclose(derived[name, attribute], expected, rel_tol=1e-6):
                scaler = next(scaler for _, scaler in wanted.values())
                raise UnsupportedModel(
                    f"{scaler} cannot be written for this model: transformers would compute {name}.{attribute} = "
                    f"{derived[name, attribute]:.6g} from the config, and {expected:.6g} is correct; leave out what is "
                    "combined with yarn, or use ropewalk.patch"
                )
