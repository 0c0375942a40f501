"""Models whose weights accelerate keeps on the disk between calls: the same numbers as with all of them in memory."""

import pytest
import torch
from families import FAMILIES
from serving import difference
from transformers import AutoModelForCausalLM

import ropewalk as rw

CPU = {"model.embed_tokens": "cpu", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
PLACES = [
    {"model.embed_tokens": "disk"},
    {"model.embed_tokens": "disk", "model.layers": "disk", "model.norm": "disk", "lm_head": "disk"},
    {"model.rotary_emb": "disk", "lm_head": "disk"},
]
IDS = torch.arange(3, 93)[None]


@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:20|logn", "dynamic-ntk"])
def test_a_model_on_the_disk_is_patched_like_one_in_memory(places, spec, tmp_path):
    model = FAMILIES["llama"]()
    model.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model",
        device_map={**CPU, "lm_head": "cpu", **places},
        offload_folder=tmp_path / "offload",
        offload_buffers=True,
    )
    with torch.inference_mode():
        before = offloaded(IDS).logits
        with rw.patch(model, spec), rw.patch(offloaded, spec):
            assert difference(offloaded(IDS).logits, model(IDS).logits) < 1e-6
        assert torch.equal(offloaded(IDS).logits, before)


@pytest.mark.parametrize(
    "places", [{"model.embed_tokens": "disk", "lm_head": "disk"}, {"model.layers": "disk"}, PLACES[1]]
)
def test_a_loaded_model_on_the_disk_answers_like_one_in_memory(places, tiny_folder):
    whole = rw.load(tiny_folder, compile=False)
    split = rw.load(tiny_folder, device_map={**CPU, "lm_head": "cpu", **places})
    assert "in float32 on cpu (not the compiled kernels: " in split.describe()
    with pytest.raises(rw.UnsupportedModel, match="need all weights in memory"):
        rw.load(tiny_folder, device_map={**CPU, "lm_head": "cpu", **places}, compile=True)
    greedy = rw.SamplingParams(max_new_tokens=5, temperature=0, repetition_penalty=1.1)
    drawn = rw.SamplingParams(max_new_tokens=5, temperature=1, seed=1)
    for spec in (None, "yarn:2", "rerope:64|logn"):
        whole.rope = split.rope = spec
        for params in (greedy, drawn):
            assert split.generate("def first(", params).text == whole.generate("def first(", params).text
        assert split.logprob("abc", given="d") == pytest.approx(whole.logprob("abc", given="d"), abs=1e-4)
    healed = [rw.heal(model.hf, model.tokenizer, ["def fi"], drawn) for model in (whole, split)]
    assert torch.equal(healed[0].input_ids, healed[1].input_ids)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        empty = FAMILIES["llama"]()
    empty.model.rotary_emb = FAMILIES["llama"]().model.rotary_emb
    with pytest.raises(rw.UnsupportedModel, match="on the meta device"):
        rw.patch(empty, "logn")
