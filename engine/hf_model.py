"""What the engine reads from a transformers model: its input device, its end tokens, and hashes that identify it.

`fingerprint` identifies a model as it runs: a saved session and a row of results belong to one.
`checkpoint_fingerprint` identifies a checkpoint in any dtype: a tuned scaler belongs to one.
`tokenizer_fingerprint` identifies a tokenizer: a row of results belongs to one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UnsupportedModel
from .packed import PackedWeight, packed_weights

_SAMPLED = 64  # weights of each tensor, about
_SAMPLE_TEXT = "The 3 dogs' naïve owner:\n\tx += 10\r\n  日本語 🙂"


def input_device(model: PreTrainedModel) -> torch.device:
    """The device for token ids: where the embedding runs. Its weights may be on the disk between calls.

    Raises:
        UnsupportedModel: the model has no weights.
    """
    device: torch.device | int | str | None = model.device
    if isinstance(device, torch.device) and device.type != "meta":
        return device
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    for part in getattr(hook, "hooks", (hook,)):
        if (device := getattr(part, "execution_device", None)) is not None:
            return torch.device(device)
    raise UnsupportedModel(
        f"the weights of this {type(model).__name__} are on the meta device, which holds no numbers; load them first"
    )


def stop_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """End-of-text tokens of a model's generation config and of its tokenizer."""
    configured = getattr(hf.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if i is not None)


def key_shape(config: Any) -> tuple[int, int]:
    """The number of key-value heads of a layer, and the head dim."""
    config = config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def weights_state(hf: PreTrainedModel) -> list[tuple[int, int, int, bytes]]:
    """Identities, versions and addresses of all weights, and some of their numbers. They change when a weight is
    replaced or written to, and when it is given other data, as a cast does. Writing to `weight.data`, as merging an
    adapter does, changes the numbers alone."""
    weights: list[Tensor] = [*hf.parameters(), *(packed.data for packed in packed_weights(hf).values())]
    return [(id(w), 0 if w.is_inference() else w._version, *_content(w)) for w in weights]


def _content(weight: Tensor) -> tuple[int, bytes]:
    """Where a weight lies in memory, and some of its numbers; 0 and none for one without memory of its own, such as a
    quantized one."""
    weight = weight.to_local() if isinstance(weight, DTensor) else weight
    try:
        address = weight.data_ptr()
    except RuntimeError:
        address = 0
    return address, _sample(weight).float().cpu().numpy().tobytes() if address else b""


def weight_count(hf: PreTrainedModel) -> int:
    """The number of weights, each shared one counted once."""
    return sum(math.prod(weight.shape) for _, weight in _named_weights(hf))


def weight_bytes(hf: PreTrainedModel) -> int:
    """Bytes of all weights and buffers, in memory or mapped."""
    return int(hf.get_memory_footprint()) + sum(packed.data.nbytes for packed in packed_weights(hf).values())


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")


def stored_dtype(hf: PreTrainedModel) -> str:
    """The dtype of the weights, such as `bfloat16`, or the formats of packed ones, that of most weights first:
    `Q4_1 + Q8_0`."""
    sizes: Counter[str] = Counter()
    for packed in packed_weights(hf).values():
        sizes[packed.format.name] += math.prod(packed.shape)
    return " + ".join(name for name, _ in sizes.most_common()) or dtype_name(hf.dtype)


def fingerprint(hf: PreTrainedModel, stored_in: str) -> str:
    """A hash of the config, of the dtype that the weights are stored in, and of about 64 numbers of each weight.

    Args:
        stored_in: the dtype of the weights, as `Runner.weights` names it.
    """
    return _digest(hf, _as_text(_stable_config(hf)) + stored_in, torch.float32)


def checkpoint_fingerprint(hf: PreTrainedModel) -> str:
    """A hash that is the same in every dtype: float32, bfloat16 and int8 of one checkpoint are one model.

    Weights are compared as bfloat16 holds them. float16 that was made from another dtype rounds them twice, so its hash
    differs.
    """
    return _digest(hf, _as_text(_without_dtypes(_stable_config(hf))), torch.bfloat16)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the tokens, of the rules by which texts become tokens, and of the chat template.

    The rules of a tokenizer without a fast one of `tokenizers` are known by a sample only.
    """
    described: list[Any] = [tokenizer(_SAMPLE_TEXT)["input_ids"], str(tokenizer.chat_template)]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        described.append(sorted(tokenizer.get_vocab().items()))
    else:
        rules = json.loads(backend.to_str())
        described.append({name: rule for name, rule in rules.items() if name not in ("truncation", "padding")})
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _stable_config(hf: PreTrainedModel) -> dict[str, Any]:
    """The config without what changes from one version of transformers to the next."""
    config = hf.config.to_dict()
    return {name: value for name, value in config.items() if name[0] != "_" and name != "transformers_version"}


def _without_dtypes(config: dict[str, Any]) -> dict[str, Any]:
    others = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    return {name: _without_dtypes(value) if isinstance(value, dict) else value for name, value in others.items()}


def _as_text(config: dict[str, Any]) -> str:
    return json.dumps(config, sort_keys=True, default=str)


def _digest(hf: PreTrainedModel, config: str, rounded_to: torch.dtype) -> str:
    digest = hashlib.sha256(config.encode())
    for name, weight in _named_weights(hf):
        if isinstance(weight, Tensor) and weight.is_meta:
            weight = _offloaded(hf, name).to(weight.dtype)
        sample = _sample(weight)
        digest.update(f"{name} {tuple(weight.shape)}".encode() + sample.to(rounded_to).float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _named_weights(hf: PreTrainedModel) -> list[tuple[str, Tensor | PackedWeight]]:
    """All weights by name, sorted. Packed ones have the names that they would have as parameters."""
    weights: dict[str, Tensor | PackedWeight] = {**dict(hf.named_parameters()), **packed_weights(hf)}
    return sorted(weights.items())


def _sample(weight: Tensor | PackedWeight) -> Tensor:
    """About 64 numbers of a weight, evenly spaced."""
    count = math.prod(weight.shape)
    step = max(1, count // _SAMPLED)
    if isinstance(weight, PackedWeight):
        places, columns = torch.arange(0, count, step), weight.shape[1]
        rows = PackedWeight(weight.data[places // columns], weight.format).unpack()
        return rows[torch.arange(len(places)), places % columns]
    sample = weight.detach().flatten()[::step]
    if isinstance(sample, DTensor):  # split over processes, each of which gets the whole sample
        sample = sample.full_tensor()
    return sample


def _offloaded(hf: PreTrainedModel, name: str) -> Tensor:
    """A weight that accelerate keeps on the disk, or in memory for a device without room."""
    module, _, parameter = name.rpartition(".")
    weight: Tensor = hf.get_submodule(module)._hf_hook.weights_map[parameter]
    return weight
