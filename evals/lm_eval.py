"""ropewalk as a model of lm-evaluation-harness, so that its tasks can run under any scaler.

`ropewalk lm-eval` imports this module, which registers the model `ropewalk`, and then starts the
harness's own command. The harness (0.4.13) has no plug-ins.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from rich.progress import track

from ..engine.hf_model import input_device
from ..engine.load import load
from ..engine.sampling import SamplingParams
from ..errors import ConfigError, did_you_mean
from ..tokenizer_tools.encode import prompt_ids, text_ids
from .models.local import LocalModel
from .models.measured import Start, Tokens

_SAMPLING = {"temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed"}


@register_model("ropewalk")
class RopewalkLM(TemplateLM):  # type: ignore[misc]
    """A ropewalk model for the harness. Texts are read one by one, so results do not depend on the
    batch.

    Args:
        model: as for `load`: a built-in name, a folder, a .gguf file or a hub id.
        rope: a scaler. If it has commas, --model_args must be JSON.
        dtype: as for `load`.
        kv_dtype: as for `load`.
        precision: as for `load`.
        max_length: most tokens of a text; the beginning of a longer text is cut off. None: the
            reach of the scaler.
        max_gen_toks: most tokens to write if the task does not say.
        device: of the weights. None: the GPU if there is one.
        batch_size: the harness passes it. It has no effect.
        max_batch_size: the harness passes it. It has no effect.
    """

    def __init__(
        self,
        model: str,
        rope: str = "none",
        dtype: str = "auto",
        kv_dtype: str = "auto",
        precision: str = "auto",
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness's default is the GPU
        formats: dict[str, Any] = {"dtype": dtype, "kv_dtype": kv_dtype, "precision": precision}
        self.model = load(model, rope, **formats, max_length=max_length, device_map=device)
        self.tokenizer = self.model.tokenizer
        self.max_length, self.max_gen_toks = self.model.max_length, max_gen_toks
        self._device = input_device(self.model.hf)
        self._start = Start.of(self.tokenizer)
        if self._start.token is None:
            raise ConfigError(f"{model}: its tokenizer has no start or end token; the harness needs one")

    @property
    def eot_token_id(self) -> int:
        end: int | None = self.tokenizer.eos_token_id
        return self.prefix_token_id if end is None else end

    @property
    def prefix_token_id(self) -> int:
        assert self._start.token is not None
        return self._start.token

    @property
    def tokenizer_name(self) -> str:
        name: str = self.tokenizer.name_or_path
        return name.replace("/", "__")

    def get_model_info(self) -> dict[str, Any]:
        """Fields for the harness's results."""
        return {"model_dtype": self.model.precision, "rope": str(self.model.rope)}

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> Tokens:
        read = text_ids if add_special_tokens is False else prompt_ids
        return read(string, self.tokenizer, special_tokens=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        totals = []
        for request in _bar(requests, "loglikelihood_rolling", disable_tqdm):
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            totals.append(sum(self._score(*make_disjoint_window(window))[0] for window in windows))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], Tokens, Tokens]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for key, context, continuation in _bar(requests, "loglikelihood", disable_tqdm):
            results.append(self._score(context, continuation))
            self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        texts = []
        for request in _bar(requests, "generate_until", disable_tqdm):
            text, settings = request.args
            params = self._params(settings)
            room = self.max_length - params.max_new_tokens
            if room < 1:
                raise ConfigError(
                    f"{params.max_new_tokens} new tokens leave no room for a prompt within {self.max_length}; "
                    "give --model_args a larger max_length, or a smaller max_gen_toks"
                )
            texts.append(self.model.generate_ids(self.tok_encode(text)[-room:], params).text)
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _score(self, context: Tokens, continuation: Tokens) -> tuple[float, bool]:
        """Log-probability of `continuation` in nats, and whether each of its tokens is the
        likeliest."""
        ids = (context + continuation)[-(self.max_length + 1) :]
        first = max(len(ids) - len(continuation), 1)
        targets, total, done, is_greedy = torch.tensor(ids[first:]), 0.0, 0, True
        with torch.inference_mode():
            for logits in LocalModel(self.model).logits(ids, first, lambda past, count: None, len(ids) - 1):
                block_targets = targets[done : done + len(logits)].to(logits.device)
                chosen = logits.gather(-1, block_targets[:, None])[:, 0] - logits.logsumexp(-1)
                total += float(chosen.double().sum())
                is_greedy = is_greedy and bool((logits.argmax(-1) == block_targets).all())
                done += len(logits)
        return total, is_greedy

    def _params(self, settings: dict[str, Any]) -> SamplingParams:
        """The sampling parameters of a task's generation settings.

        Exact continuation is off, as in the harness's other models: the prompt's tokens stay as
        they are.
        """
        given = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        stop, count, samples = given.pop("until"), given.pop("max_gen_toks"), given.pop("do_sample", False)
        given["temperature"] = given.get("temperature", 1.0) if samples else 0.0
        if unknown := sorted(given.keys() - _SAMPLING):
            raise ConfigError(f"unknown generation setting {unknown[0]!r}.{did_you_mean(unknown[0], _SAMPLING)}")
        return SamplingParams(max_new_tokens=count, stop=tuple(s for s in stop if s), continuation="off", **given)


def _bar(requests: Sequence[Any], what: str, disable: bool) -> Iterable[Any]:
    return track(requests, description=what, disable=disable)
