"""The Hugging Face hub: one true sentence for each reason why it gives no file."""

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import errors

import ropewalk as rw
from ropewalk.engine.checkpoints.checkpoint import read_config, read_tokenizer
from ropewalk.engine.checkpoints.config import find_config
from ropewalk.engine.checkpoints.hub import hub_file, hub_folder
from ropewalk.engine.checkpoints.source import load_vocabulary


def http_error(kind, status=404):
    request = httpx2.Request("GET", "https://huggingface.co/some/model/resolve/main/config.json")
    return kind("the whole story, with its request id", response=httpx2.Response(status, request=request))


def no_network():
    error = errors.LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub")
    error.__cause__ = OSError("Name or service not known")
    return error


REASONS = {
    "no network": (no_network, r"cannot be reached \(OSError: Name or service not known\); .* connect to the network"),
    "no such model": (lambda: http_error(errors.RepositoryNotFoundError), "has no public model of this name; correct"),
    "gated": (lambda: http_error(errors.GatedRepoError, 403), "only to users who accepted its terms; accept them at"),
    "no name": (lambda: errors.HFValidationError("Repo id must"), "a name on the Hugging Face hub is OWNER/NAME"),
    "server": (lambda: http_error(errors.HfHubHTTPError, 500), r"did not give it \(HfHubHTTPError: .*; correct the"),
}


@pytest.fixture(params=REASONS.values(), ids=REASONS)
def refused(request, monkeypatch):
    """Make the hub give nothing, for one of the reasons. Returns a pattern for the message."""
    make_error, words = request.param
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)

    def fail(*_, **__):
        raise make_error()

    for function in ("get_hf_file_metadata", "hf_hub_download", "snapshot_download"):
        monkeypatch.setattr(huggingface_hub, function, fail)
    return words


@pytest.mark.parametrize(
    "read",
    [find_config, read_config, load_vocabulary, rw.load, hub_folder, lambda name: rw.export(name, "out")],
    ids=["find_config", "read_config", "load_vocabulary", "load", "hub_folder", "export"],
)
def test_the_reason_is_one_sentence(refused, read, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(rw.AssetError, match=refused) as caught:
        read("GPT2")
    message = str(caught.value)
    assert "GPT2" in message and "\n" not in message
    assert "not a folder and not a .gguf file" in message or "accepted its terms" in message
    assert not any(tmp_path.iterdir())


def test_a_tokenizer_that_transformers_does_not_get(monkeypatch):
    """transformers raises its own OSError, caused by an error of the hub."""

    def fail(*_, **__):
        raise OSError(
            "We couldn't connect to 'https://huggingface.co'\nCheck your internet connection"
        ) from no_network()

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", fail)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(rw.AssetError, match=r"'some/model' is not .* cannot be reached \(OSError: Name or service"):
        read_tokenizer("some/model")


def test_a_repository_without_the_file(monkeypatch):
    def fail(*_):
        raise http_error(errors.RemoteEntryNotFoundError)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", fail)
    with pytest.raises(rw.AssetError, match=r"has 'some/model', but no a\.json or b\.json in it"):
        hub_file("some/model", "a.json", "b.json")


def test_the_config_is_read_from_the_files_of_the_hub(tiny_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file: str(tiny_folder / file))
    source, config = find_config("some/model")
    assert source == "some/model" and config.model_type == "llama"


def test_offline_mode_is_named(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(rw.AssetError, match="has no copy of it; correct the name, or unset HF_HUB_OFFLINE"):
        rw.load("nobody/no-such-model")


def test_a_hub_that_cannot_be_reached_is_asked_once(monkeypatch):
    """hf_hub_download asks six times, and waits 23 seconds in between."""
    asked = []

    def unreachable(*_, **__):
        asked.append(1)
        raise httpx2.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(httpx2.Client, "send", unreachable)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waited {seconds} seconds"))
    with pytest.raises(rw.AssetError, match=r"cannot be reached \(ConnectError: \[Errno -2\] Name or service"):
        find_config("nobody/no-such-model")
    assert len(asked) == 1
