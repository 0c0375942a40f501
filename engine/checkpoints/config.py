"""A model's config, found and read without its weights, and the rotary embedding that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import AssetError
from ...scaling import hf
from ...scaling.named_scaler import NamedScaler, is_named
from .checkpoint import read_config
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


def served_length(config: Any) -> int:
    """Tokens that a server reads with the model of a config: under a scaler that it names (`ropewalk export --target
    vllm`) those of the export, else as `trained_length`.

    Raises:
        UnsupportedModel, ConfigError: as `primary_rope` and `NamedScaler.read`.
    """
    text = config.get_text_config()
    if not is_named(getattr(text, "rope_parameters", None)):
        return primary_rope(config).max_length
    NamedScaler.read(config.to_dict())  # refuses what the plug-in does not serve
    return int(text.max_position_embeddings)


def trained_length(name: str) -> int:
    """Tokens that a model reads without any scaler of ours, by its config. A length of `2x` is twice that.

    Raises:
        AssetError: as `find_config`.
        UnsupportedModel, ConfigError: as `primary_rope`.
    """
    return primary_rope(find_config(name)[1]).max_length
