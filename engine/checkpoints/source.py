"""Finds the files of a built-in name, a folder, a GGUF file or a hub id, and reads a tokenizer. Without torch."""

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
from .assets import MODELS
from .gguf_conversion import folder_of_gguf, prepared_gguf
from .hub import hub_file

TOKENIZER_FILES = ("tokenizer.json", "tekken.json", "tokenizer.model")
"""Files that hold a tokenizer. The first that exists is used."""

_MOST_TOKENS = 2**24  # a list as long as the number in a tekken file is made


def resolve(name: str) -> str:
    """The folder of a model, or a hub id. For a GGUF file it is that of `prepared_gguf`.

    Args:
        name: as for `ropewalk.load`.

    Raises:
        AssetError: there is no such file or folder, or one of another kind, or the name is close to that of a built-in
            model.
    """
    if (file := gguf_file(name)) is not None:
        return str(prepared_gguf(file))
    if not name:
        raise AssetError("the name of the model is empty; give a built-in name, a hub id, a folder or a .gguf file")
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.is_file():
        raise AssetError(f"{name} is a file that is no .gguf; give the folder of a model, or a .gguf file")
    if "/" not in name and difflib.get_close_matches(name.lower(), MODELS, cutoff=0.8):
        raise AssetError(f"there is no model {name!r}.{did_you_mean(name, MODELS)}")
    if path.is_absolute() or name.startswith((".", "~")):
        raise AssetError(f"{name}: no such folder")
    return name


def gguf_file(name: str) -> Path | None:
    """The file of a built-in model, which is fetched on first use, or the GGUF file `name`; None for other models.

    Raises:
        AssetError: there is no such file.
    """
    if name in MODELS and not Path(name).exists():
        return assets.fetch_files(name)
    path = Path(name).expanduser()
    if path.suffix != ".gguf":
        return None
    if not path.is_file():
        raise AssetError(f"{name}: no such file")
    return path


def load_vocabulary(name: str | Path) -> Vocabulary:
    """The vocabulary of a model's tokenizer, without the weights. torch is needed for GGUF files only.

    Args:
        name: a model as for `ropewalk.load`, or a tokenizer file: a tokenizer.json of Hugging Face, a SentencePiece
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
    if (file := gguf_file(str(name))) is not None:
        converted = folder_of_gguf(file) / "tokenizer.json"
        return _read(converted if converted.exists() else file)
    source = resolve(str(name))
    folder = Path(source)
    if not folder.is_dir():
        return _read(hub_file(source, *TOKENIZER_FILES))
    for tokenizer_file in TOKENIZER_FILES:
        if (folder / tokenizer_file).is_file():
            return _read(folder / tokenizer_file)
    raise AssetError(f"{name}: this folder has none of {', '.join(TOKENIZER_FILES)}")


def _read(file: Path) -> Vocabulary:
    try:
        return vocabulary(_open(file))
    except ImportError as error:
        raise ConfigError(
            f"{file} needs a library that is not installed ({error}); pip install mistral-common"
        ) from None
    except RopewalkError:
        raise
    except BaseException as error:  # the tokenizers library has no error class, and a panic of it is a BaseException
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise AssetError(
            f"{file} is damaged, or not a tokenizer in a known format ({first_line(error)}); get it again"
        ) from error


def _open(file: Path) -> Any:
    if file.suffix == ".model":
        import sentencepiece

        return sentencepiece.SentencePieceProcessor(model_file=str(file))
    if file.suffix == ".gguf":
        from .gguf_file import GgufFile
        from .gguf_tokenizer import read_gguf_tokenizer

        return read_gguf_tokenizer(GgufFile(file)).backend_tokenizer
    content = json.loads(file.read_bytes())
    if isinstance(content.get("vocab"), list):  # a tekken file; Hugging Face has "vocab" below "model"
        numbers = [*content["config"].values(), *(token["rank"] for token in content["vocab"])]
        if any(isinstance(number, int | float) and number > _MOST_TOKENS for number in numbers):
            raise ValueError(f"it states more than {_MOST_TOKENS} tokens")
        return importlib.import_module("mistral_common.tokens.tokenizers.tekken").Tekkenizer.from_file(str(file))
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(file))
