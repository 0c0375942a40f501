"""A model's config, found and read without its weights, and the rotary embedding that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import AssetError
from ...scaling import hf
from ...scaling.named_scaler import NamedScaler, names_scaler
from .checkpoint import config_content, read_config
from .source import resolve


def find_config(name: str) -> tuple[str, Any]:
    """The folder or hub id of a model, and its transformers config.

    Args:
        name: a built-in name, a folder, a GGUF file or a hub id, as for `ropewalk.load`.

    Raises:
        AssetError: there is no such model, or it cannot be fetched.
    """
    source = resolve(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise AssetError(f"{name}: this folder has no config.json, so it is not a Hugging Face model")
    return source, read_config(source)


def primary_rope(config: Any) -> hf.ConfiguredRope:
    """The rotary embedding of the layers that see the whole text; of a model with sliding windows only, the first.

    Raises:
        UnsupportedModel: the config has no rotary embedding, or one that is more than a frequency for each pair.
        ConfigError: a value in the config is impossible.
    """
    configured = hf.read(config.get_text_config())
    global_ropes = (rope for layer_type, rope in configured.items() if not hf.is_local(layer_type))
    return next(global_ropes, next(iter(configured.values())))


def named_scaler(source: str) -> NamedScaler | None:
    """The scaler that the config of a folder or hub id names (`ropewalk export`); None if it names none.

    Raises:
        AssetError: as `find_config`.
        UnsupportedModel, ConfigError: as `NamedScaler.read`.
    """
    content = config_content(source)
    return NamedScaler.read(content) if names_scaler(content) else None


def served_length(source: str, config: Any) -> int:
    """Tokens that a server reads with a model: under a scaler that its config names those of the export, else as
    `trained_length`.

    Args:
        source, config: the results of `find_config`.

    Raises:
        UnsupportedModel, ConfigError: as `primary_rope` and `NamedScaler.read`.
    """
    if named_scaler(source) is None:
        return primary_rope(config).max_length
    content = config_content(source)
    return hf.tokens(hf.text_content(content), "max_position_embeddings")


def trained_length(name: str) -> int:
    """Tokens that a model reads without any scaler of ours, by its config. A length of `2x` is twice that.

    Raises:
        AssetError: as `find_config`.
        UnsupportedModel, ConfigError: as `primary_rope`.
    """
    return primary_rope(find_config(name)[1]).max_length
