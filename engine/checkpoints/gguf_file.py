"""A GGUF file opened for reading: its fields, tensors and rotary embedding, and whether a model uses all of it."""

from __future__ import annotations

import contextlib
import functools
import re
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import gguf
import torch

from ...errors import AssetError, ConfigError, UnsupportedModel, first_line
from ...scaling.gguf_rope import GgufRope
from ...scaling.hf import ConfiguredRope
from .gguf_reader import Reader
from .quiet import quiet_transformers
from .tensors import next_token_layers

__all__ = ["GgufFile", "check_loaded", "check_shapes", "needed_tensors", "read_by_transformers", "unused_error"]

_SCALING_KEYS = {
    "none": {"type", "factor", "original_context_length", "attn_factor"},
    "linear": {"type", "factor", "original_context_length"},
    "yarn": {"type", "factor", "original_context_length"},
}
"""The keys below `rope.scaling.` that are read, by the type of the scaling."""

_ROTARY = re.compile(r"^rope_|(^|\.)rope_freqs\.|attn_rot_embd\.")
"""Rotary tensors: the config has their content, or other programs stored them as a cache."""


def _part(number: Any) -> str:
    """The name of a part of a split file, counted from 1; a file may have no number."""
    return f"part {number + 1}" if isinstance(number, int) else "a part"


class GgufFile:
    """An open GGUF file.

    Attributes:
        path: its path.
        reader: the reader of the gguf library.

    Raises:
        AssetError: there is no such file.
        UnsupportedModel: it is no readable GGUF file, or only a part of one.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise AssetError(f"{path}: no such file")
        self.path = path
        self._values: dict[str, Any] = {}  # decoding a vocabulary takes seconds
        try:
            self.reader = Reader(path)
        except Exception as error:  # the reader does not check the bytes: a damaged file raises anything
            raise UnsupportedModel(f"{path}: not a readable GGUF file ({first_line(error)})") from error
        parts = self.field("split.count")
        if parts not in (None, 0, 1):
            raise UnsupportedModel(
                f"{path} is {_part(self.field('split.no'))} of a GGUF file that was split in {parts}; join "
                "them first (llama-gguf-split --merge FIRST_PART OUT.gguf), and give the joined file"
            )

    def field(self, name: str) -> Any:
        """The value of a field; None if there is none. `{arch}` in `name` stands for the architecture."""
        name = name.replace("{arch}", self.arch) if "{" in name else name
        try:
            if name not in self._values:
                field = self.reader.get_field(name)
                self._values[name] = None if field is None else field.contents()
            return self._values[name]
        except Exception as error:  # the reader decodes a field when it is read
            raise UnsupportedModel(
                f"{self.path}: field {name!r} is damaged ({first_line(error)}); get the file again"
            ) from error

    def required(self, name: str) -> Any:
        """The value of a field that every language model has.

        Raises:
            UnsupportedModel: the field is missing, so the file holds no language model, or is damaged.
        """
        value = self.field(name)
        if value is None:
            raise UnsupportedModel(
                f"{self.path}: no field {name!r}, which every language model has; get the file again, or give another"
            )
        return value

    @cached_property
    def arch(self) -> str:
        """`general.architecture`."""
        return str(self.required("general.architecture"))

    @cached_property
    def tensors(self) -> dict[str, Any]:
        """The tensors of the gguf library by name."""
        return {tensor.name: tensor for tensor in self.reader.tensors}

    @property
    def formats(self) -> str:
        """The formats of the matrices, that of most weights first: `Q4_1 + Q8_0`."""
        sizes: Counter[str] = Counter()
        for tensor in self.reader.tensors:
            if len(tensor.shape) > 1:
                sizes[tensor.tensor_type.name] += int(tensor.n_elements)
        return " + ".join(name for name, _ in sizes.most_common())

    @property
    def weights(self) -> int:
        """The number of weights in all tensors."""
        return sum(int(tensor.n_elements) for tensor in self.reader.tensors)

    @property
    def rope(self) -> GgufRope:
        """The fields of the rotary frequencies, read as llama.cpp reads them: a factor may have an older key, and a
        factor without a type is linear.

        Raises:
            UnsupportedModel: the file has LongRoPE's two sets of divisors, which depend on the settings of the server,
                or a scaling of an unknown type or with unknown keys.
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
                "read from a GGUF file; load the original checkpoint"
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
            raise UnsupportedModel(
                f"{self.path}: its rotary fields are damaged ({first_line(error)}); get the file again"
            ) from error

    @property
    def context_length(self) -> int:
        """The context length that the file states, in tokens."""
        try:
            return int(self.required("{arch}.context_length"))
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UnsupportedModel(
                f"{self.path}: its context_length is damaged ({first_line(error)}); get the file again"
            ) from error

    @property
    def configured(self) -> ConfiguredRope:
        """The rotary embedding of the model.

        Raises:
            UnsupportedModel: as `rope`.
        """
        try:
            return self.rope.configured(self.context_length)
        except (ConfigError, TypeError, ValueError, ArithmeticError) as error:
            raise UnsupportedModel(f"{self.path}: {error}") from error


def check_loaded(file: GgufFile, model: Any, info: Mapping[str, Any]) -> None:
    """Refuse a model that does not use all tensors of its file.

    The reader of transformers skips unknown tensors and reports only some of them. So the weights are counted: the
    model must have as many as the file.

    Args:
        model: the model of transformers.
        info: the loading info of `from_pretrained` (`output_loading_info`).

    Raises:
        UnsupportedModel: a tensor is missing, has another shape, or is not used.
    """
    check_shapes(file, info["missing_keys"], info["mismatched_keys"])
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    needed = needed_tensors(file, model.config, tied=tied)
    loaded = sum({tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}.values())
    if loaded != sum(int(file.tensors[name].n_elements) for name in needed):
        unused = sorted(needed - _used(file, model)) or sorted(needed)
        raise unused_error(file, model, unused)


def check_shapes(
    file: GgufFile, missing: Iterable[str], mismatched: Iterable[tuple[str, Sequence[int], Sequence[int]]]
) -> None:
    """Refuse a file without all weights of its model.

    Args:
        missing: names of the weights that it does not have.
        mismatched: names, shapes in the file, and shapes in the model, of those that differ.

    Raises:
        UnsupportedModel: there is one.
    """
    if names := sorted(missing):
        raise UnsupportedModel(
            f"{file.path}: {len(names)} tensors of the model are not in the file, {names[0]!r} first; "
            "transformers would fill them with random numbers"
        )
    for name, shape, expected in sorted(mismatched):
        raise UnsupportedModel(
            f"{file.path}: its tensor {name!r} has the shape {list(shape)}, and its fields say {list(expected)}; "
            "get the file again"
        )


def unused_error(file: GgufFile, model: Any, unused: Sequence[str]) -> UnsupportedModel:
    """The error for a file with tensors that its model does not use."""
    return UnsupportedModel(
        f"{file.path}: the {type(model).__name__} that transformers builds from its fields does not use all of its "
        f"tensors, so it would compute something else; some are not used ({', '.join(unused[:3])}); load the original "
        "checkpoint"
    )


@contextlib.contextmanager
def read_by_transformers(file: GgufFile) -> Iterator[dict[str, Any]]:
    """Options of `from_pretrained` with which transformers reads the file, and no other file of its folder.

    Raises:
        UnsupportedModel: transformers cannot read the file.
    """
    try:
        with tempfile.TemporaryDirectory() as folder, quiet_transformers(), _parsed_once(file.reader):
            (Path(folder) / file.path.name).symlink_to(file.path.resolve())
            source = {"pretrained_model_name_or_path": folder, "gguf_file": file.path.name}
            yield {**source, "local_files_only": True, "trust_remote_code": False}
    except Exception as error:  # the parser raises KeyError, ValueError, RuntimeError and more
        if unknown := _unknown_tensors(file):
            raise UnsupportedModel(
                f"{file.path}: a {file.arch} model has no tensor {unknown[0]!r} (part of an adapter, or a scale of a "
                "quantized matrix?), and transformers cannot read a file with it; merge the adapter, or load the "
                "original checkpoint"
            ) from error
        raise UnsupportedModel(f"{file.path}: transformers cannot read this GGUF file ({first_line(error)})") from error


@contextlib.contextmanager
def _parsed_once(reader: Any) -> Iterator[None]:
    """Make transformers use `reader`, and build the table of tensor names once.

    By itself, transformers parses the file three times and builds the table for every module (SmolLM2-135M: 92 s
    instead of 23 s, on two busy cores). Its progress bar, which no setting disables, is removed too.
    """
    from transformers import modeling_gguf_pytorch_utils

    replaced: list[tuple[Any, str, Any]] = [
        (gguf, "GGUFReader", lambda *_, **__: reader),
        (gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
        (modeling_gguf_pytorch_utils, "tqdm", lambda tensors, **_: tensors),
    ]
    before = [(module, name, getattr(module, name)) for module, name, _ in replaced if hasattr(module, name)]
    try:
        for module, name, value in replaced:
            setattr(module, name, value)
        yield
    finally:
        for module, name, _ in replaced:
            delattr(module, name)
        for module, name, value in before:
            setattr(module, name, value)


def needed_tensors(file: GgufFile, config: Any, *, tied: bool) -> set[str]:
    """Names of the tensors on which the logits depend.

    Args:
        tied: the output matrix of the model is its embedding.
    """
    config, extra = config.get_text_config(), next_token_layers(file.tensors)
    first_shared = config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", 0) or 0)
    names = set()
    for name, tensor in file.tensors.items():
        layer, _, kind = name.removeprefix("blk.").partition(".")
        number = int(layer) if layer.isdigit() else -1
        shared = number >= first_shared and kind.startswith(("attn_k", "attn_v"))
        if not (_ROTARY.search(name) or number in extra or shared or (tied and _is_embedding(file, name, tensor))):
            names.add(name)
    return names


def _is_embedding(file: GgufFile, name: str, tensor: Any) -> bool:
    """True for an output matrix that is a copy of the embedding."""
    rows = file.tensors.get("token_embd.weight")
    if name != "output.weight" or rows is None or rows.tensor_type != tensor.tensor_type:
        return False
    return rows.data.shape == tensor.data.shape and torch.equal(torch.tensor(rows.data), torch.tensor(tensor.data))


def _used(file: GgufFile, model: Any) -> set[str]:
    """Names in the file of the tensors that the model uses."""
    arch = _model_arch(file)
    if arch is None:
        return set()
    name_map = gguf.get_tensor_name_map(arch, model.config.get_text_config().num_hidden_layers)
    names = (name_map.get_name(hf_name, try_suffixes=(".weight", ".bias")) for hf_name in model.state_dict())
    return {name for name in names if name is not None}


def _unknown_tensors(file: GgufFile) -> list[str]:
    """Names of the tensors that are neither weights nor biases, and unknown for the architecture of the file."""
    arch = _model_arch(file)
    if arch is None:
        return []
    patterns = [
        re.escape(gguf.TENSOR_NAMES[kind]).replace(r"\{bid\}", r"\d+") for kind in gguf.MODEL_TENSORS.get(arch, ())
    ]
    known = re.compile("|".join(patterns))
    others = (name for name in file.tensors if not name.endswith((".weight", ".bias")))
    return sorted(name for name in others if not known.fullmatch(name))


def _model_arch(file: GgufFile) -> Any:
    """gguf's constant for the architecture of the file, or None."""
    return next((arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == file.arch), None)
