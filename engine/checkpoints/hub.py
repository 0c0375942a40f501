"""Files of the Hugging Face hub, and one sentence for each reason why the hub gives none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...errors import AssetError, first_line
from .assets import MODELS

__all__ = ["hub_error", "hub_file", "hub_folder"]


def hub_file(name: str, *files: str) -> Path:
    """The path of the first of some files that the hub id `name` has; it is downloaded if there is no copy.

    Raises:
        AssetError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    for file in files:
        try:
            _ask(name, file)
            return Path(hf_hub_download(name, file))
        except RemoteEntryNotFoundError:
            continue
        except (OSError, ValueError) as error:
            raise _error(name, error) from error
    raise AssetError(
        f"the Hugging Face hub has {name!r}, but no {' or '.join(files)} in it; give a model in the format of "
        "transformers"
    )


def _ask(name: str, file: str) -> None:
    """Ask the hub once for a file that has no copy here, and raise its answer if it is no.

    `hf_hub_download` asks six times where there is no network, and waits 23 seconds in between.
    """
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    if huggingface_hub.constants.HF_HUB_OFFLINE or huggingface_hub.try_to_load_from_cache(name, file) is not None:
        return
    try:
        huggingface_hub.get_hf_file_metadata(huggingface_hub.hf_hub_url(name, file))
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the library under huggingface_hub, which depends on its version
        raise LocalEntryNotFoundError(f"the hub cannot be reached for {file} of {name}") from error


def hub_folder(name: str, *patterns: str) -> Path:
    """A folder with the weights of the hub id `name`, and with the files whose names match `patterns`.

    A pattern without a slash is for files that are in no folder.

    Raises:
        AssetError: the hub does not give them.
    """
    from huggingface_hub import snapshot_download

    nested = [pattern for pattern in patterns if "/" in pattern]
    outer = ["model*.safetensors", *(pattern for pattern in patterns if pattern not in nested)]
    try:
        if nested:
            snapshot_download(name, allow_patterns=nested)
        return Path(snapshot_download(name, allow_patterns=outer, ignore_patterns=["*/*"]))
    except (OSError, ValueError) as error:
        raise _error(name, error) from error


def hub_error(name: str, error: BaseException) -> AssetError | None:
    """One sentence for an error of the hub: the name, what was tried, and the next step.

    Args:
        error: an error of huggingface_hub, or an error that was raised because of one.

    Returns:
        None if the hub is not the reason.
    """
    from huggingface_hub import constants, errors

    for cause in _causes(error):
        match cause:
            case errors.HFValidationError():
                return AssetError(
                    f"{_not_here(name)}, and a name on the Hugging Face hub is OWNER/NAME; correct the name"
                )
            case errors.GatedRepoError():
                return AssetError(
                    f"the Hugging Face hub gives {name!r} only to users who accepted its terms; accept them at "
                    f"https://huggingface.co/{name}, and log in with `hf auth login`"
                )
            case errors.RepositoryNotFoundError():
                return AssetError(
                    f"{_not_here(name)}, and the Hugging Face hub has no public model of this name; correct the name, "
                    "or log in with `hf auth login` if the model is private"
                )
            case errors.LocalEntryNotFoundError() | errors.OfflineModeIsEnabled() if constants.HF_HUB_OFFLINE:
                return AssetError(
                    f"{_not_here(name)}, and the cache of the Hugging Face hub has no copy of it; correct the name, or "
                    "unset HF_HUB_OFFLINE so that it can be downloaded"
                )
            case errors.LocalEntryNotFoundError():
                reason = f" ({first_line(cause.__cause__)})" if cause.__cause__ else ""
                return AssetError(
                    f"{_not_here(name)}, and the Hugging Face hub cannot be reached{reason}; correct the name, connect "
                    "to the network, or give the folder of a downloaded model"
                )
    return None


def _error(name: str, error: BaseException) -> AssetError:
    return hub_error(name, error) or AssetError(
        f"{_not_here(name)}, and the Hugging Face hub did not give it ({first_line(error)}); correct the name, or give "
        "the folder of a downloaded model"
    )


def _not_here(name: str) -> str:
    return f"{name!r} is not a built-in model ({', '.join(MODELS)}), not a folder and not a .gguf file"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
