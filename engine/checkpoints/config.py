"""A model's config, without its weights: where it is, and the rotary embedding that it describes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...errors import AssetError, first_line
from ...scaling import hf
from .checkpoint import read_config
from .source import MODELS, resolve


def find_config(name: str) -> tuple[str, Any]:
    """The folder or hub id of a model, and its transformers config.

    Args:
        name: as for `ropewalk.load`.

    Raises:
        AssetError: there is no such model, or it cannot be fetched.
    """
    source = resolve(name)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise AssetError(f"{name}: this folder has no config.json, so it is not a Hugging Face model")
    try:
        return source, read_config(source)
    except (OSError, ValueError) as error:
        raise AssetError(
            f"{name!r} is not a built-in model ({', '.join(MODELS)}), a folder or a .gguf file, and the hub did not "
            f"give it ({first_line(error)}); check the name, or download the model where there is a network and give "
            "its folder"
        ) from error


def primary_rope(config: Any) -> hf.ConfiguredRope:
    """The rotary embedding that speaks for a model: that of the layers which see everything.

    Raises:
        UnsupportedModel: there is none, or one that is more than a frequency for each pair.
        ConfigError: the config holds what it cannot hold.
    """
    configured = hf.read(config.get_text_config())
    seeing_all = (rope for layer_type, rope in configured.items() if not hf.is_local(layer_type))
    return next(seeing_all, next(iter(configured.values())))


def trained_length(name: str) -> int:
    """Tokens that a model reads without any scaler of ours, by its config; what `2x` is a multiple of.

    Raises:
        AssetError: as `find_config`.
        UnsupportedModel, ConfigError: as `headline_rope`.
    """
    return primary_rope(find_config(name)[1]).max_length
