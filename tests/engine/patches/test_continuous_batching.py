"""Patched models under transformers' continuous batching: the texts that they write one by one, from shared pages."""

import pytest
import torch
from families import FAMILIES
from long_text import IDS, beyond_reach
from transformers import AutoModelForCausalLM, AutoTokenizer, ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.generation.continuous_batching.offloading_manager import OffloadingManager

import ropewalk as rw
from ropewalk.engine.patches.paged_call import update_pages

LENGTHS = (5, 40, 200, 520, 1000)  # the tests' model was trained at 256
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
SPECS = ["yarn:4", "logn", "rerope:64|logn", "dynamic-yarn", "yarn:2@0-1|dual-chunk@2-", "jet-long:64"]


def batching(**options):
    return ContinuousBatchingConfig(**{"page_size": 16, "max_batch_tokens": 256, "return_logprobs": True, **options})


@pytest.fixture(scope="module")
def tiny(tiny_folder):
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def prompts(tiny_folder, held_out_texts):
    """Prompts of all lengths; one comes twice, and one shares its beginning."""
    ids = AutoTokenizer.from_pretrained(tiny_folder)(max(held_out_texts, key=len)[:10_000]).input_ids
    found = [ids[100 * n : 100 * n + length] for n, length in enumerate(LENGTHS)]
    return [*found, found[3], found[3][:300] + ids[:50]]


@torch.inference_mode()
def written_alone(model, prompt, tokens):
    """The likeliest token after the prompt and after each of `tokens`, and the log-probabilities of `tokens`."""
    logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.argmax(-1).tolist(), logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]


def check(model, prompts, outputs):
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.error is None, output.error
        likeliest, logprobs = written_alone(model, prompt, output.generated_tokens)
        assert output.generated_tokens == likeliest
        assert (torch.tensor(output.logprobs) - logprobs).abs().max() < 1e-4


def spied(monkeypatch, owner, name):
    """What a method of transformers returns, call by call."""
    results, method = [], getattr(owner, name)

    def call(*args, **kwargs):
        results.append(method(*args, **kwargs))
        return results[-1]

    monkeypatch.setattr(owner, name, call)
    return results


def write(model, prompts, generation=GREEDY, **options):
    return model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=batching(**options), warmup=False
    )


@beyond_reach
@pytest.mark.parametrize("spec", SPECS)
def test_texts_are_those_that_the_patched_model_writes_alone(tiny, prompts, spec, monkeypatch):
    shared = spied(monkeypatch, PagedAttentionCache, "search_prefix_match")
    with rw.patch(tiny, spec):
        check(tiny, prompts, write(tiny, prompts, num_blocks=110))
    assert sum(matched > 0 for matched in shared) == 2  # of the prompt that comes again, and the shared beginning


@pytest.mark.parametrize("spec", ["logn", "rerope:64|logn"])
def test_a_text_whose_pages_were_taken_goes_on(tiny, prompts, spec, monkeypatch):
    offloaded = spied(monkeypatch, OffloadingManager, "offload_requests")
    longer = GenerationConfig(**{**GREEDY.to_diff_dict(), "max_new_tokens": 40})
    with rw.patch(tiny, spec):
        beginnings = [prompt[:30] for prompt in prompts[1:5]]
        check(tiny, beginnings, write(tiny, beginnings, longer, num_blocks=12, safety_margin=0.0))
    assert any(offloaded)


@beyond_reach
@pytest.mark.parametrize("spec", ["rerope:20|logn", "dynamic-ntk"])
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])  # with caps on the scores; with two rotary modules
def test_layers_with_a_window(family, spec):
    model = FAMILIES[family]().float().eval()
    prompts = [IDS[0, start : start + length].tolist() for start, length in ((0, 9), (3, 70), (50, 150))]
    with rw.patch(model, spec):
        check(model, prompts, write(model, prompts, num_blocks=100, max_batch_tokens=64))


def test_what_cannot_be_exact_is_refused_by_name(llama, monkeypatch):
    with pytest.raises(rw.PatchError, match=r"block tables; load .*sdpa.*auto_switch_to_flash=False"):
        update_pages(None, None, None, {"cache": object(), "block_table": torch.zeros(1)})
    monkeypatch.setattr(llama.config, "sliding_window", 32, raising=False)
    with rw.patch(llama, "rerope:20"):
        (output,) = write(llama, [IDS[0, :50].tolist()], num_blocks=100, max_batch_tokens=40).values()
    assert "a text has 50 tokens and the cache holds 41 of its keys" in output.error
    assert "set config.sliding_window to None before loading" in output.error
