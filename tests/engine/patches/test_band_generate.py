"""Position maps, temperatures and growing lengths in `generate` of transformers: caches, batches, beams."""

import pytest
import torch
from families import FAMILIES
from long_text import IDS, beyond_reach, in_chunks, left_padded, read
from serving import difference
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

import ropewalk as rw
from ropewalk.engine.cache import ContiguousLayer

pytestmark = beyond_reach
GREEDY = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}


def written(model, ids, **options):
    """Logits of every step of a greedy `generate`. Tokens alone would hide small errors."""
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY, **options)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "deepseek_v3", "gpt_neox"])
@pytest.mark.parametrize(
    ("spec", "prompt"),  # less and more than the 16 tokens of a sliding window
    [("ntk:4|rerope:20|logn", 6), ("ntk:4|rerope:20|logn", 90), ("dynamic-ntk", 90), ("logn", 90)],
)
def test_caches_do_not_change_what_is_generated(family, spec, prompt):
    model, ids = FAMILIES[family](), IDS[:, :prompt]
    with rw.patch(model, spec):
        recomputed = written(model, ids, use_cache=False)
        assert difference(written(model, ids), recomputed) < 2e-5
        assert difference(written(model, ids, cache_implementation="static"), recomputed) < 2e-5


@pytest.mark.parametrize("spec", ["ntk:4|rerope:20|logn", "self-extend:4,window=20", "dynamic-yarn:step=16"])
def test_batches_beams_sampling_and_assistance(llama, spec):
    ids, mask = left_padded(110, 70)
    with rw.patch(llama, spec):
        alone = [llama.generate(IDS[:, :n], **GREEDY)[0, n:] for n in (110, 70)]
        batch = llama.generate(ids, attention_mask=mask, **GREEDY)[:, 110:]
        assert torch.equal(batch, torch.stack(alone))
        for way in ({"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}):
            beams = [llama.generate(IDS[:, :90], use_cache=cache, **GREEDY, **way) for cache in (True, False)]
            assert torch.equal(*beams)
        sampled = []
        for cache in (True, False):
            torch.manual_seed(1)
            sampled.append(
                llama.generate(IDS[:, :90], use_cache=cache, **{**GREEDY, "do_sample": True}, num_return_sequences=3)
            )
        assert torch.equal(*sampled)
        looked_up = llama.generate(IDS[:, :110], prompt_lookup_num_tokens=4, **GREEDY)
        assert torch.equal(looked_up[0, 110:], alone[0])
        assistant = FAMILIES["llama"]()
        assisted = llama.generate(IDS[:, :110], assistant_model=assistant, **GREEDY)
        assert torch.equal(assisted[0, 110:], alone[0])


def test_the_default_cache_gets_layers_that_store_rotated_keys(llama):
    with rw.patch(llama, "self-extend:4,window=20"), torch.inference_mode():
        cache = DynamicCache(config=llama.config)
        llama(input_ids=IDS[:, :100], past_key_values=cache)
        llama(input_ids=IDS[:, 100:101], past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, ContiguousLayer)
    assert [copy.shape[2] >= 101 for copy in layer.rotated.tensors] == [True, True]
    cache = DynamicCache(config=llama.config)
    llama(input_ids=IDS[:, :10], past_key_values=cache)
    assert type(cache.layers[0]) is DynamicLayer


def test_packed_texts_do_not_see_each_other(llama64):
    ids = torch.cat((IDS[:, :80], IDS[:, 20:150]), 1)
    positions = torch.cat((torch.arange(80), torch.arange(130)))[None]
    with rw.patch(llama64, "rerope:20|logn"):
        packed = read(llama64, ids, position_ids=positions)
        assert difference(packed[:, :80], read(llama64, IDS[:, :80])) < 1e-10
        assert difference(packed[:, 80:], read(llama64, IDS[:, 20:150])) < 1e-10


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "eager"), ("gemma3_text", "eager"), ("gemma3_text", "sdpa"), ("llama", "flex_attention")],
)
def test_the_models_own_implementation_serves_its_windows(family, implementation):
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    with rw.patch(model, "rerope:20|logn"):
        whole = read(model)
        assert difference(in_chunks(model, [50, 100]), whole) < 2e-5
    model = FAMILIES[family]()
    with rw.patch(model, "rerope:20|logn"):
        assert difference(read(model), whole) < 2e-5
