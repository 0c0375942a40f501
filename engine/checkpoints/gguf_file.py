"""A GGUF file opened for reading: its fields, its tensors and its rotary part; and whether a model holds all of it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from ...errors import AssetError, ConfigError, UnsupportedModel, first_line
from ...scaling.gguf_rope import GgufRope
from ...scaling.hf import ConfiguredRope
from .tensors import next_token_layers

__all__ = ["GgufFile", "check_loaded"]

_SCALING_KEYS = {
    "none": {"type", "factor", "original_context_length", "attn_factor"},
    "linear": {"type", "factor", "original_context_length"},
    "yarn": {"type", "factor", "original_context_length"},
}
"""What may stand below `rope.scaling.` by its type."""

_ROTARY = re.compile(r"^rope_|(^|\.)rope_freqs\.|attn_rot_embd\.")
"""Tensors that the config says, or that other programs keep as they go."""


class _Reader(gguf.GGUFReader):  # type: ignore[misc]
    """Looks at the mapped file through a plain array: slicing a memmap costs three times as much, and parsing a
    vocabulary of 49k tokens is a million slices (4.5 s against 1.5 s)."""

    @property
    def data(self) -> Any:
        return self._data

    @data.setter
    def data(self, mapped: Any) -> None:
        self._data = mapped.view(np.ndarray)

    def _get(self, offset: int, dtype: Any, count: int = 1, **order: Any) -> Any:
        found = super()._get(offset, dtype, count, **order)
        if len(found) < count:  # gguf goes on with nothing, for an array as often as its damaged count says
            raise ValueError("the file ends within a field or tensor")
        return found


def _part(number: Any) -> str:
    """As people count: the first is part 1; a file does not have to say its number."""
    return f"part {number + 1}" if isinstance(number, int) else "a part"


class GgufFile:
    """An open file.

    Attributes:
        path: where it is.
        reader: gguf's.

    Raises:
        AssetError: no such file.
        UnsupportedModel: not a readable GGUF file, or a part of one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise AssetError(f"{path}: no such file")
        self.path = path
        self._values: dict[str, Any] = {}  # decoding a vocabulary takes seconds
        try:
            self.reader = _Reader(path)
        except Exception as error:  # the reader parses bytes unchecked: a damaged file raises anything
            raise UnsupportedModel(f"{path}: not a readable GGUF file ({first_line(error)})") from error
        parts = self.field("split.count")
        if parts not in (None, 0, 1):
            raise UnsupportedModel(
                f"{path} is {_part(self.field('split.no'))} of a GGUF file that was split in {parts}; join "
                "them first (llama-gguf-split --merge FIRST_PART OUT.gguf), and give the whole one"
            )

    def field(self, name: str) -> Any:
        """The value of a field; None if there is none. `{arch}` in its name is the model's architecture."""
        name = name.replace("{arch}", self.arch) if "{" in name else name
        try:
            if name not in self._values:
                field = self.reader.get_field(name)
                self._values[name] = None if field is None else field.contents()
            return self._values[name]
        except Exception as error:  # the reader decodes it only now
            raise UnsupportedModel(f"{self.path}: field {name!r} is damaged ({first_line(error)})") from error

    def required(self, name: str) -> Any:
        """The same of a field that has to be there.

        Raises:
            UnsupportedModel: it is not: the file holds something else than a language model, or is damaged.
        """
        value = self.field(name)
        if value is None:
            raise UnsupportedModel(f"{self.path}: no field {name!r}, which the file of a language model has")
        return value

    @cached_property
    def arch(self) -> str:
        """`general.architecture`."""
        return str(self.required("general.architecture"))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """gguf's tensors by name."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def weights(self) -> int:
        """Numbers in all tensors together."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    @property
    def rope(self) -> GgufRope:
        """What the file says of the rotary frequencies, as llama.cpp takes it: a factor may stand under an older key,
        and is a linear one where no type is given.

        Raises:
            UnsupportedModel: LongRoPE's two sets of divisors, which depend on the server's settings, or scaling of a
                kind or with keys that are not known.
        """
        prefix = f"{self.arch}.rope.scaling."
        scaling = {
            name.removeprefix(prefix): self.field(name) for name in self.reader.fields if name.startswith(prefix)
        }
        scaling.pop("finetuned", None)
        if "factor" not in scaling and (older := self.field("{arch}.rope.scale_linear")) is not None:
            scaling["factor"] = older
        if "type" not in scaling and scaling.get("factor") not in (None, 0, 1):
            scaling["type"] = "linear"
        kind, divisors = scaling.get("type", "none"), self.tensors.get("rope_freqs.weight")
        if (
            kind not in _SCALING_KEYS
            or scaling.keys() - _SCALING_KEYS[kind]
            or "rope_factors_long.weight" in self.tensors
        ):
            raise UnsupportedModel(
                f"{self.path}: rotary scaling {kind!r} with {', '.join(sorted(scaling)) or 'no fields'} cannot be "
                "carried over from a GGUF file; load the original checkpoint"
            )
        try:
            head_dim = self.field("{arch}.attention.key_length") or (
                self.required("{arch}.embedding_length") // self.required("{arch}.attention.head_count")
            )
            return GgufRope(
                dim=int(self.field("{arch}.rope.dimension_count") or head_dim),
                base=float(self.field("{arch}.rope.freq_base") or 10_000.0),
                scaling=scaling,
                divisors=None if divisors is None else torch.tensor(divisors.data).flatten(),
            )
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UnsupportedModel(f"{self.path}: its rotary fields are damaged ({first_line(error)})") from error

    @property
    def context_length(self) -> int:
        """Tokens that llama.cpp serves of the file."""
        try:
            return int(self.required("{arch}.context_length"))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UnsupportedModel(f"{self.path}: its context_length is damaged ({first_line(error)})") from error

    @property
    def configured(self) -> ConfiguredRope:
        """The rotary embedding that the file describes.

        Raises:
            UnsupportedModel: as `rope`.
        """
        try:
            return self.rope.configured(self.context_length)
        except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
            raise UnsupportedModel(f"{self.path}: {error}") from error


def check_loaded(file: GgufFile, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that is not all of its file. transformers' reader skips what it does not know, and reports only
    some of it, so the weights are counted: as many have to be in the model as in the file.

    Args:
        model: of transformers.
        info: what `from_pretrained` says with `output_loading_info`.

    Raises:
        UnsupportedModel: a tensor is missing, has another shape, or has no place in the model.
    """
    if missing := sorted(info["missing_keys"]):
        raise UnsupportedModel(
            f"{file.path}: {len(missing)} tensors of the model are not in the file, {missing[0]!r} first; "
            "transformers would fill them with random numbers"
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise UnsupportedModel(
            f"{file.path}: its tensor {name!r} has the shape {list(found)}, and its fields say {list(expected)}"
        )
    needed = _needed(file, model)
    stored = sum(int(file.tensors[name].n_elements) for name in needed)
    held = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if stored == held:
        return
    unused = sorted(needed - _places(file, model)) or sorted(needed)
    raise UnsupportedModel(
        f"{file.path}: its tensors hold {stored} weights, and the {type(model).__name__} that transformers makes of "
        f"its fields holds {held}, so some are not used ({', '.join(unused[:3])}) and it would compute something "
        "else; load the original checkpoint"
    )


def _needed(file: GgufFile, model: Any) -> set[str]:
    """Tensors on which the logits depend."""
    config, extra = model.config.get_text_config(), next_token_layers(file.tensors)
    first_shared = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    names = set()
    for name, tensor in file.tensors.items():
        layer, _, kind = name.removeprefix("blk.").partition(".")
        number = int(layer) if layer.isdigit() else -1
        shared = number >= first_shared and kind.startswith(("attn_k", "attn_v"))
        if not (_ROTARY.search(name) or number in extra or shared or (tied and _is_embedding(file, name, tensor))):
            names.add(name)
    return names


def _is_embedding(file: GgufFile, name: str, tensor: Any) -> bool:
    """True for an output matrix that is the embedding once more."""
    rows = file.tensors.get("token_embd.weight")
    if name != "output.weight" or rows is None or rows.tensor_type != tensor.tensor_type:
        return False
    return rows.data.shape == tensor.data.shape and torch.equal(torch.tensor(rows.data), torch.tensor(tensor.data))


def _places(file: GgufFile, model: Any) -> set[str]:
    """The tensors that have a place in the model, by their names in the file."""
    arch = next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch), None)
    if arch is None:
        return set()
    names = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    found = (names.get_name(own, try_suffixes=(".weight", ".bias")) for own in model.state_dict())
    return {name for name in found if name is not None}
