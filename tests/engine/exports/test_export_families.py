"""The export of every family to transformers, or the reason why not."""

import pytest
import torch
from exported import relative_difference
from families import FAMILIES
from transformers import AutoModelForCausalLM

import ropewalk as rw

NOT_EXPORTED = {
    "beam": "sees a sliding window only",
    "codegen": "has no rotary embedding",
    "cohere_compass_text": "sees a sliding window only",
    "deepseek_v4": "its rotary module computes its angles anew in every call, so it is not patched either",
    "gemma4_text": "does not accept the scaled config",
    "gemma4_unified_text": "does not accept the scaled config",
    "gptj": "has no rotary embedding",
    "phimoe": "its rotary module computes its angles anew in every call, so it is not patched either",
    "recurrent_gemma": "max_position_embeddings=None",
    "youtu": "transformers itself does not give it back from its files: other logits, untouched",
}
"""Families of `FAMILIES` that cannot be exported or compared, and the reason."""


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - NOT_EXPORTED.keys()))
def test_every_family_is_exported_to_transformers(family, tmp_path):
    model = FAMILIES[family]()
    ids = torch.arange(60)[None] % 50

    def compute(model):
        with torch.inference_mode():
            return model(ids).logits

    with rw.patch(model, "ntk-mixed:4"):
        wanted = compute(model)
    rw.export(model, tmp_path / "out", rope="ntk-mixed:4")
    back = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation=model.config._attn_implementation
    )
    assert relative_difference(compute(back), wanted) < 1e-5


@pytest.mark.parametrize("family", [name for name, why in NOT_EXPORTED.items() if not why.startswith(("its", "tr"))])
def test_families_that_cannot_be_exported_are_refused_with_the_reason(family, tmp_path):
    with pytest.raises(rw.RopewalkError, match=NOT_EXPORTED[family]):
        rw.export(FAMILIES[family](), tmp_path / "out", rope="ntk-mixed:4")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["vllm", "llama.cpp"])
def test_frequencies_by_layer_type_are_written_for_transformers_only(tmp_path, target):
    with pytest.raises(rw.UnsupportedModel, match="different frequencies"):
        rw.export(FAMILIES["gemma3_text"](), tmp_path / "no", rope="ntk:4", target=target)


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp", "ollama"])
def test_a_temperature_of_the_models_own_is_written_for_transformers_only(tmp_path, target):
    with pytest.raises(rw.UnsupportedModel, match=rf"temperature of its own, step-log.*how {target} reads it was not"):
        rw.export(FAMILIES["ministral3"](), tmp_path / "no", rope="ntk:4", target=target)
    assert not any(tmp_path.iterdir())
