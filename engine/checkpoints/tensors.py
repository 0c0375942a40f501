"""Every tensor of a checkpoint's files has to be in the model that is loaded from them, with its shape, and once.

transformers renames (`embed_out` to `lm_head`), stacks (one tensor for each expert) and splits as it loads. Where two
tensors reach the same weight it takes one of them, and it stacks experts in the order of their numbers, whatever those
are; it says nothing of either.
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
    r"(^|\.)(rotary_emb\.\w+|inv_freq|position_ids|masked_bias|causal_mask|_extra_state)$"  # made anew from the config
    r"|(^|\.)mtp[._]"  # heads that guess further tokens; the model's own next token does not depend on them
)
_CAUSAL_MASK = re.compile(r"\.(attn|attention)\.bias$")
_NEXT_TOKEN_LAYER = re.compile(r"(?:layers|blk)\.(\d+)\.(?:nextn\.)?eh_proj\.")
_LAYER = re.compile(r"\.?(?:layers|blk)\.(\d+)\.")


def stored_shapes(files: list[Path], again: str = "") -> dict[str, tuple[int, ...]]:
    """The tensors of some safetensors files.

    Args:
        again: what to add to an error.

    Raises:
        AssetError: a file is damaged, or two of them have a tensor of the same name.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as opened:
                here = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
        except Exception as error:
            raise AssetError(f"{file} is damaged or no safetensors file ({first_line(error)}).{again}") from error
        if twice := sorted(shapes.keys() & here.keys()):
            raise AssetError(
                f"{file}: its tensor {twice[0]!r} is in another file of the folder too; remove one of them"
            )
        shapes |= here
    return shapes


def check_loaded(source: str, model: Any, info: Mapping[str, Any], stored: Shapes, places: Mapping[str, str]) -> None:
    """Refuse a model that is not all of its files.

    Args:
        source: the folder or hub id.
        model: of transformers.
        info: what `from_pretrained` says with `output_loading_info`.
        stored: the tensors in its files.
        places: of `check_places`.

    Raises:
        AssetError: a tensor is missing, has another shape, has no place in the model, or is not what it is tied to.
    """
    if missing := sorted(info["missing_keys"]):
        raise AssetError(
            f"{source}: {len(missing)} tensors of the model are not in its files, {missing[0]!r} first; transformers "
            "would fill them with random numbers"
        )
    for name, found, expected in sorted(info["mismatched_keys"]):
        raise AssetError(
            f"{source}: its tensor {name!r} has the shape {list(found)}, and its config says {list(expected)}; the "
            "config belongs to another model, or was changed"
        )
    _check_output(source, model, places)
    extra = next_token_layers(stored)
    unexpected = {*info["unexpected_keys"], *_passed_over(model, stored)}
    unused = [name for name in sorted(unexpected) if not _harmless(name, stored, extra)]
    if unused:
        raise AssetError(
            f"{source}: {len(unused)} tensors of its files have no place in the {type(model).__name__} of its config, "
            f"{unused[0]!r} first, so the model would compute something else; correct config.json (number of layers, "
            "biases, architecture), merge an adapter into its model, or remove them from the files if they are no part "
            "of it"
        )


def next_token_layers(names: Mapping[str, Any]) -> set[int]:
    """Numbers of the layers that only guess further tokens (DeepSeek's multi-token prediction)."""
    return {int(found[1]) for name in names if (found := _NEXT_TOKEN_LAYER.search(name))}


def _passed_over(model: Any, stored: Shapes) -> list[str]:
    """Tensors that transformers' class leaves out of what it reports, and that may be more than it takes them for:
    layers behind the last one, by their number, and causal masks, by the name that a bias of attention would have."""
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


def _check_output(source: str, model: Any, places: Mapping[str, str]) -> None:
    """Refuse an output matrix that is stored beside a tied embedding, and is another one."""
    if (output := untied(model)) and (name := places.get(output)):
        raise AssetError(
            f"{source}: its config ties the output matrix to the embedding (tie_word_embeddings), and its files hold "
            f"another one, {name!r}; programs disagree which of them counts, so set tie_word_embeddings to false in "
            "config.json to use it, or remove it from the files"
        )


def untied(model: Any) -> str | None:
    """The name of an output matrix that is not the embedding although the config of `model` ties the two."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or rows is None or not model.config.get_text_config().tie_word_embeddings:
        return None
    if head.weight is rows.weight or head.weight.is_meta or rows.weight.is_meta or equal(head.weight, rows.weight):
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def tensors_by_weight(source: str, model: Any, names: Iterable[str]) -> dict[str, str]:
    """The stored tensor of each weight that is stored as one, by the weight's name.

    Args:
        source: the folder or hub id.
        model: of transformers; weights are not looked at.
        names: of the tensors in its files.

    Raises:
        AssetError: two tensors are the same weight, or the numbers of stacked ones leave some out.
    """
    conversions = get_model_conversion_mapping(model)
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    targets = {pattern: one.target_patterns for one in converters for pattern in one.source_patterns}
    weights = model.state_dict()

    def place(name: str) -> tuple[str, str | None]:
        found: tuple[str, str | None] = rename_source_key(name, renamings, converters, model.base_model_prefix, weights)
        if found[0] not in weights and name in weights:
            found = rename_source_key(name, [], [], model.base_model_prefix, weights)
        return found

    alone: dict[str, str] = {}
    fused: dict[tuple[str, str], list[str]] = {}
    for name in names:
        weight, pattern = place(name)
        if pattern is not None:
            fused.setdefault((weight, pattern), []).append(name)
        elif alone.setdefault(weight, name) != name:
            raise _same(source, alone[weight], name)
    for (weight, pattern), parts in fused.items():
        for target in targets[pattern]:
            if other := alone.get(weight.replace(targets[pattern][0], target)):
                raise _same(source, other, parts[0])
        _check_numbers(source, parts)
    return alone


def _same(source: str, one: str, other: str) -> AssetError:
    return AssetError(f"{source}: its tensors {one!r} and {other!r} are the same weight; remove one")


def _check_numbers(source: str, parts: list[str]) -> None:
    """Refuse tensors that are to be stacked unless they are numbered from 0, each number once."""
    columns = [sorted(map(int, column)) for column in zip(*(re.findall(r"\d+", part) for part in parts), strict=False)]
    varying = [column for column in columns if column[0] != column[-1]]
    if len(parts) > 1 and not varying:
        raise _same(source, parts[0], parts[1])
    if len(varying) == 1 and varying[0] != list(range(len(parts))):
        numbers = varying[0]
        raise AssetError(
            f"{source}: its tensors like {parts[0]!r} have the numbers {', '.join(map(str, numbers[:8]))}"
            f"{', ...' if len(numbers) > 8 else ''}; a model of {len(numbers)} counts them from 0 to "
            f"{len(numbers) - 1}, each once, so some are missing, double or renamed; get the files again"
        )
