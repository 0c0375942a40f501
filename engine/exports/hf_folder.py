"""A Hugging Face folder with another rotary config. Weights and tokenizer stay as they are."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...errors import AssetError
from ...scaling import hf
from ..checkpoints.checkpoint import weight_files
from ..checkpoints.quiet import quiet_transformers
from ..checkpoints.source import TOKENIZER_FILES
from ..storage import new_folder

__all__ = ["COPIED_FILES", "has_tokenizer", "with_rope", "write_copy", "write_loaded"]

Change = Callable[[dict[str, Any]], dict[str, Any]]
"""A function that changes the content of a config.json."""

Check = Callable[[Path], None]
"""A function that raises an error if a written folder is wrong."""

_TEMPLATES = "additional_chat_templates"
COPIED_FILES = ("*.json", "*.model", "*.txt", "*.jinja", f"{_TEMPLATES}/*.jinja", "*.tiktoken", "LICENSE*", "README*")
"""The files of a checkpoint beside its weights: config, tokenizer, licence and description."""

_LENGTH = "original_max_position_embeddings"
_FLAT_KEYS = ("rope_theta", "rope_scaling", _LENGTH)
"""Keys of a config for the rotary embedding, beside or instead of `rope_parameters`."""


def with_rope(
    config: Mapping[str, Any],
    ropes: Mapping[str | None, dict[str, Any]],
    length: int,
    *,
    outside_length: bool = False,
) -> dict[str, Any]:
    """The content of a config.json with other rotary embeddings.

    Args:
        config: the content as it is.
        ropes: `rope_parameters` by layer type, or under None where the layers share one.
        length: the context length that the config states, in tokens.
        outside_length: the family stores the trained length outside of `rope_parameters`, and that one takes priority.
    """
    changed: dict[str, Any] = json.loads(json.dumps(config))
    text = hf.text_content(changed)
    for key in _FLAT_KEYS:
        text.pop(key, None)
    text["max_position_embeddings"] = length
    if None not in ropes:
        text["rope_parameters"] = {str(layer_type): rope for layer_type, rope in ropes.items()}
        return changed
    rope = ropes[None]
    if outside_length and _LENGTH in rope:
        text[_LENGTH] = rope[_LENGTH]
    text["rope_parameters"] = rope
    # for engines on transformers 4, which read only these two keys
    text["rope_theta"] = rope["rope_theta"]
    text["rope_scaling"] = (
        None if rope["rope_type"] == "default" else {k: v for k, v in rope.items() if k != "rope_theta"}
    )
    return changed


def has_tokenizer(folder: Path) -> bool:
    """True if a written folder has a file that holds a tokenizer."""
    return any(any(folder.glob(name)) for name in (*TOKENIZER_FILES, "vocab.*", "*.tiktoken"))


def write_copy(source: Path, out: Path, change: Change, extra: Mapping[str, str], check: Check) -> None:
    """Copy a checkpoint to the new folder `out`, with another config.json.

    Args:
        change: makes the new content of config.json from the old.
        extra: texts of further files, by file name.
        check: called with the finished folder before it is moved to `out`. After an error, nothing is at `out`.

    Raises:
        AssetError: no safetensors in `source`, or `out` is not empty or cannot be written.
    """
    beside = {file for pattern in COPIED_FILES for file in source.glob(pattern) if file.is_file()}
    files = sorted({*weight_files(source), *beside})
    with new_folder(out, needed=sum(file.stat().st_size for file in files)) as work:
        for file in files:
            copy = work / file.relative_to(source)
            try:
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
            except OSError as error:
                if error.filename != str(file):
                    raise
                raise AssetError(f"{file}: cannot be read ({error.strerror or error})") from error
        _finish(work, change, extra)
        check(work)


def write_loaded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    out: Path,
    change: Change,
    extra: Mapping[str, str],
    check: Check,
) -> None:
    """Write a model in memory, with its weights as they are now, to the new folder `out`. The other arguments are
    those of `write_copy`."""
    with new_folder(out, needed=model.get_memory_footprint()) as work:
        with quiet_transformers():
            type(model).save_pretrained(model, work)  # the method of a patched model warns
            if tokenizer is not None:
                tokenizer.save_pretrained(work)
        _finish(work, change, extra)
        check(work)


def _finish(folder: Path, change: Change, extra: Mapping[str, str]) -> None:
    config = folder / "config.json"
    changed = change(json.loads(config.read_text(encoding="utf-8")))
    config.write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    for name, text in extra.items():
        (folder / name).write_text(text, encoding="utf-8")
        (folder / name).chmod(0o755 if name.endswith(".sh") else 0o644)
