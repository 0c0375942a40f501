"""Replaces the attention function and the masks of a transformers model.

Every current model reads the name of its attention function, and of the function that builds its masks, from its
config. The layers of a patched model get a view of the config that names ours. The config itself does not change, nor
what is built from it. A copy of the model has copies of the views, and so a patch of its own.
"""

from __future__ import annotations

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, create_masks_for_generate
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import PatchError, UnsupportedModel

AttentionFunction = Callable[..., tuple[Tensor, Tensor | None]]

PATCHED = "ropewalk_patch"
"""The name of the attention of all patched models. The view of the config holds the patch of one model."""


class Replacement(Protocol):
    """What a patch calls instead of a model's attention function, and of the function that builds its masks.

    Both have the signatures of transformers' registries.
    """

    @property
    def attention(self) -> AttentionFunction: ...

    @property
    def mask(self) -> Callable[..., Any]: ...


class ConfigView:
    """The config that the layers of a patched model have. It shares all attributes with the model's config.

    Attributes:
        ropewalk_config: the model's config.
        ropewalk_replacement: called instead of the model's attention function and of its masks.
        ropewalk_parts: views of sub-configs, by name.
    """

    __slots__ = ("ropewalk_config", "ropewalk_parts", "ropewalk_replacement")
    ropewalk_config: PreTrainedConfig
    ropewalk_replacement: Replacement
    ropewalk_parts: dict[str, Any]

    def __reduce__(self) -> tuple[Any, ...]:
        state = self.ropewalk_replacement, self.ropewalk_parts
        return _blank_view, (self.ropewalk_config, tuple(self.ropewalk_parts)), state

    def __setstate__(self, state: tuple[Replacement, dict[str, Any]]) -> None:
        for name, value in zip(("ropewalk_replacement", "ropewalk_parts"), state, strict=True):
            object.__setattr__(self, name, value)

    def __copy__(self) -> PreTrainedConfig:
        return copy.copy(self.ropewalk_config)  # a config is copied in order to change it

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        config = copy.deepcopy(self.ropewalk_config, memo)
        if not any(isinstance(copied, nn.Module) for copied in memo.values()):
            return config  # a config is copied without its model in order to build another model
        view = memo[id(self)] = _blank_view(config, tuple(self.ropewalk_parts))
        view.__setstate__(copy.deepcopy((self.ropewalk_replacement, self.ropewalk_parts), memo))
        return view


def _set_named(self: Any, value: Any) -> None:
    self.ropewalk_config._attn_implementation = value


def _internal(self: Any) -> Any:
    return self.ropewalk_config._attn_implementation_internal


def _set_internal(self: Any, value: Any) -> None:
    if value == PATCHED:  # a new model is built from this view
        raise PatchError(
            "this config belongs to the layers of a patched model, so no other model can be built from it; use the "
            "config of the model itself, copy.deepcopy it, or undo the patch"
        )
    self.ropewalk_config._attn_implementation_internal = value


def _part(name: str) -> property:
    def part(self: ConfigView) -> Any:
        return self.ropewalk_parts[name]

    return property(part)


@functools.cache
def _view_class(kind: Callable[..., Any], parts: tuple[str, ...]) -> type:
    """A subclass of the config class `kind`. Its `parts` are views; without parts, it names our attention."""
    members: dict[str, Any] = {
        "__slots__": (),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__new__": lambda _, *args, **kwargs: kind(*args, **kwargs),  # transformers makes plain configs with it
    }
    if parts:
        members |= {name: _part(name) for name in parts}
    else:
        members |= {
            "_attn_implementation": property(lambda _: PATCHED, _set_named),
            "_attn_implementation_internal": property(_internal, _set_internal),
        }
    return type(kind.__name__, (ConfigView, kind), members)  # type: ignore[arg-type]


def _blank_view(config: PreTrainedConfig, parts: tuple[str, ...]) -> Any:
    kind: Any = type(config)
    view: Any = object.__new__(_view_class(kind, parts))
    view.__dict__ = config.__dict__
    object.__setattr__(view, "ropewalk_config", config)
    return view


def _config_view(config: PreTrainedConfig, text: PreTrainedConfig, replacement: Replacement) -> Any:
    """A view of `config` in which `text`, the config or a part of it, names our attention; None if it is no part."""
    parts = {}
    if config is not text:
        for name in config.sub_configs:
            part = getattr(config, name, None)
            if part is not None and (view := _config_view(part, text, replacement)) is not None:
                parts[name] = view
        if not parts:
            return None
    view = _blank_view(config, tuple(parts))
    view.__setstate__((replacement, parts))
    return view


class AttentionHook:
    """Puts a replacement of attention and masks into a model, and takes it out again."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def install(self, replacement: Replacement) -> None:
        """Make the layers of the model call `replacement`."""
        top = language_model(self._model)
        text = self._model.config.get_text_config()
        views: dict[int, Any] = {}
        for module in top.modules():
            config = vars(module).get("config")
            if module is top or not isinstance(config, PreTrainedConfig):
                continue
            if id(config) not in views:
                views[id(config)] = _config_view(config, text, replacement)
            if views[id(config)] is not None:
                module.config = views[id(config)]
        # `generate` builds the masks of static caches from the config of the model itself
        unpatched = getattr(top, "create_masks_for_generate", create_masks_for_generate)
        vars(top)["create_masks_for_generate"] = functools.partial(_masks_for_generate, unpatched, replacement)

    def remove(self) -> None:
        """Make the layers of the model call its own attention again."""
        for module in self._model.modules():
            config = vars(module).get("config")
            if isinstance(config, ConfigView):
                module.config = config.ropewalk_config
            vars(module).pop("create_masks_for_generate", None)


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The causal language model in `model`, which may be a wrapper such as PEFT's."""
    language_models: Iterator[PreTrainedModel] = (
        m for m in model.modules() if isinstance(m, PreTrainedModel) and m.can_generate()
    )
    return next(language_models, model)


def _masks_for_generate(unpatched: Callable[..., Any], replacement: Replacement, *, config: Any, **others: Any) -> Any:
    return unpatched(config=_config_view(config, config.get_text_config(), replacement), **others)


def unpatched_attention(module: nn.Module, *, updated: bool = False) -> AttentionFunction:
    """The attention function that the unpatched model calls for the layer `module`, as its config is set now.

    Args:
        updated: the cache of continuous batching is updated already, so the function is called without it.
    """
    name = module.config._attn_implementation_internal  # type: ignore[union-attr]
    file = sys.modules[type(module).__module__]
    if name == "eager" or (updated and name == "paged|eager"):
        function = getattr(file, "eager_attention_forward", None)
        if function is None:
            raise UnsupportedModel(
                f"the model file of {type(module).__name__} has no eager attention function; load the model with "
                'attn_implementation="sdpa"'
            )
        return function  # type: ignore[no-any-return]
    return getattr(file, "ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[name]  # type: ignore[no-any-return]


def unpatched_mask(*args: Any, config: PreTrainedConfig, **others: Any) -> Any:
    """The mask that the unpatched model builds."""
    return ALL_MASK_ATTENTION_FUNCTIONS[config._attn_implementation_internal](*args, config=config, **others)


def is_replaced(model: PreTrainedModel) -> bool:
    """True while a patch replaces the model's attention function."""
    return any(isinstance(vars(module).get("config"), ConfigView) for module in model.modules())


def _replacement(config: Any) -> Replacement:
    if not isinstance(config, ConfigView):
        raise PatchError(
            f"the attention {PATCHED!r} works in models that ropewalk has patched only; call set_attn_implementation "
            "with another one, such as 'sdpa'"
        )
    return config.ropewalk_replacement


def _call_attention(module: nn.Module, *args: Any, **others: Any) -> Any:
    return _replacement(module.config).attention(module, *args, **others)


def _call_mask(*args: Any, config: PreTrainedConfig, **others: Any) -> Any:
    return _replacement(config).mask(*args, config=config, **others)


AttentionInterface.register(PATCHED, _call_attention)
AttentionMaskInterface.register(PATCHED, _call_mask)
