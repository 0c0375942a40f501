"""Which weight of the model each tensor of its files goes to, by transformers' own renaming and fusing.

transformers renames (`embed_out` to `lm_head`), stacks (one tensor for each expert) and splits as it loads. Where two
tensors reach the same weight it takes one of them, and it stacks experts in the order of their numbers, whatever those
are; it says nothing of either.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from ...errors import AssetError

__all__ = ["check_places"]


def check_places(source: str, model: Any, names: Iterable[str]) -> dict[str, str]:
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
