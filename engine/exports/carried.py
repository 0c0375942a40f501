"""What `export` writes: the static scaler that a file can hold, and whether the file holds it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ...errors import ConfigError, UnsupportedModel
from ...scaling import hf, hf_write
from ...scaling.auto import Auto
from ...scaling.frozen import follows_length, frozen
from ...scaling.interpolation import DynamicNTK
from ...scaling.lengths import format_length, parse_length
from ...scaling.longrope import LongRoPE
from ...scaling.rope import RopeSpec, Scaler
from ...scaling.spec import parse
from ..checkpoints.checkpoint import read_config

__all__ = ["check_written", "configured_in", "settle"]


def settle(
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
        return frozen(effective, configured.rope, tokens), tokens
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
        hf_write.check_carried(scaler)
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
        for length in (1, 2 * rope.trained_length):
            ours, theirs = scaler.frequencies(rope, length), found[kind].scaler.frequencies(found[kind].rope, length)
            same = torch.allclose(ours.inv_freq, theirs.inv_freq, rtol=1e-6, atol=1e-20)
            if not (same and math.isclose(ours.attention_factor, theirs.attention_factor, rel_tol=1e-6)):
                raise UnsupportedModel(
                    f"transformers would read {scaler} otherwise from the config of this model; patch it where it runs "
                    "instead"
                )


def configured_in(folder: Path) -> dict[str | None, hf.ConfiguredRope]:
    """The rotary embeddings of the checkpoint in a folder."""
    return hf.read(read_config(str(folder)).get_text_config())
