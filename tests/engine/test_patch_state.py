"""A patch is in the model's layers only: not in its config, in a process-wide name, or in what a call left behind."""

import copy
import itertools
import pickle
import threading
import warnings

import pytest
import torch
from families import FAMILIES
from serving import difference
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, DynamicCache, Gemma3Config, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3ForConditionalGeneration
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaModel

import ropewalk as rw

SPECS = ["logn", "rerope:20", "yarn:2|rerope:20|logn", "dynamic-ntk"]
IDS = torch.randint(3, 97, (1, 90), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def read(model, ids=IDS, **inputs):
    return model(input_ids=ids, **inputs).logits


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


# set_attn_implementation


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("inner", [False, True])
def test_another_attention_implementation_keeps_the_patch(family, spec, inner):
    model, other = FAMILIES[family](), FAMILIES[family]()
    other.set_attn_implementation("eager")
    untouched = read(other)
    with rw.patch(other, spec):
        expected = read(other)
    assert difference(expected, untouched) > 1e-3
    handle = rw.patch(model, spec)
    (model.model if inner else model).set_attn_implementation("eager")
    assert difference(read(model), expected) < 1e-6
    handle.undo()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(read(model), untouched)


def test_an_implementation_written_into_the_config_keeps_the_patch(llama):
    with rw.patch(llama, "rerope:20|logn"):
        expected = read(llama)
        llama.config._attn_implementation = "eager"
        assert difference(read(llama), expected) < 1e-6


def test_our_name_alone_is_refused(llama):
    with rw.patch(llama, "logn"):
        name = llama.model.layers[0].self_attn.config._attn_implementation
    llama.set_attn_implementation(name)
    with pytest.raises(rw.PatchError, match="call set_attn_implementation with another one"):
        read(llama)


# The config


@pytest.mark.parametrize("spec", [*SPECS, "yarn:4"])
def test_the_config_of_a_patched_model_is_untouched(llama, spec, tmp_path):
    llama.save_pretrained(tmp_path)
    config, before = llama.config, copy.deepcopy(llama.config)
    untouched = read(llama)
    handle = rw.patch(llama, spec)
    patched = read(llama)
    assert llama.config is config
    assert config.to_dict() == before.to_dict()
    assert config._attn_implementation == before._attn_implementation
    others = [
        LlamaForCausalLM(config),
        AutoModelForCausalLM.from_config(config),
        LlamaForCausalLM.from_pretrained(tmp_path, config=config),
        LlamaForCausalLM.from_pretrained(tmp_path, config=llama.model.config),
        LlamaForCausalLM(copy.deepcopy(llama.model.layers[0].self_attn.config)),
        LlamaForCausalLM(copy.copy(llama.model.config)),
    ]
    for other in others:
        other.load_state_dict(llama.state_dict())
        assert torch.equal(read(other), untouched)
    handle.undo()
    for other in others:
        assert torch.equal(read(other), untouched)
        with rw.patch(other, spec):
            assert torch.equal(read(other), patched)


@pytest.mark.parametrize("build", [LlamaModel, AutoModel.from_config])
def test_a_model_built_from_what_the_layers_see_is_refused(llama, build):
    with rw.patch(llama, "logn"):
        with pytest.raises(rw.PatchError, match="use the config of the model itself"):
            build(llama.model.config)
        patched = read(llama)
        assert llama.model.config.to_dict() == llama.config.to_dict()
        assert repr(llama.model.config) == repr(llama.config)
    assert not torch.equal(read(llama), patched)


def test_what_is_set_in_the_config_later_is_seen_by_the_layers(llama):
    with rw.patch(llama, "logn"):
        llama.config.use_cache = False
        assert llama(input_ids=IDS).past_key_values is None
        assert llama.model.config.use_cache is False
    assert llama.model.config is llama.config


@pytest.mark.parametrize("spec", SPECS)
def test_a_model_with_a_text_config_in_it_is_patched_like_its_text_model(spec):
    text = FAMILIES["gemma3_text"]()
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(
        text_config=text.config.to_dict(), vision_config=vision | {"image_size": 28, "patch_size": 14}
    )
    whole = Gemma3ForConditionalGeneration(config).eval()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.lm_head.load_state_dict(text.lm_head.state_dict())
    before = config.to_dict()
    with rw.patch(text, spec), rw.patch(whole, spec):
        assert difference(read(whole), read(text)) < 1e-5
        assert config.to_dict() == before
        written = [model.generate(IDS, max_new_tokens=6, do_sample=False) for model in (whole, text)]
        assert torch.equal(*written)
    assert whole.model.config is config
    assert whole.model.language_model.config is config.text_config


@pytest.mark.parametrize("spec", ["yarn:4", "logn", "rerope:20"])
def test_save_pretrained_says_that_the_patch_is_not_saved(llama, spec, tmp_path):
    untouched = read(llama)
    handle = rw.patch(llama, spec)
    with pytest.warns(UserWarning, match=f"without the patch {spec}.*patched again") as given:
        llama.save_pretrained(tmp_path / "patched")
    assert ("ropewalk.export" in str(given[0].message)) == (spec == "yarn:4")
    assert torch.equal(read(LlamaForCausalLM.from_pretrained(tmp_path / "patched")), untouched)
    with pytest.warns(UserWarning, match="without the patch"):
        llama.model.save_pretrained(tmp_path / "base")
    handle.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llama.save_pretrained(tmp_path / "undone")
    with rw.patch(llama, "yarn:4"), warnings.catch_warnings():
        warnings.simplefilter("error")
        rw.export(llama, tmp_path / "exported")


@pytest.fixture
def loaded(tiny_folder):
    return rw.load(tiny_folder, compile=False)


def test_the_model_under_a_loaded_one_says_its_scaler(loaded, tmp_path):
    loaded.rope = "yarn:2"
    with pytest.warns(UserWarning, match="without the patch yarn:2"):
        loaded.hf.save_pretrained(tmp_path / "scaled")
    loaded.rope = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.hf.save_pretrained(tmp_path / "plain")


@pytest.mark.parametrize("spec", ["yarn:2", "logn", "rerope:64"])
def test_a_loaded_model_and_the_one_under_it_are_not_patched_twice(loaded, spec):
    before = read(loaded.hf)
    loaded.rope = spec
    with pytest.raises(rw.PatchError, match=r"patched with .* already"):
        rw.patch(loaded.hf, "logn")
    loaded.rope = None
    handle = rw.patch(loaded.hf, spec)
    with pytest.raises(rw.PatchError, match="the model underneath is patched with"):
        loaded.rope = "logn"
    assert str(loaded.rope) == "none"
    handle.undo()
    loaded.rope = "logn"
    loaded.rope = None
    assert torch.equal(read(loaded.hf), before)


# Copies


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("spec", [*SPECS, "yarn:4"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "moshi"])
def test_a_copy_is_patched_too_and_by_itself(family, spec, how):
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
            parameter.zero_()  # nothing of the original is in use
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
def test_what_is_patched_is_known_from_outside_and_from_inside(llama, spec):
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
    assert torch.equal(read(wrapped), patched)  # LoRA starts as nothing
    with pytest.raises(rw.PatchError, match="already"):
        rw.patch(wrapped, spec)
    handle.undo()
    assert torch.equal(read(wrapped), untouched)
    with rw.patch(wrapped, spec):
        assert torch.equal(read(wrapped), patched)
        merged = copy.deepcopy(wrapped).merge_and_unload()
        assert difference(read(merged), patched) < 1e-6
    assert torch.equal(read(wrapped), untouched)


# Threads

PADDED = torch.cat((torch.zeros(1, 20, dtype=torch.long), IDS[:, :70]), 1)
MASK = torch.cat((torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 70, dtype=torch.long)), 1)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "moshi"])
def test_a_padded_row_is_the_row_alone_under_a_temperature(family, implementation):
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    batch, mask = torch.cat((IDS, PADDED)), torch.cat((torch.ones_like(MASK), MASK))
    with rw.patch(model, "logn"):
        alone = [read(model), read(model, PADDED[:, 20:])]
        found = read(model, batch, attention_mask=mask)
        right = read(model, torch.cat((IDS, PADDED.roll(-20, 1))), attention_mask=torch.cat((mask[:1], MASK.flip(1))))
        numbered = read(model, batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for rows, one in ((found[1:, 20:], alone[1]), (right[1:, :70], alone[1]), (numbered[1:, 20:], alone[1])):
        assert difference(rows, one) < 2e-5
    assert difference(found[:1], alone[0]) < 2e-5


@pytest.mark.slow
def test_a_padded_row_is_the_row_alone_under_a_temperature_in_flex_attention(llama):
    with rw.patch(llama, "logn"):
        alone = read(llama, PADDED[:, 20:])
        llama.set_attn_implementation("flex_attention")
        assert difference(read(llama, PADDED, attention_mask=MASK)[:, 20:], alone) < 2e-5


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_padded_row_is_the_row_alone_token_by_token(llama, cache):
    with rw.patch(llama, "logn"), torch.inference_mode():
        alone = read(llama, PADDED[:, 20:])
        held = DynamicCache() if cache == "dynamic" else StaticCache(config=llama.config, max_cache_len=128)
        cuts = [0, 60, 61, 62, 90]
        parts = [
            llama(input_ids=PADDED[:, i:j], attention_mask=MASK[:, :j], past_key_values=held).logits
            for i, j in itertools.pairwise(cuts)
        ]
    assert difference(torch.cat(parts, 1)[:, 20:], alone) < 2e-5


@pytest.mark.parametrize("spec", [*SPECS, "yarn:2|logn"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "moshi"])
def test_threads_do_not_see_each_others_calls(family, spec):
    model = FAMILIES[family]()
    calls = [
        {"ids": PADDED, "attention_mask": MASK},
        {"ids": IDS},
        {"ids": IDS[:, :50]},
        {"ids": torch.cat((IDS, PADDED)), "attention_mask": torch.cat((torch.ones_like(MASK), MASK))},
    ]
    with rw.patch(model, spec):
        alone = [read(model, **call) for call in calls]
        wrong, barrier = [], threading.Barrier(len(calls))

        def work(call, expected):
            barrier.wait()
            for _ in range(12):
                if not torch.equal(read(model, **call), expected):
                    wrong.append(call)

        threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, alone, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@pytest.mark.parametrize("family", ["deepseek_v32", "glm_moe_dsa"])
def test_a_model_that_picks_its_keys_takes_a_temperature(family):
    model = FAMILIES[family]()
    before = read(model)
    with rw.patch(model, "temperature:1.3"):
        assert difference(read(model), before) > 1e-4
    assert torch.equal(read(model), before)


def test_layers_with_chunks_keep_their_temperature(monkeypatch):
    model = FAMILIES["llama4_text"]()
    kinds = model.config.layer_types
    assert kinds[0] == "chunked_attention" and "full_attention" in kinds[1:]
    own, queries = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def spy(module, query, *rest, **others):
        queries[module.layer_idx] = query
        return own(module, query, *rest, **others)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    read(model)
    before = dict(queries)
    with rw.patch(model, "temperature:2"):
        read(model)
    assert torch.equal(queries[0], before[0])  # below it nothing differs
    full = kinds.index("full_attention")
    assert difference(queries[full], before[full]) > 0.1


# Layers that are computed a second time for their gradients


def gradients(model, batches):
    """Of the sum of the losses of several forwards before one backward."""
    model.zero_grad()
    sum(model(**batch, labels=batch["input_ids"], use_cache=False).loss for batch in batches).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize(
    ("family", "spec"),
    [(family, spec) for family in ("llama", "gemma3_text", "moshi") for spec in ("logn", "yarn:2|rerope:20|logn")]
    + [("llama", "dynamic-ntk"), ("llama4_text", "logn"), ("zaya", "yarn:2|logn")],
)
@pytest.mark.parametrize("masked", [True, False])
def test_checkpointed_gradients_of_two_forwards(family, spec, reentrant, masked):
    model = FAMILIES[family]().train()
    batches = [{"input_ids": PADDED, "attention_mask": MASK}, {"input_ids": IDS[:, :40]}]
    if not masked:
        batches[0] = {"input_ids": IDS}
    handle = rw.patch(model, spec)
    expected = gradients(model, batches)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert difference(gradients(model, batches), expected) < 1e-5
    handle.undo()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "spec"), [("llama", "logn"), ("llama", "rerope:20|logn"), ("moshi", "logn")])
def test_a_compiled_model_follows_its_patches(family, spec):
    model = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=(family, spec) == ("llama", "logn"))
    untouched = read(model)
    for one in (spec, "temperature:1.5"):
        assert difference(read(compiled), untouched) < 1e-6
        with rw.patch(model, one):
            patched = read(model)
            assert difference(patched, untouched) > 1e-2
            assert difference(read(compiled), patched) < 1e-6
    assert difference(read(compiled), untouched) < 1e-6
