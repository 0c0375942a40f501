"""A scaler that a config names, for `ropewalk.load` and for serving engines with ropewalk installed.

A config can hold the frequencies of a scaler as numbers. A position map or log n is computed by the engine's attention,
so the config holds its spec, and the rotary embedding that the model was trained with. The rope type is one that no
engine knows: without ropewalk, vLLM refuses the config, and so does transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ..errors import ConfigError, UnsupportedModel
from . import hf
from .configured_rope import ConfiguredRope
from .hf_entry import NAMED_TYPE, SCALER_KEY
from .lengths import format_length
from .rope import Frequencies, Scaler
from .spec import Auto, parse

__all__ = [
    "LENGTH_KEY",
    "NAMED_TYPE",
    "SCALER_KEY",
    "TRAINED_KEY",
    "NamedScaler",
    "as_trained",
    "changed_keys",
    "check_named",
    "is_named",
    "names_scaler",
    "ropes_of_layers",
    "with_named_scaler",
]

LENGTH_KEY, TRAINED_KEY = "ropewalk_length", "ropewalk_trained"
"""The tokens for which a scaler that depends on the length is computed, and the keys that were replaced."""

_REPLACED = (
    "max_position_embeddings",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
    "original_max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class NamedScaler:
    """A scaler on the model of a config.

    Attributes:
        configured: the rotary embedding that the model was trained with; that of the layers which see the whole text.
        scaler: the scaler, as it is named.
        length: the tokens for which its frequencies and bands are computed; None if they do not depend on a length.
        local: the rotary embedding of the layers with a sliding window; None if they share the other one.
    """

    configured: ConfiguredRope
    scaler: Scaler
    length: int | None
    local: ConfiguredRope | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> Self:
        """The scaler that the content of a config.json names.

        Raises:
            ConfigError: a key is missing, or its value is not valid; the scaler does not work on the model, has no
                place in a config, or depends on the length and the config gives none.
            UnsupportedModel: no RoPE, or types of layers that are not known.
        """
        text = hf.text_content(config)
        configured, local = ropes_of_layers(hf.read(as_trained(config)))
        scaler = parse(text[SCALER_KEY], configured.max_length)
        length = None if text.get(LENGTH_KEY) is None else hf.tokens(text, LENGTH_KEY)
        check_named(scaler, configured, length)
        return cls(configured=configured, scaler=scaler, length=length, local=local)

    @property
    def effective(self) -> Scaler:
        """The scaler, with the model's own frequencies if it sets none."""
        return self.configured.effective(self.scaler)

    @property
    def frequencies(self) -> Frequencies:
        """The frequencies of the layers that see the whole text."""
        return self.effective.frequencies(self.configured.rope, self.length)

    @property
    def window_frequencies(self) -> Frequencies:
        """The frequencies of the layers with a sliding window: their own, or those that they share."""
        return self.frequencies if self.local is None else self.local.scaler.frequencies(self.local.rope)


def ropes_of_layers(configured: Mapping[str | None, ConfiguredRope]) -> tuple[ConfiguredRope, ConfiguredRope | None]:
    """The rotary embeddings of the layers that see the whole text, and of those with a sliding window.

    Args:
        configured: as `hf.read` gives it.

    Returns:
        The second is None if all layers share one.

    Raises:
        UnsupportedModel: other types of layers, or a scaling of the windows that depends on the length.
    """
    if None in configured:
        return configured[None], None
    wide = [rope for kind, rope in configured.items() if not hf.is_local(kind)]
    local = [rope for kind, rope in configured.items() if hf.is_local(kind)]
    if len(wide) != 1 or len(local) != 1 or local[0].scaler.depends_on_length:
        kinds = ", ".join(f"{kind} ({rope.scaler})" for kind, rope in configured.items())
        raise UnsupportedModel(
            f"a named scaler needs layers that see the whole text and, at most, one kind with a window, not {kinds}"
        )
    return wide[0], local[0]


def check_named(scaler: Scaler, configured: ConfiguredRope, length: int | None) -> None:
    """Check a scaler for `NamedScaler`; `length` is the one of the config.

    Raises:
        ConfigError: as for `NamedScaler.read`.
    """
    if isinstance(scaler, Auto):
        raise ConfigError("'auto' chooses a scaler for every request, and a config names one; name it")
    if scaler.differs_by_layer:
        raise ConfigError(
            f"{scaler} differs by layer, and a config names one scaler for all; take one, or ropewalk.patch"
        )
    configured.check(scaler)
    if configured.effective(scaler).depends_on_length and length is None:
        raise ConfigError(
            f"{scaler} depends on the length of the text, and the pages of a serving engine are shared by texts of all "
            f"lengths; export with a length to which it is fixed, such as {format_length(4 * configured.max_length)}"
        )


def names_scaler(config: Mapping[str, Any]) -> bool:
    """True if the content of a config.json names a scaler."""
    return is_named(hf.text_content(config).get("rope_parameters"))


def is_named(rope_parameters: Any) -> bool:
    """True if `rope_parameters` of a config, or those of a type of layers, are those of a named scaler."""
    if not isinstance(rope_parameters, Mapping):
        return False
    return rope_parameters.get("rope_type") == NAMED_TYPE or any(map(is_named, rope_parameters.values()))


def with_named_scaler(config: Mapping[str, Any], named: NamedScaler, max_length: int) -> dict[str, Any]:
    """The content of a config.json that names a scaler.

    Args:
        config: the content as it is.
        max_length: the tokens to be served.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    text = hf.text_content(changed)
    keys = changed_keys(config, named, max_length)
    for key in _REPLACED:
        text.pop(key, None)
    text.update(keys)
    return changed


def changed_keys(config: Mapping[str, Any], named: NamedScaler, max_length: int) -> dict[str, Any]:
    """The keys of a config.json that change if it names a scaler. Arguments as for `with_named_scaler`."""
    text = hf.text_content(config)
    keys: dict[str, Any] = {
        "max_position_embeddings": max_length,
        **_named_rope(named),
        SCALER_KEY: str(named.scaler),
        TRAINED_KEY: {key: text[key] for key in _REPLACED if key in text},
    }
    return keys if named.length is None else {**keys, LENGTH_KEY: named.length}


def _named_rope(named: NamedScaler) -> dict[str, Any]:
    wide = {"rope_type": NAMED_TYPE, "rope_theta": named.configured.rope.base}
    if named.local is not None:
        local = {"rope_type": NAMED_TYPE, "rope_theta": named.local.rope.base}
        return {"rope_parameters": {"full_attention": wide, "sliding_attention": local}}
    return {
        "rope_parameters": wide,
        "rope_scaling": {"rope_type": NAMED_TYPE},  # for engines on transformers 4, which read only this key
        "rope_theta": named.configured.rope.base,
    }


def as_trained(config: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a config.json as it was before it named a scaler, if it names one.

    Raises:
        ConfigError: a key for this is missing, or its value is not valid.
    """
    restored: dict[str, Any] = json.loads(json.dumps(config))
    if not names_scaler(restored):
        return restored
    text = hf.text_content(restored)
    missing = [key for key in (SCALER_KEY, TRAINED_KEY) if text.get(key) is None]
    if missing:
        raise ConfigError(
            f"a config with rope type {NAMED_TYPE!r} needs {' and '.join(missing)}; write it with `ropewalk export "
            "MODEL OUT --rope SCALER`"
        )
    trained = text[TRAINED_KEY]
    if not isinstance(trained, Mapping):
        raise ConfigError(
            f"{TRAINED_KEY}={trained!r:.40} must hold the keys that were replaced; export the model again"
        )
    for key in (*_REPLACED, SCALER_KEY, LENGTH_KEY, TRAINED_KEY):
        text.pop(key, None)
    text.update(trained)
    return restored
