"""`ropewalk cache`: what is stored in the cache folder, and removing it."""

from __future__ import annotations

import os
import shutil
import uuid
from fnmatch import fnmatchcase
from pathlib import Path

import click

from .help_page import EXAMPLES, command
from .messages import print_json
from .options import json_option

_TUNED = "tuned"
"""What `ropewalk tune` found is not made again by itself, so it is not listed and not removed."""

_KINDS = {
    "gguf-float32-": "a .gguf file, converted for transformers",
    "gguf-": "config and tokenizer of a .gguf file, or all of it converted",
    "bf16-": "a model written for llama.cpp",
    "f16-": "a model written for llama.cpp",
    "f32-": "a model written for llama.cpp",
    "q8_0-": "a model written for llama.cpp",
    "kernels": "kernels compiled for this machine",
    "downloads": "archives that were put here by hand",
}


@command(epilog=EXAMPLES + "  ropewalk cache\n  ropewalk cache --remove 'gguf-*'")
@click.option("--remove", "patterns", multiple=True, help="Remove this entry, or those like gguf-*; may be repeated.")
@json_option("folder, entries (name, bytes, what), removed (names)")
def cache(patterns: tuple[str, ...], as_json: bool) -> None:
    """List what is stored in the cache folder, or remove it.

    All of it is downloaded, converted or compiled again when it is needed. Results of `ropewalk tune` are not listed
    and stay. The environment variable ROPEWALK_CACHE names another folder.
    """
    from ..engine.storage import cache_dir
    from ..errors import AssetError

    folder = cache_dir()
    there = sorted(p for p in folder.glob("[!.]*") if p.name != _TUNED) if folder.is_dir() else []
    removed = [path for path in there if any(fnmatchcase(path.name, pattern) for pattern in patterns)]
    for pattern in patterns:
        if not any(fnmatchcase(path.name, pattern) for path in there):
            raise AssetError(f"{folder} has no entry {pattern}; ropewalk cache lists them")
    entries = {path: _bytes(path) for path in (removed if patterns else there)}
    for path in removed:
        _remove(path)
    if as_json:
        listed = [] if patterns else [{"name": p.name, "bytes": size, "what": _what(p)} for p, size in entries.items()]
        print_json({"folder": folder, "entries": listed, "removed": [path.name for path in removed]})
        return
    done = "removed from" if patterns else "in"
    for path, size in sorted(entries.items(), key=lambda entry: -entry[1]):
        click.echo(f"{size / 1e6:>9,.1f} MB  {path.name}  ({_what(path)})")
    click.echo(f"{sum(entries.values()) / 1e6:>9,.1f} MB  {done} {folder}")


def _what(path: Path) -> str:
    from ..engine.checkpoints.assets import ASSETS

    asset = next((asset for asset in ASSETS.values() if asset.folder.name == path.name), None)
    if asset is not None:
        return asset.description
    return next((kind for prefix, kind in _KINDS.items() if path.name.startswith(prefix)), "unknown")


def _bytes(path: Path) -> int:
    if not path.is_dir():
        return path.lstat().st_size
    files = (Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    return sum(file.lstat().st_size for file in files)


def _remove(path: Path) -> None:
    """Remove an entry; one that is removed in part has another name, so that it is not taken for a whole one."""
    if not path.is_dir():
        path.unlink()
        return
    aside = path.rename(path.with_name(f".{path.name}-{uuid.uuid4().hex[:8]}.partial"))
    shutil.rmtree(aside)
