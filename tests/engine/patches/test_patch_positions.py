"""The positions of a call under a patch: with padding, in threads, in checkpointed layers, and in a compiled model."""

import itertools
import threading

import pytest
import torch
from families import FAMILIES
from patched import IDS, SPECS, read
from serving import difference
from transformers import DynamicCache, StaticCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ropewalk as rw

PADDED = torch.cat((torch.zeros(1, 20, dtype=torch.long), IDS[:, :70]), 1)
MASK = torch.cat((torch.zeros(1, 20, dtype=torch.long), torch.ones(1, 70, dtype=torch.long)), 1)


@pytest.fixture
def llama():
    return FAMILIES["llama"]()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "moshi"])
def test_a_padded_row_is_the_row_alone_under_a_temperature(family, implementation):
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    batch, mask = torch.cat((IDS, PADDED)), torch.cat((torch.ones_like(MASK), MASK))
    with rw.patch(model, "logn"):
        alone = [read(model), read(model, PADDED[:, 20:])]
        left = read(model, batch, attention_mask=mask)
        right = read(model, torch.cat((IDS, PADDED.roll(-20, 1))), attention_mask=torch.cat((mask[:1], MASK.flip(1))))
        numbered = read(model, batch, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    for row in (left[1:, 20:], right[1:, :70], numbered[1:, 20:]):
        assert difference(row, alone[1]) < 2e-5
    assert difference(left[:1], alone[0]) < 2e-5


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
        past = DynamicCache() if cache == "dynamic" else StaticCache(config=llama.config, max_cache_len=128)
        cuts = [0, 60, 61, 62, 90]
        parts = [
            llama(input_ids=PADDED[:, i:j], attention_mask=MASK[:, :j], past_key_values=past).logits
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
def test_a_model_with_an_indexer_takes_a_temperature(family):
    model = FAMILIES[family]()
    before = read(model)
    with rw.patch(model, "temperature:1.3"):
        assert difference(read(model), before) > 1e-4
    assert torch.equal(read(model), before)


def test_layers_with_chunks_keep_their_temperature(monkeypatch):
    model = FAMILIES["llama4_text"]()
    kinds = model.config.layer_types
    assert kinds[0] == "chunked_attention" and "full_attention" in kinds[1:]
    sdpa, queries = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def spy(module, query, *rest, **others):
        queries[module.layer_idx] = query
        return sdpa(module, query, *rest, **others)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    read(model)
    before = dict(queries)
    with rw.patch(model, "temperature:2"):
        read(model)
    assert torch.equal(queries[0], before[0])  # no layer before it differs
    full = kinds.index("full_attention")
    assert difference(queries[full], before[full]) > 0.1


# Layers that are computed a second time for their gradients


def gradients(model, batches):
    """Gradients of the sum of the losses of several forward passes, by one backward pass."""
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
@pytest.mark.parametrize(
    ("family", "specs"), [("llama", ["logn", "temperature:1.5"]), ("llama", ["rerope:20|logn"]), ("moshi", ["logn"])]
)
def test_a_compiled_model_follows_its_patches(family, specs):
    model = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=len(specs) > 1)
    untouched = read(model)
    for scaler in specs:
        assert difference(read(compiled), untouched) < 1e-6
        with rw.patch(model, scaler):
            patched = read(model)
            assert difference(patched, untouched) > 1e-2
            assert difference(read(compiled), patched) < 1e-6
    assert difference(read(compiled), untouched) < 1e-6
