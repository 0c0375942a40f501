"""The server of transformers, with folders whose config names a scaler."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel

from ...errors import ConfigError, UnsupportedModel
from ..checkpoints.checkpoint import read_config, read_weights
from ..checkpoints.config import find_config, named_scaler
from ..patches.patch import patch

__all__ = ["serve"]

_INSTALL = "run: pip install 'transformers[serving]'"


def serve(folder: str, options: Sequence[str]) -> None:
    """Run `transformers serve FOLDER` in this process until it is stopped.

    Args:
        folder: its config names a scaler (`export`).
        options: further arguments of `transformers serve`.

    Raises:
        AssetError: the folder is no model.
        ConfigError: it names no scaler, or packages of the server are not installed.
        UnsupportedModel: this version of transformers loads models in another way.
    """
    source, _ = find_config(folder)
    if named_scaler(source) is None:
        raise ConfigError(
            f"the config of {folder} names no scaler, so `transformers serve` reads it without ropewalk; `ropewalk "
            "export` names position maps and temperatures"
        )
    try:
        from transformers.cli.serving.model_manager import ModelManager
        from transformers.cli.transformers import app
        from transformers.utils.import_utils import is_serve_available
    except ImportError as error:
        raise ConfigError(f"the server of transformers cannot be imported ({error}); {_INSTALL}") from error
    if not is_serve_available():
        raise ConfigError(f"packages of the server of transformers are not installed; {_INSTALL}")
    if not hasattr(ModelManager, "_load_model"):
        raise UnsupportedModel(
            f"the server of transformers {transformers.__version__} loads models in a way that ropewalk does not know; "
            "install transformers 5.23, or use `ropewalk serve`"
        )
    ModelManager._load_model = _loading(ModelManager._load_model)
    app(["serve", folder, *options], prog_name="transformers")


def _loading(unpatched: Callable[..., PreTrainedModel]) -> Callable[..., PreTrainedModel]:
    """`ModelManager._load_model`, which clients call too, for models whose config may name a scaler."""

    def load(manager: Any, model_id_and_revision: str, *args: Any, **others: Any) -> PreTrainedModel:
        source = model_id_and_revision.rpartition("@")[0]
        named = named_scaler(source) if Path(source).is_dir() else None
        if named is None:
            return unpatched(manager, model_id_and_revision, *args, **others)
        if manager.quantization is not None:
            raise ConfigError("--quantization does not work with a named scaler; leave it out")
        model = read_weights(
            source,
            read_config(source),
            dtype=manager.dtype,
            device_map=manager.device,
            attn_implementation=manager.attn_implementation,
        )
        sys.stderr.write(f"{patch(model, named.scaler, length=named.length)}\n")
        return model

    return load
