"""Where a model's files are: a built-in name, a folder, a GGUF file or a hub id, without torch."""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import Any

from ...errors import AssetError, ConfigError, RopewalkError, did_you_mean, first_line
from ...tokenizer_tools.vocabularies import vocabulary
from ...tokenizer_tools.vocabulary import Vocabulary
from . import assets
from .gguf import conversion_folder, converted_gguf, gguf_tokenizer

MODELS = [name for name, asset in assets.ASSETS.items() if asset.kind == "model"]
"""Names of the built-in models."""

TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model")
"""The files that hold a tokenizer, the first of them that is there."""

_MOST_TOKENS = 2**24  # a list as long as a tekken file says is made of them


def resolve(name: str) -> str:
    """A folder, or else a hub id.

    Raises:
        AssetError: there is no such file or folder, or the name is nearly that of a built-in model.
    """
    if (file := _gguf_file(name)) is not None:
        return str(converted_gguf(file))
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if "/" not in name and difflib.get_close_matches(name.lower(), MODELS, cutoff=0.8):
        raise AssetError(f"there is no model {name!r}.{did_you_mean(name, MODELS)}")
    if path.is_absolute() or name.startswith((".", "~")):
        raise AssetError(f"{name}: no such folder")
    return name


def _gguf_file(name: str) -> Path | None:
    """The file of a built-in model, or the GGUF file that is named; else None."""
    if name in MODELS and not Path(name).exists():
        return assets.fetch_files(name)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise AssetError(f"{name}: no such file")
    return path


def load_vocabulary(name: str | Path) -> Vocabulary:
    """The tokenizer of a model, without its weights; torch is not used but to read GGUF files.

    Args:
        name: as for `ropewalk.load`, or a tokenizer's own file: tokenizer.json of Hugging Face, a SentencePiece
            .model, or a tekken .json.

    Raises:
        AssetError: there is no such tokenizer, or it cannot be read.
        UnsupportedModel: its tokens are not pieces of the text's bytes.
    """
    path = Path(name).expanduser()
    if path.suffix in (".json", ".model"):
        if not path.is_file():
            raise AssetError(f"{name}: no such file; name a tokenizer.json, a SentencePiece .model or a tekken .json")
        return _read(path)
    if (file := _gguf_file(str(name))) is not None:
        made = conversion_folder(file) / "tokenizer.json"
        return _read(made if made.exists() else file)
    source = resolve(str(name))
    folder = Path(source)
    if not folder.is_dir():
        return _read(_from_hub(source))
    for kind in TOKENIZER_FILES:
        if (folder / kind).is_file():
            return _read(folder / kind)
    raise AssetError(f"{name}: this folder has none of {', '.join(TOKENIZER_FILES)}")


def _read(file: Path) -> Vocabulary:
    try:
        return vocabulary(_open(file))
    except ImportError as error:
        raise ConfigError(f"{file} needs a library that is not here ({error}); pip install mistral-common") from None
    except RopewalkError:
        raise
    except BaseException as error:  # the tokenizers library raises no class of its own, and panics as BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise AssetError(f"{file} is no tokenizer that can be read ({first_line(error)})") from error


def _open(file: Path) -> Any:
    if file.suffix == ".model":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    if file.suffix == ".gguf":
        return gguf_tokenizer(file).backend_tokenizer
    content = json.loads(file.read_bytes())
    if isinstance(content.get("vocab"), list):  # tekken's; Hugging Face has it below "model"
        numbers = [*content["config"].values(), *(token["rank"] for token in content["vocab"])]
        if any(isinstance(number, int | float) and number > _MOST_TOKENS for number in numbers):
            raise ValueError(f"it counts more than {_MOST_TOKENS} tokens")
        return importlib.import_module("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(str(file))
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))


def _from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        for file in TOKENIZER_FILES:
            try:
                return Path(hf_hub_download(name, file))
            except RemoteEntryNotFoundError:
                continue
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise AssetError(
            f"{name!r} is not a built-in model ({', '.join(MODELS)}), a folder or a tokenizer file, and the hub did "
            f"not give it ({reason}); check the name, or give the folder of a model that is here"
        ) from error
    raise AssetError(f"{name}: the hub has none of {', '.join(TOKENIZER_FILES)} for it")
