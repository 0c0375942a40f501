"""Sampling parameters, and the step from logits to a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import torch
from torch import Tensor

from ..errors import ConfigError, Setting, UnsupportedModel, did_you_mean
from ..tokenizer_tools.vocabulary import check_text
from . import tensor_parallel

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

ContinuationMode = Literal["auto", "exact", "off"]

_KINDS = {
    "a whole number": (Integral, ("max_new_tokens",)),
    "a whole number, or None": (Integral | None, ("top_k", "seed", "logprobs")),
    "a number, or None": (Real | None, ("temperature", "top_p", "min_p", "repetition_penalty")),
    "a number of seconds, or None": (Real | None, ("max_time",)),
}
_LEAST = 1e-6  # temperature or penalty, below which logits divided by it overflow
_MOST = 1e6  # temperature or penalty
_LONG = 1e9  # seconds, longer than any answer takes
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_new_tokens": (lambda count: count >= 1, "at least 1"),
    "temperature": (
        lambda value: value == 0 or _LEAST <= value <= _MOST,
        f"0 (the likeliest token) or from {_LEAST:g} to {_MOST:g}",
    ),
    "top_k": (lambda count: count >= 0, "0 (all) or more"),
    "top_p": (lambda value: 0 < value <= 1, "above 0 and at most 1"),
    "min_p": (lambda value: 0 <= value <= 1, "between 0 and 1"),
    "repetition_penalty": (lambda value: _LEAST <= value <= _MOST, f"from {_LEAST:g} to {_MOST:g}"),
    "max_time": (lambda seconds: 0 < seconds < _LONG, f"above 0 and below {_LONG:g} seconds"),
    "seed": (lambda seed: 0 <= seed < 2**64, "at least 0 and below 2^64"),
    "logprobs": (lambda count: count >= 0, "0 or more, or None"),
}
_DRAW = ("temperature", "top_k", "top_p", "min_p")
"""Settings of which one is enough to say how to draw."""


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to stop. Names as in transformers; vLLM's are the same but for `max_tokens`.

    Settings that are None are those that the model's generation config recommends (`Model.default_params`), and without
    a recommendation the likeliest token is taken. A request that gives a temperature, top_k, top_p or min_p says how to
    draw: the recommendation is then not used, the temperature is 1 and the others are off unless given.

    Args:
        max_new_tokens: most tokens of the answer.
        temperature: divides the logits; 1 samples from the model's own distribution, 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: keep the fewest likeliest tokens whose probabilities reach p.
        min_p: keep tokens at least this fraction as likely as the likeliest.
        repetition_penalty: divides positive (multiplies negative) logits of tokens already in the text; 1 is off.
        stop: strings that end the text; they are not part of it.
        max_time: most seconds to wait, read the prompt and write, from when its tokens are known. The token in
            progress at that time is the last; a prompt that is still being read gets no answer.
        seed: makes sampling repeatable. None draws a new one for each request.
        logprobs: also return each token's log-probability and this many alternatives; None returns neither.
        continuation: how to go on where a prompt may end inside a token. "exact" draws the first token among all that
            a text with this prompt may have there, each with its probability; "off" begins a token at the end of
            the prompt; "auto" is "exact" for text, and "off" after a chat header and for prompts of token ids.
    """

    max_new_tokens: int = 256
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] | list[str] | str = ()
    max_time: float | None = None
    seed: int | None = None
    logprobs: int | None = None
    continuation: ContinuationMode = "auto"

    def __new__(cls, **settings: Any) -> Self:
        _check_names(cls, settings)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for kind, (types, names) in _KINDS.items():
            for name in names:
                if not isinstance(value := getattr(self, name), types):
                    raise ConfigError(Setting(name, repr(value), "given"), f" must be {kind}")
        if self.continuation not in get_args(ContinuationMode):
            raise ConfigError(
                "unknown ",
                Setting("continuation", repr(self.continuation), "given"),
                f".{did_you_mean(self.continuation, get_args(ContinuationMode))}",
            )
        for name, (is_valid, allowed) in _LIMITS.items():
            if (value := getattr(self, name)) is not None and not is_valid(value):
                shown = f"{value:g}" if isinstance(value, float) else value
                raise ConfigError(Setting(name, shown, "given"), f" must be {allowed}")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not (isinstance(stops, tuple | list) and all(isinstance(text, str) for text in stops)):
            raise ConfigError(Setting("stop", repr(self.stop), "given"), " must be a string, or a list of them")
        if "" in stops:
            raise ConfigError(Setting("stop", form="name"), ": an empty string would end every text at once; omit it")
        for stop in stops:
            check_text(stop)  # half a surrogate pair is never in an answer, so it would never stop there
        object.__setattr__(self, "stop", tuple(stops))

    @property
    def stops(self) -> tuple[str, ...]:
        """`stop` as a tuple."""
        return tuple(self.stop)


@dataclass(frozen=True, kw_only=True)
class ResolvedParams(SamplingParams):
    """`SamplingParams` that leave nothing to the model."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    @property
    def drawing(self) -> str:
        """How a token is drawn, in a few words."""
        words = ["the likeliest token" if self.temperature == 0 else f"drawn at temperature {self.temperature:g}"]
        for name in ("top_k", "top_p", "min_p", "repetition_penalty"):
            if (value := getattr(self, name)) != getattr(ResolvedParams, name):
                words.append(f"{name} {value:g}")
        return ", ".join(words)


def resolved(params: SamplingParams, config: GenerationConfig | None) -> ResolvedParams:
    """`params` with what a request leaves to the model, as the model's generation config recommends it.

    Raises:
        ConfigError: the recommendation is needed, and it is not valid.
    """
    if isinstance(params, ResolvedParams):
        return params
    settings = {each.name: getattr(params, each.name) for each in fields(params)}
    given = {name: value for name, value in settings.items() if value is not None}
    recommended = {} if given.keys() & set(_DRAW) else _recommended(config)
    return ResolvedParams(**recommended | given)


def _recommended(config: GenerationConfig | None) -> dict[str, Any]:
    """The settings of `SamplingParams` that a generation config recommends; without `do_sample`, the likeliest token.

    Raises:
        ConfigError: one of them is not valid.
    """
    samples = bool(getattr(config, "do_sample", False))
    names = (*(_DRAW if samples else ()), "repetition_penalty")
    settings = {name: value for name in names if (value := getattr(config, name, None)) is not None}
    if not samples:
        settings["temperature"] = 0.0
    try:
        ResolvedParams(**settings)
    except ConfigError as error:
        raise ConfigError(
            f"the model's generation config is wrong: {error}; say how to draw: ", Setting("temperature", 0)
        ) from error
    return settings


_OTHER_NAMES = {"max_tokens": "max_new_tokens", "max_completion_tokens": "max_new_tokens"}
"""Names that other libraries use."""


def _check_names(kind: type[SamplingParams], settings: dict[str, Any]) -> None:
    """Refuse names of settings that do not exist.

    Raises:
        ConfigError: with the name that was probably meant.
    """
    known = [field.name for field in fields(kind)]
    for name in settings:
        if name in _OTHER_NAMES:
            raise ConfigError(f"{name} is not a sampling parameter here; did you mean {_OTHER_NAMES[name]}?")
        if name not in known:
            raise ConfigError(f"{name} is not a sampling parameter.{did_you_mean(name, known)}")


def with_settings(params: SamplingParams | None, settings: dict[str, Any]) -> SamplingParams:
    """`params`, or the defaults, with some of its fields changed.

    Args:
        settings: values by the names of fields of `SamplingParams`.

    Raises:
        ConfigError: a name or a value is wrong.
    """
    _check_names(SamplingParams, settings)
    if params is not None and not isinstance(params, SamplingParams):
        raise ConfigError(
            f"{params!r:.100} is no rw.SamplingParams; give settings by their names, such as ",
            Setting("max_new_tokens", 20),
        )
    return replace(params or SamplingParams(), **settings)


def random_source(params: SamplingParams, device: torch.device) -> torch.Generator:
    """The random number generator of one request."""
    generator = torch.Generator(device=device)
    if params.seed is None:
        generator.manual_seed(tensor_parallel.fresh_seed())
    else:
        generator.manual_seed(int(params.seed))
    return generator


def not_finite(hf: PreTrainedModel) -> UnsupportedModel:
    """The error for a model whose logits are NaN or infinite."""
    return UnsupportedModel(
        f"the logits of this {type(hf).__name__} are NaN or infinite, so no token can be drawn: its weights hold such "
        "numbers, or its arithmetic overflows; get an undamaged copy, take another scaler, or ",
        Setting("dtype", "float32", "load"),
    )


def penalize_repetition(logits_V: Tensor, seen_ids: Tensor, penalty: float) -> Tensor:
    """CTRL's repetition penalty (arXiv 1909.05858) over the tokens of the text so far."""
    seen = logits_V[seen_ids]
    penalized = torch.where(seen > 0, seen / penalty, seen * penalty)
    return logits_V.index_put((seen_ids,), penalized)


class SeenTokens:
    """The distinct tokens of a text, for its repetition penalty. The cost of a token does not grow with the text.

    Args:
        penalty: as in `SamplingParams`. At 1 nothing is stored.
    """

    def __init__(self, penalty: float) -> None:
        self._penalty = penalty
        self._known: set[int] = set()
        self._new: list[int] = []
        self._ids = torch.empty(0, dtype=torch.int64)

    def add(self, ids: Iterable[int]) -> None:
        """Add the next tokens of the text."""
        if self._penalty != 1:
            new = [token for token in dict.fromkeys(ids) if token not in self._known]
            self._known.update(new)
            self._new += new

    def penalized(self, logits_V: Tensor) -> Tensor:
        """Logits with the penalty; the same tensor at penalty 1."""
        if self._penalty == 1:
            return logits_V
        if self._new:
            new = torch.tensor(self._new, device=logits_V.device)
            self._ids, self._new = torch.cat([self._ids.to(logits_V.device), new]), []
        return penalize_repetition(logits_V, self._ids, self._penalty)


def nucleus(logits: Tensor, top_p: float) -> Tensor:
    """Logits [..., V] of the fewest likeliest tokens whose probabilities reach `top_p`; all others are -inf."""
    if top_p == 1:  # rounded sums reach it before the last token does
        return logits
    ordered, order = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities
    drop = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, (before > 0) & (before >= top_p))
    return logits.masked_fill(drop, -math.inf)


def filtered(logits_V: Tensor, params: ResolvedParams) -> Tensor:
    """Logits divided by the temperature, with the tokens that top-k, top-p and min-p drop at -inf.

    Applied in that order, as transformers does; the likeliest token always stays.
    """
    logits = logits_V / params.temperature
    if 0 < params.top_k < logits.numel():
        threshold = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, -math.inf)
    logits = nucleus(logits, params.top_p)
    if params.min_p > 0:
        probabilities = logits.softmax(-1)
        logits = logits.masked_fill(probabilities < params.min_p * probabilities.max(), -math.inf)
    return logits


def sample(logits_V: Tensor, params: ResolvedParams, generator: torch.Generator) -> Tensor:
    """One token drawn from float32 `logits_V`; the likeliest at temperature 0 (ties: the lowest id).

    Returns:
        The token, int64 [], on the device of the logits. The host does not wait for it.
    """
    if params.temperature == 0:
        return logits_V.argmax()
    # 0.2 ms with 49k tokens, where torch.multinomial, which draws a number for every token, takes 1.9 ms
    cumulative = filtered(logits_V, params).softmax(-1).double().cumsum(-1)
    total = cumulative[-1]
    drawn = torch.rand((), dtype=torch.float64, device=total.device, generator=generator) * total
    drawn = torch.minimum(drawn, torch.nextafter(total, torch.zeros_like(total)))  # the product may be rounded up
    return torch.searchsorted(cumulative, drawn, right=True)
