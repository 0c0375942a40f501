"""Checks that a loaded model uses every tensor of its files once, with its shape.

transformers renames tensors as it loads (`embed_out` to `lm_head`), and stacks or splits them (one tensor for each
expert). If two tensors belong to the same weight, it takes one of them. It stacks experts in the order of their
numbers, also if numbers are missing. It reports neither.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import equal
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...errors import AssetError, first_line

__all__ = ["Shapes", "check_loaded", "next_token_layers", "stored_shapes", "tensors_by_weight", "untied"]

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of stored tensors, by name."""

_HARMLESS = re.compile(
    r"(^|\.)(rotary_emb\.\w+|inv_freq|position_ids|masked_bias|causal_mask|_extra_state)$"  # computed from the config
    r"|(^|\.)mtp[._]"  # heads that predict further tokens; the logits of the next token do not depend on them
)
_CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")
_NEXT_TOKEN_LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.(?:nextn\.)?eh_proj\.")
_LAYER = re.compile(r"\.?(?:layers|blk)\.(\d+)\.")


def stored_shapes(files: list[Path], remedy: str = "") -> dict[str, tuple[int, ...]]:
    """The shapes of the tensors in some safetensors files, by name.

    Args:
        remedy: what to do about a damaged file, as the end of a sentence.

    Raises:
        AssetError: a file is damaged, or two files have a tensor of the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                new = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise AssetError(f"{file} is damaged or no safetensors file ({first_line(error)}){remedy}") from error
        if repeated := sorted(shapes.keys() & new.keys()):
            raise AssetError(
                f"{file}: its tensor {repeated[0]!r} is in another file of the folder too; remove one of them"
            )
        shapes |= new
    return shapes


def check_loaded(
    source: str, model: Any, info: Mapping[str, Any], stored: Shapes, tensor_names: Mapping[str, str]
) -> None:
    """Refuse a model that does not use all tensors of its files.

    Args:
        source: the folder or hub id.
        model: the model of transformers.
        info: the loading info of `from_pretrained` (`output_loading_info`).
        stored: the shapes in the files.
        tensor_names: the result of `tensors_by_weight`.

    Raises:
        AssetError: a tensor is missing, has another shape, is not used, or differs from the weight that it is tied to.
    """
    if missing := sorted(info["missing_keys"]):
        raise AssetError(
            f"{source}: {len(missing)} tensors of the model are not in its files, {missing[0]!r} first; transformers "
            "would fill them with random numbers"
        )
    for name, shape, expected in sorted(info["mismatched_keys"]):
        raise AssetError(
            f"{source}: its tensor {name!r} has the shape {list(shape)}, and its config says {list(expected)}; the "
            "config belongs to another model, or was changed"
        )
    _check_output(source, model, tensor_names)
    extra = next_token_layers(stored)
    unexpected = {*info["unexpected_keys"], *_unreported(model, stored)}
    unused = [name for name in sorted(unexpected) if not _harmless(name, stored, extra)]
    if unused:
        raise AssetError(
            f"{source}: the {type(model).__name__} of its config does not use {len(unused)} tensors of its files, "
            f"{unused[0]!r} first, so it would compute something else than the model that was trained; correct "
            "config.json (number of layers, biases, architecture), merge an adapter into its model, or remove the "
            "tensors from the files if they do not belong to the model"
        )


def next_token_layers(names: Mapping[str, Any]) -> set[int]:
    """Numbers of the layers that only predict further tokens (DeepSeek's multi-token prediction)."""
    return {int(match[1]) for name in names if (match := _NEXT_TOKEN_LAYER.search(name))}


def _unreported(model: Any, stored: Shapes) -> list[str]:
    """Unused tensors that a class of transformers does not report, although they may matter: layers after the last
    one, which it recognizes by their number, and causal masks, which have the name of a bias of attention."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    layers = model.config.get_text_config().num_hidden_layers
    return [
        name
        for name in stored
        if (_CAUSAL_MASK.search(name) or ((layer := _LAYER.search(name)) and int(layer[1]) >= layers))
        and any(re.search(pattern, name) for pattern in patterns)
    ]


def _harmless(name: str, stored: Shapes, next_token: set[int]) -> bool:
    layer = _LAYER.search(name)
    return bool(
        _HARMLESS.search(name)
        or (_CAUSAL_MASK.search(name) and stored.get(name, ())[:2] == (1, 1))
        or (layer and int(layer[1]) in next_token)
    )


def _check_output(source: str, model: Any, tensor_names: Mapping[str, str]) -> None:
    """Refuse an output matrix in the files that differs from the embedding to which the config ties it."""
    if (output := untied(model)) and (name := tensor_names.get(output)):
        raise AssetError(
            f"{source}: its config ties the output matrix to the embedding (tie_word_embeddings), but its files hold "
            f"a different output matrix, {name!r}; programs disagree which of them counts. To use it, set "
            "tie_word_embeddings to false in config.json; else remove it from the files"
        )


def untied(model: Any) -> str | None:
    """The name of the output matrix if it differs from the embedding although the config of `model` ties the two."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or rows is None or not model.config.get_text_config().tie_word_embeddings:
        return None
    if head.weight is rows.weight or head.weight.is_meta or rows.weight.is_meta or equal(head.weight, rows.weight):
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def tensors_by_weight(source: str, model: Any, names: Iterable[str]) -> dict[str, str]:
    """The name of the stored tensor of each weight, by the weight's name; without weights that are stored in parts.

    Args:
        source: the folder or hub id.
        model: the model of transformers; only the names of its weights are read.
        names: names of the tensors in the files.

    Raises:
        AssetError: two tensors are the same weight, or the numbers of stacked tensors have gaps.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [conversion for conversion in conversions if isinstance(conversion, WeightConverter)]
    renamings = [conversion for conversion in conversions if isinstance(conversion, WeightRenaming)]
    targets = {pattern: converter.target_patterns for converter in converters for pattern in converter.source_patterns}
    weights = model.state_dict()

    def weight_of(name: str) -> tuple[str, str | None]:
        """The weight of a tensor, and the pattern of the converter that stacks or splits it."""
        renamed: tuple[str, str | None] = rename_source_key(
            name, renamings, converters, model.base_model_prefix, weights
        )
        if renamed[0] not in weights and name in weights:
            renamed = rename_source_key(name, [], [], model.base_model_prefix, weights)
        return renamed

    single: dict[str, str] = {}
    stacked: dict[tuple[str, str], list[str]] = {}
    for name in names:
        weight, pattern = weight_of(name)
        if pattern is not None:
            stacked.setdefault((weight, pattern), []).append(name)
        elif single.setdefault(weight, name) != name:
            raise _same_weight(source, single[weight], name)
    for (weight, pattern), parts in stacked.items():
        for target in targets[pattern]:
            if other := single.get(weight.replace(targets[pattern][0], target)):
                raise _same_weight(source, other, parts[0])
        _check_numbers(source, parts)
    return single


def _same_weight(source: str, first: str, second: str) -> AssetError:
    return AssetError(f"{source}: its tensors {first!r} and {second!r} are the same weight; remove one")


def _check_numbers(source: str, parts: list[str]) -> None:
    """Refuse tensors of a stack unless they are numbered from 0, each number once."""
    columns = [sorted(map(int, column)) for column in zip(*(re.findall(r"\d+", part) for part in parts), strict=False)]
    varying = [column for column in columns if column[0] != column[-1]]
    if len(parts) > 1 and not varying:
        raise _same_weight(source, parts[0], parts[1])
    if len(varying) == 1 and varying[0] != list(range(len(parts))):
        numbers = varying[0]
        raise AssetError(
            f"{source}: its tensors like {parts[0]!r} have the numbers {', '.join(map(str, numbers[:8]))}"
            f"{', ...' if len(numbers) > 8 else ''}, but {len(numbers)} tensors are numbered from 0 to "
            f"{len(numbers) - 1}, each once, so some are missing, repeated or renamed; get the files again"
        )
