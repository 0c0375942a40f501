"""Copies of a patched model, and wrappers around one, are patched too."""

import copy
import pickle

import pytest
import torch
from families import FAMILIES
from patched import IDS, SPECS, read
from serving import difference
from torch import nn
from transformers import StaticCache

import ropewalk as rw


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("spec", [*SPECS, "yarn:4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "moshi"])
def test_a_copy_is_patched_independently(family, spec, how):
    model = FAMILIES[family]()
    untouched = read(model)
    handle = rw.patch(model, spec)
    patched = read(model)
    twin, twins = COPIES[how]((model, handle))
    assert torch.equal(read(twin), patched)
    with pytest.raises(rw.PatchError, match=r"patched with .* already"):
        rw.patch(twin, "logn")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # the copy must not use the original
    handle.undo()
    assert torch.equal(read(twin), patched)
    twins.undo()
    assert torch.equal(read(twin), untouched)
    with rw.patch(twin, spec):
        assert torch.equal(read(twin), patched)


@pytest.mark.parametrize("spec", ["logn", "rerope:20"])
def test_undoing_a_copy_leaves_the_original(llama, spec):
    handle = rw.patch(llama, spec)
    patched = read(llama)
    _, twins = copy.deepcopy((llama, handle))
    twins.undo()
    assert torch.equal(read(llama), patched)
    assert torch.equal(llama.generate(IDS, max_new_tokens=4), llama.generate(IDS, max_new_tokens=4))
    handle.undo()


@pytest.mark.parametrize("spec", ["logn", "rerope:20"])
def test_a_saved_model_is_patched_when_it_is_loaded(llama, spec, tmp_path):
    with rw.patch(llama, spec):
        torch.save(llama, tmp_path / "model.pt")
        patched = read(llama)
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(read(loaded), patched)
    static = StaticCache(config=loaded.config, max_cache_len=100)
    assert torch.equal(
        loaded.generate(IDS, max_new_tokens=5, do_sample=False, past_key_values=static),
        loaded.generate(IDS, max_new_tokens=5, do_sample=False),
    )


class Wrapper(nn.Module):
    """A model in another module, as PEFT and others wrap one."""

    def __init__(self, model):
        super().__init__()
        self.inside, self.config = model, model.config

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inside"), name)

    def forward(self, *args, **kwargs):
        return self.inside(*args, **kwargs)


@pytest.mark.parametrize("spec", [*SPECS, "yarn:4"])
def test_wrappers_and_the_model_inside_know_the_patch(llama, spec):
    untouched = read(llama)
    with rw.patch(llama, spec):
        patched = read(llama)
        for other in (Wrapper(llama), Wrapper(Wrapper(llama))):
            with pytest.raises(rw.PatchError, match="already"):
                rw.patch(other, "logn")
            assert torch.equal(read(other), patched)
    wrapper = Wrapper(llama)
    with rw.patch(wrapper, spec):
        assert torch.equal(read(wrapper), patched)
        assert llama.config._attn_implementation == "sdpa"
        with pytest.raises(rw.PatchError, match="already"):
            rw.patch(llama, "logn")
    assert torch.equal(read(llama), untouched)


@pytest.mark.parametrize("spec", ["logn", "rerope:20"])
def test_adapters_of_peft_over_a_patched_model(llama, spec):
    peft = pytest.importorskip("peft")
    untouched = read(llama)
    handle = rw.patch(llama, spec)
    patched = read(llama)
    wrapped = peft.get_peft_model(llama, peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert torch.equal(read(wrapped), patched)  # a new LoRA changes nothing
    with pytest.raises(rw.PatchError, match="already"):
        rw.patch(wrapped, spec)
    handle.undo()
    assert torch.equal(read(wrapped), untouched)
    with rw.patch(wrapped, spec):
        assert torch.equal(read(wrapped), patched)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        assert difference(read(merged), patched) < 1e-6
    assert torch.equal(read(wrapped), untouched)
