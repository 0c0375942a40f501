"""The six invariants (docs/design.md) of position maps, temperatures and growing lengths in transformers models."""

import copy

import pytest
import torch
from example_count import examples
from families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from long_text import IDS, MAPS, SPECS, beyond_reach, in_chunks, left_padded, read
from serving import difference, literal_attention
from transformers import DynamicCache, StaticCache

import ropewalk as rw

pytestmark = beyond_reach


def rounding(*specs, length=None):
    """The tolerance in float64. Angles of transformers are float32, and ours are float64."""
    scalers = [rw.scaling.parse(spec) for spec in specs]
    ours = all(s.member("positions") or (s.depends_on_length and length is None) for s in scalers)
    return 1e-10 if ours else 3e-5


@examples(25)
@given(
    spec=st.sampled_from(SPECS),
    cuts=st.lists(st.integers(1, 199), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_1_any_chunks_are_the_one_shot_prefill_in_float64(llama64, spec, cuts):
    with rw.patch(llama64, spec):
        whole = read(llama64)
        assert difference(in_chunks(llama64, cuts), whole) < 1e-10
        static = StaticCache(config=llama64.config, max_cache_len=230)
        assert difference(in_chunks(llama64, cuts, static), whole) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
def test_1_few_tokens_at_a_time_are_the_one_shot_prefill(llama64, spec):
    with rw.patch(llama64, spec):
        assert difference(in_chunks(llama64, [*range(90, 126), *range(126, 200, 9)]), read(llama64)) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
def test_2_a_row_of_a_batch_is_the_row_alone(llama64, spec):
    lengths = (200, 61, 130)
    ids, mask = left_padded(*lengths)
    with rw.patch(llama64, spec):
        rows = read(llama64, ids, attention_mask=mask)
        right = torch.stack([torch.cat((IDS[0, :n], torch.zeros(200 - n, dtype=torch.long))) for n in lengths])
        right_mask = (torch.arange(200) < torch.tensor(lengths)[:, None]).long()
        right_rows = read(llama64, right, attention_mask=right_mask)
        for row, length in enumerate(lengths):
            alone = read(llama64, IDS[:, :length])[0]
            assert difference(rows[row, 200 - length :], alone) < rounding(spec)
            assert difference(right_rows[row, :length], alone) < 1e-10


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2", "gpt_oss"])
def test_2_padding_on_the_right_of_models_with_windows(family):
    model = FAMILIES[family]()
    ids = torch.cat((IDS[:, :50], torch.zeros(1, 40, dtype=torch.long)), 1)
    mask = (torch.arange(90) < 50).long()[None]
    with rw.patch(model, "rerope:20|logn"):
        assert difference(read(model, ids, attention_mask=mask)[:, :50], read(model, IDS[:, :50])) < 2e-5


@pytest.mark.parametrize("spec", SPECS)
def test_3_nothing_depends_on_earlier_calls(llama, spec):
    with rw.patch(llama, spec):
        before = read(llama, IDS[:, :100])
        read(llama)
        in_chunks(llama, [150])
        assert torch.equal(read(llama, IDS[:, :100]), before)


@pytest.mark.parametrize("spec", SPECS)
def test_3_nothing_depends_on_the_padding_of_an_earlier_call(llama, spec):
    ids = IDS[:, :100].expand(2, -1)
    causal = torch.ones(100, 100, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    padding = torch.ones(2, 100, dtype=torch.long)
    padding[0, :40] = 0
    with rw.patch(llama, spec):
        before = read(llama, ids, attention_mask=causal)
        read(llama, ids, attention_mask=padding)
        assert torch.equal(read(llama, ids, attention_mask=causal), before)


@pytest.mark.parametrize("spec", SPECS)
def test_3_positions_that_were_changed_in_place_are_seen(llama, spec):
    ids, positions = IDS[:, :100], torch.arange(100)[None]
    with rw.patch(llama, spec):
        read(llama, ids, position_ids=positions)
        positions += 1000
        logits = read(llama, ids, position_ids=positions)
        assert torch.equal(logits, read(llama, ids, position_ids=positions.clone()))


@pytest.mark.parametrize("spec", SPECS)
def test_4_undo_restores_every_bit(llama, spec):
    before, buffers, config = read(llama), dict(llama.named_buffers()), llama.config.to_dict()
    handle = rw.patch(llama, spec)
    assert not torch.equal(read(llama), before)
    handle.undo()
    assert torch.equal(read(llama), before)
    assert all(value is buffers[name] for name, value in llama.named_buffers())
    assert llama.config.to_dict() == config
    assert "forward" not in vars(llama.model.rotary_emb)
    assert not llama._forward_pre_hooks and not llama._forward_hooks


@pytest.mark.parametrize("spec", [*MAPS, "dynamic-yarn:step=16", "ntk:4|rerope:20|logn"])
def test_5_a_cropped_or_forked_cache_equals_the_text_run_again(llama64, spec):
    with rw.patch(llama64, spec), torch.inference_mode():
        cache = DynamicCache(config=llama64.config)
        llama64(input_ids=IDS[:, :150], past_key_values=cache)
        fork = copy.deepcopy(cache)
        cache.crop(-40)
        other = IDS.flip(1)[:, :60]
        continued = llama64(input_ids=other, past_key_values=cache).logits
        afresh = read(llama64, torch.cat((IDS[:, :110], other), 1))[:, 110:]
        assert difference(continued, afresh) < 1e-10
        forked = llama64(input_ids=IDS[:, 150:], past_key_values=fork).logits
        assert difference(forked, read(llama64)[:, 150:]) < 1e-10


def test_5_a_cache_can_be_used_under_another_scaler(llama64):
    """Keys are stored un-rotated, so the scaler may change while a cache is in use.

    The model has one layer, because higher layers keep what they read under the old scaler.
    """
    model = FAMILIES["llama"]().double()
    model.model.layers = model.model.layers[:1]
    with torch.inference_mode():
        with rw.patch(model, "rerope:20"):
            cache = DynamicCache(config=model.config)
            model(input_ids=IDS[:, :150], past_key_values=cache)
        with rw.patch(model, "yarn:4|self-extend:2,window=30|logn"):
            got = model(input_ids=IDS[:, 150:], past_key_values=cache).logits
            assert difference(got, read(model)[:, 150:]) < 1e-10


@pytest.mark.parametrize(
    "spec",
    [
        "self-extend:1,window=20",
        "leaky-rerope:20,k=1",
        "dynamic-ntk",
        "dynamic-yarn",
        "dynamic-ntk:4,step=7",
        "jet-long:20",
        "logn",
        "temperature:1",
        "dynamic-ntk|jet-long:20|logn",
    ],
)
def test_6_factor_one_or_a_length_within_training_is_the_untouched_model(llama, spec):
    before = read(llama, IDS[:, :64])
    with rw.patch(llama, spec):
        assert difference(read(llama, IDS[:, :64]), before) < 1e-5


COMPOSED = st.tuples(
    st.sampled_from(
        ["", "linear:2", "ntk:4", "ntk-mixed:4", "yarn:4", "dynamic-ntk:step=11", "dynamic-yarn", "base:5e4"]
    ),
    st.sampled_from(["", "resonance"]),
    st.sampled_from(["", *MAPS, "sink-window:30"]),
    st.sampled_from(["", "logn", "temperature:0.8"]),
).map(lambda parts: "|".join(filter(None, parts)) or "none")


@examples(25)
@given(spec=COMPOSED, cut=st.integers(1, 199), length=st.sampled_from([None, 200]))
def test_invariants_of_random_compositions(llama64, spec, cut, length):
    before = read(llama64)
    with rw.patch(llama64, spec, length=length if rw.scaling.parse(spec).depends_on_length else None):
        whole = read(llama64)
        assert difference(in_chunks(llama64, [cut]), whole) < 1e-10
        ids, mask = left_padded(200, cut)
        row = read(llama64, ids, attention_mask=mask)[1, 200 - cut :]
        assert difference(row, read(llama64, IDS[:, :cut])[0]) < rounding(spec, length=length)
        assert torch.equal(read(llama64), whole)
    assert torch.equal(read(llama64), before)


# Growing and fixed length


def test_a_growing_length_gives_every_query_the_frequencies_of_its_own_step():
    model = FAMILIES["llama"]().double()
    model.model.layers = model.model.layers[:1]  # in higher layers, keys and values depend on the steps of lower ones
    with rw.patch(model, "dynamic-yarn:step=16"):
        growing = read(model)
    for end in (64, 80, 144, 192):
        with rw.patch(model, "dynamic-yarn:step=16", length=end):
            first = end - 16 if end > 64 else 0
            assert difference(growing[:, first:end], read(model, IDS[:, :end])[:, first:]) < 1e-5


@pytest.mark.parametrize(("spec", "static"), [("dynamic-ntk:2", "ntk:5.25"), ("dynamic-yarn", "yarn:3.125")])
def test_a_fixed_length_is_the_static_method_of_that_factor(llama64, spec, static):
    with rw.patch(llama64, spec, length=200):
        fixed = read(llama64)
    with rw.patch(llama64, static):
        assert difference(read(llama64), fixed) < 1e-10
    with rw.patch(llama64, spec):
        assert difference(read(llama64), fixed) > 1e-3


def test_a_map_of_a_fixed_length_equals_the_reference(llama64):
    with rw.patch(llama64, "jet-long:20|logn", length=200):
        fixed = read(llama64)
        with literal_attention():
            assert difference(fixed, read(llama64)) < 1e-10


@pytest.mark.parametrize(
    ("rope_type", "extra"),
    [
        ("dynamic", {"factor": 4.0}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}),
    ],
)
def test_transformers_own_dynamic_methods_fail_the_invariants(rope_type, extra):
    """The reason for explicit lengths: in transformers, the length is that of the longest row so far."""
    model = FAMILIES["llama"](rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **extra})
    whole = read(model)
    assert difference(in_chunks(model, [40, 100]), whole) > 1e-3  # 1: chunks
    ids, mask = left_padded(200, 50)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    row = read(model, ids, attention_mask=mask, position_ids=positions)[1, 150:]
    alone = read(model, IDS[:, :50])[0]
    assert difference(row, alone) > 1e-3  # 2: other rows of the batch
