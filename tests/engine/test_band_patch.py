"""Position maps, temperature and growing lengths in transformers models: generate, caches, batches, training."""

import copy
import itertools
import warnings

import pytest
import torch
from families import FAMILIES
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import difference, literal_attention
from transformers import DynamicCache, StaticCache, Trainer, TrainingArguments
from transformers.cache_utils import DynamicLayer

import ropewalk as rw
from ropewalk.engine.cache import ContiguousLayer

# most texts here are longer than some map reaches: what is held together is exact at any length
pytestmark = pytest.mark.filterwarnings("ignore:.*distances that were never trained are in use:UserWarning")

IDS = torch.arange(3, 203).remainder(95)[None] + 1  # 0 is padding
GREEDY = {"do_sample": False, "max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None}
MAPS = ["rerope:20", "leaky-rerope:20,k=4", "self-extend:4,window=20", "dual-chunk", "string:window=5", "jet-long:20"]
SPECS = [
    *MAPS,
    "sink-window:40",
    "logn",
    "temperature:1.2",
    "yarn:4",
    "dynamic-ntk",
    "dynamic-yarn:step=16",
    "ntk:4|rerope:20|logn",
    "dynamic-ntk|dual-chunk|temperature:1.1",
    "resonance|self-extend:4,window=20|logn",
]


def rounding(*specs, length=None):
    """What float64 leaves: transformers' own angles are float32, ours are not."""
    scalers = [rw.scaling.parse(spec) for spec in specs]
    ours = all(s.member("positions") or (s.depends_on_length and length is None) for s in scalers)
    return 1e-10 if ours else 3e-5


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def llama64():
    return FAMILIES["llama"]().double()


@torch.inference_mode()
def logits(model, ids=IDS, **inputs):
    return model(input_ids=ids, use_cache=False, **inputs).logits


@torch.inference_mode()
def in_chunks(model, cuts, cache=None, ids=IDS):
    cache = DynamicCache(config=model.config) if cache is None else cache
    edges = itertools.pairwise([0, *cuts, ids.shape[1]])
    return torch.cat([model(input_ids=ids[:, a:b], past_key_values=cache).logits for a, b in edges], 1)


def left_padded(*lengths):
    """Rows of IDS of the given lengths, padded with 0 on the left, and their mask."""
    width = max(lengths)
    rows = [torch.cat((torch.zeros(width - n, dtype=torch.long), IDS[0, :n])) for n in lengths]
    mask = torch.stack([(torch.arange(width) >= width - n).long() for n in lengths])
    return torch.stack(rows), mask


# The six invariants


@settings(max_examples=40, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    cuts=st.lists(st.integers(1, 199), min_size=1, max_size=6, unique=True).map(sorted),
)
def test_1_any_chunks_are_the_one_shot_prefill_in_float64(llama64, spec, cuts):
    with rw.patch(llama64, spec):
        whole = logits(llama64)
        assert difference(in_chunks(llama64, cuts), whole) < 1e-10
        static = StaticCache(config=llama64.config, max_cache_len=230)
        assert difference(in_chunks(llama64, cuts, static), whole) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
def test_1_token_by_token_is_the_one_shot_prefill(llama64, spec):
    with rw.patch(llama64, spec):
        assert difference(in_chunks(llama64, range(90, 200)), logits(llama64)) < 1e-10


@pytest.mark.parametrize("spec", SPECS)
def test_2_a_row_of_a_batch_is_the_row_alone(llama64, spec):
    lengths = (200, 61, 130)
    ids, mask = left_padded(*lengths)
    with rw.patch(llama64, spec):
        rows = logits(llama64, ids, attention_mask=mask)
        right = torch.stack([torch.cat((IDS[0, :n], torch.zeros(200 - n, dtype=torch.long))) for n in lengths])
        right_mask = (torch.arange(200) < torch.tensor(lengths)[:, None]).long()
        right_rows = logits(llama64, right, attention_mask=right_mask)
        for row, length in enumerate(lengths):
            alone = logits(llama64, IDS[:, :length])[0]
            assert difference(rows[row, 200 - length :], alone) < rounding(spec)
            assert difference(right_rows[row, :length], alone) < 1e-10


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2", "gpt_oss"])
def test_2_padding_on_the_right_of_models_with_windows(family):
    model = FAMILIES[family]()
    ids = torch.cat((IDS[:, :50], torch.zeros(1, 40, dtype=torch.long)), 1)
    mask = (torch.arange(90) < 50).long()[None]
    with rw.patch(model, "rerope:20|logn"):
        assert difference(logits(model, ids, attention_mask=mask)[:, :50], logits(model, IDS[:, :50])) < 2e-5


@pytest.mark.parametrize(
    ("family", "implementation"),
    [("llama", "eager"), ("gemma3_text", "eager"), ("gemma3_text", "sdpa"), ("llama", "flex_attention")],
)
def test_the_models_own_implementation_serves_its_windows(family, implementation):
    model = FAMILIES[family]()
    model.set_attn_implementation(implementation)
    with rw.patch(model, "rerope:20|logn"):
        whole = logits(model)
        assert difference(in_chunks(model, [50, 100]), whole) < 2e-5
    model = FAMILIES[family]()
    with rw.patch(model, "rerope:20|logn"):
        assert difference(logits(model), whole) < 2e-5


@pytest.mark.parametrize("spec", SPECS)
def test_3_nothing_depends_on_earlier_calls(llama, spec):
    with rw.patch(llama, spec):
        before = logits(llama, IDS[:, :100])
        logits(llama)
        in_chunks(llama, [150])
        assert torch.equal(logits(llama, IDS[:, :100]), before)


@pytest.mark.parametrize("spec", SPECS)
def test_4_undone_is_untouched_to_the_bit(llama, spec):
    before, buffers, config = logits(llama), dict(llama.named_buffers()), llama.config.to_dict()
    handle = rw.patch(llama, spec)
    assert not torch.equal(logits(llama), before)
    handle.undo()
    assert torch.equal(logits(llama), before)
    assert all(value is buffers[name] for name, value in llama.named_buffers())
    assert llama.config.to_dict() == config
    assert "forward" not in vars(llama.model.rotary_emb)
    assert not llama._forward_pre_hooks


@pytest.mark.parametrize("spec", [*MAPS, "dynamic-yarn:step=16", "ntk:4|rerope:20|logn"])
def test_5_a_cropped_or_forked_cache_is_the_text_run_afresh(llama64, spec):
    with rw.patch(llama64, spec), torch.inference_mode():
        cache = DynamicCache(config=llama64.config)
        llama64(input_ids=IDS[:, :150], past_key_values=cache)
        fork = copy.deepcopy(cache)
        cache.crop(-40)
        other = IDS.flip(1)[:, :60]
        continued = llama64(input_ids=other, past_key_values=cache).logits
        afresh = logits(llama64, torch.cat((IDS[:, :110], other), 1))[:, 110:]
        assert difference(continued, afresh) < 1e-10
        forked = llama64(input_ids=IDS[:, 150:], past_key_values=fork).logits
        assert difference(forked, logits(llama64)[:, 150:]) < 1e-10


def test_5_a_cache_is_read_anew_under_another_scaler(llama64):
    """Keys are held un-rotated, so the scaler may change over a live cache; the layers above the first keep what they
    read under the old one, so a one-layer model shows it."""
    model = FAMILIES["llama"]().double()
    model.model.layers = model.model.layers[:1]
    with torch.inference_mode():
        with rw.patch(model, "rerope:20"):
            cache = DynamicCache(config=model.config)
            model(input_ids=IDS[:, :150], past_key_values=cache)
        with rw.patch(model, "yarn:4|self-extend:2,window=30|logn"):
            got = model(input_ids=IDS[:, 150:], past_key_values=cache).logits
            assert difference(got, logits(model)[:, 150:]) < 1e-10


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
    before = logits(llama, IDS[:, :64])
    with rw.patch(llama, spec):
        assert difference(logits(llama, IDS[:, :64]), before) < 1e-5


COMPOSED = st.tuples(
    st.sampled_from(
        ["", "linear:2", "ntk:4", "ntk-mixed:4", "yarn:4", "dynamic-ntk:step=11", "dynamic-yarn", "base:5e4"]
    ),
    st.sampled_from(["", "resonance"]),
    st.sampled_from(["", *MAPS, "sink-window:30"]),
    st.sampled_from(["", "logn", "temperature:0.8"]),
).map(lambda parts: "|".join(filter(None, parts)) or "none")


@settings(max_examples=40, deadline=None)
@given(spec=COMPOSED, cut=st.integers(1, 199), length=st.sampled_from([None, 200]))
def test_invariants_of_random_compositions(llama64, spec, cut, length):
    before = logits(llama64)
    with rw.patch(llama64, spec, length=length if rw.scaling.parse(spec).depends_on_length else None):
        whole = logits(llama64)
        assert difference(in_chunks(llama64, [cut]), whole) < 1e-10
        ids, mask = left_padded(200, cut)
        row = logits(llama64, ids, attention_mask=mask)[1, 200 - cut :]
        assert difference(row, logits(llama64, IDS[:, :cut])[0]) < rounding(spec, length=length)
        assert torch.equal(logits(llama64), whole)
    assert torch.equal(logits(llama64), before)


# Growing and fixed length


def test_a_growing_length_gives_every_query_the_frequencies_of_its_own_step():
    model = FAMILIES["llama"]().double()
    model.model.layers = model.model.layers[:1]  # in deeper ones, keys and values remember the steps below them
    with rw.patch(model, "dynamic-yarn:step=16"):
        growing = logits(model)
    for end in (64, 80, 144, 192):
        with rw.patch(model, "dynamic-yarn:step=16", length=end):
            first = end - 16 if end > 64 else 0
            assert difference(growing[:, first:end], logits(model, IDS[:, :end])[:, first:]) < 1e-5


@pytest.mark.parametrize(("spec", "static"), [("dynamic-ntk:2", "ntk:5.25"), ("dynamic-yarn", "yarn:3.125")])
def test_a_fixed_length_is_the_static_method_of_that_factor(llama64, spec, static):
    with rw.patch(llama64, spec, length=200):
        fixed = logits(llama64)
    with rw.patch(llama64, static):
        assert difference(logits(llama64), fixed) < 1e-10
    with rw.patch(llama64, spec):
        assert difference(logits(llama64), fixed) > 1e-3


def test_a_map_of_a_fixed_length_is_the_literal_twin(llama64):
    with rw.patch(llama64, "jet-long:20|logn", length=200):
        fixed = logits(llama64)
        with literal_attention():
            assert difference(fixed, logits(llama64)) < 1e-10


@pytest.mark.parametrize(
    ("rope_type", "extra"),
    [
        ("dynamic", {"factor": 4.0}),
        ("longrope", {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8, "original_max_position_embeddings": 64}),
    ],
)
def test_transformers_own_dynamic_methods_fail_the_invariants(rope_type, extra):
    """Why length is explicit here: there, it is the longest that any row of the call or of an earlier one had."""
    model = FAMILIES["llama"](rope_parameters={"rope_type": rope_type, "rope_theta": 1e4, **extra})
    whole = logits(model)
    assert difference(in_chunks(model, [40, 100]), whole) > 1e-3  # 1: chunks
    ids, mask = left_padded(200, 50)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    row = logits(model, ids, attention_mask=mask, position_ids=positions)[1, 150:]
    alone = logits(model, IDS[:, :50])[0]
    assert difference(row, alone) > 1e-3  # 2: batch mates


# transformers' own ways of generating


def written(model, ids, **options):
    """Logits of every step of a greedy `generate`: tokens alone would hide small mistakes."""
    out = model.generate(ids, return_dict_in_generate=True, output_logits=True, **GREEDY, **options)
    return torch.stack(out.logits, 1)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "cohere2", "gpt_oss", "deepseek_v3", "gpt_neox"])
@pytest.mark.parametrize("spec", ["ntk:4|rerope:20|logn", "dynamic-ntk", "logn"])
@pytest.mark.parametrize("prompt", [6, 90])  # less and more than the 16 tokens of a sliding window
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


def test_the_default_cache_gets_layers_that_keep_turned_keys(llama):
    with rw.patch(llama, "self-extend:4,window=20"), torch.inference_mode():
        cache = DynamicCache(config=llama.config)
        llama(input_ids=IDS[:, :100], past_key_values=cache)
        llama(input_ids=IDS[:, 100:101], past_key_values=cache)
    layer = cache.layers[0]
    assert isinstance(layer, ContiguousLayer)
    assert [copy.shape[2] >= 101 for copy in layer.turned.tensors] == [True, True]
    cache = DynamicCache(config=llama.config)
    llama(input_ids=IDS[:, :10], past_key_values=cache)
    assert type(cache.layers[0]) is DynamicLayer


def test_packed_texts_are_apart(llama64):
    ids = torch.cat((IDS[:, :80], IDS[:, 20:150]), 1)
    positions = torch.cat((torch.arange(80), torch.arange(130)))[None]
    with rw.patch(llama64, "rerope:20|logn"):
        packed = logits(llama64, ids, position_ids=positions)
        assert difference(packed[:, :80], logits(llama64, IDS[:, :80])) < 1e-10
        assert difference(packed[:, 80:], logits(llama64, IDS[:, 20:150])) < 1e-10


# Training


@pytest.mark.parametrize("spec", [*MAPS, "sink-window:40", "ntk:4|rerope:20|logn", "yarn:4|dual-chunk|temperature:1.2"])
def test_gradients_are_the_twins(llama64, spec):
    ids = IDS[:, :120]

    def gradients():
        llama64.zero_grad()
        llama64(input_ids=ids, labels=ids).loss.backward()
        return {name: parameter.grad.clone() for name, parameter in llama64.named_parameters()}

    with rw.patch(llama64, spec, length=120 if "jet" in spec else None):
        ours = gradients()
        with literal_attention():
            twins = gradients()
    for name, gradient in ours.items():
        assert gradient.abs().max() > 0, name
        assert difference(gradient, twins[name]) < 1e-9, name


def loss(model):
    """In float64 throughout; transformers' own rounds the logits to float32."""
    return torch.nn.functional.cross_entropy(model(input_ids=IDS).logits[0, :-1], IDS[0, 1:])


@pytest.mark.parametrize("spec", ["logn", "yarn:4", "yarn:4|logn", "temperature:1.3"])
def test_gradients_of_the_simpler_tiers_are_finite_differences(llama64, spec):
    weight = llama64.model.layers[0].self_attn.q_proj.weight
    with rw.patch(llama64, spec):
        llama64.zero_grad()
        loss(llama64).backward()
        direction = weight.grad / weight.grad.norm()  # where the loss moves most, far above rounding
        losses = []
        with torch.no_grad():
            for step in (1e-3, -1e-3):  # the norms of Llama are float32
                weight += step * direction
                losses.append(loss(llama64))
                weight -= step * direction
        assert float((weight.grad * direction).sum()) == pytest.approx(float(losses[0] - losses[1]) / 2e-3, rel=1e-2)


def test_transformers_trainer_trains_a_patched_model(tmp_path):
    model = FAMILIES["llama"]()
    rows = [{"input_ids": IDS[0, i : i + 90], "labels": IDS[0, i : i + 90]} for i in range(16)]
    arguments = TrainingArguments(
        output_dir=tmp_path,
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-3,
        gradient_checkpointing=True,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    with rw.patch(model, "rerope:20|logn"):
        with torch.no_grad():
            before = model(input_ids=IDS[:, :90], labels=IDS[:, :90]).loss
        Trainer(model=model, args=arguments, train_dataset=rows).train()
        model.eval()
        with torch.no_grad():
            assert model(input_ids=IDS[:, :90], labels=IDS[:, :90]).loss < before - 0.1
        model.save_pretrained(tmp_path / "saved")
    assert "ropewalk" not in (tmp_path / "saved" / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["rerope:20", "logn"])
def test_torch_compile_gives_the_same_logits(spec):
    model = FAMILIES["llama"]()
    with rw.patch(model, spec):
        expected = logits(model)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager")
        assert difference(logits(compiled), expected) < 1e-5


# What is refused, and said


def test_what_cannot_be_honoured_is_refused_by_name(llama):
    with rw.patch(llama, "rerope:20"):
        with pytest.raises(rw.PatchError, match="output_attentions=True cannot be honoured"):
            llama(input_ids=IDS, output_attentions=True)
        mask = torch.ones(1, 200, dtype=torch.long)
        mask[0, 50:60] = 0
        with pytest.raises(
            rw.PatchError, match="hides tokens between others in row 0; pad on the left or on the right"
        ):
            llama(input_ids=IDS, attention_mask=mask)
        square = torch.ones(1, 1, 200, 200, dtype=torch.bool)
        with pytest.raises(rw.PatchError, match="not causal attention over its texts"):
            llama(input_ids=IDS, attention_mask=square)
        with torch.no_grad():
            causal = logits(llama, IDS, attention_mask=square.tril())
        assert torch.equal(causal, logits(llama))
        with pytest.raises(rw.PatchError, match="do not count up by one"):
            llama(input_ids=IDS[:, :4], attention_mask=torch.ones(1, 4), position_ids=torch.tensor([[0, 2, 4, 6]]))
        cache = DynamicCache(config=llama.config)
        llama(input_ids=IDS[:, :20], past_key_values=cache)
        with pytest.raises(rw.PatchError, match="position ids must count the tokens in the cache too"):
            llama(input_ids=IDS[:, :4], past_key_values=cache, position_ids=torch.arange(4)[None])


def test_maps_that_do_not_fit_are_refused_with_numbers(llama):
    with pytest.raises(rw.ConfigError, match="rerope: window 64 is not below the length 64 carried without it"):
        rw.patch(llama, "rerope:64")
    with pytest.raises(rw.ConfigError, match=r"reaches 144 tokens on this model, fewer than the 256 asked for"):
        rw.patch(llama, "self-extend:3,window=24", length="4x")
    rw.patch(llama, "self-extend:3,window=24", length=144).undo()
    rw.patch(llama, "yarn:4|rerope:200").undo()
    assert logits(llama).isfinite().all()


def test_a_text_beyond_the_reach_warns_once(llama):
    with rw.patch(llama, "self-extend:3,window=24"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(llama, IDS[:, :144])
        with pytest.warns(UserWarning, match="reaches 144 tokens on this model and the text has 145"):
            logits(llama, IDS[:, :145])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(llama)


def test_describe_names_tier_bands_reach_and_cost(llama):
    with rw.patch(llama, "ntk:4|rerope:20|logn") as handle:
        text = handle.describe()
        assert handle.reach == float("inf")
    for part in ("ntk:4|rerope:20|logn", "position bands", "near, far", "any length (trained: 64)", "scored once"):
        assert part in text
    with rw.patch(llama, "dynamic-ntk") as handle:
        assert "grows with each sequence, in steps of 8 beyond 64" in handle.describe()
    with rw.patch(llama, "dynamic-ntk", length="4x") as handle:
        assert "fixed at 256 tokens" in handle.describe()
        assert "static frequencies" in handle.describe()
    with rw.patch(llama, "logn") as handle:
        assert "temperature: queries are multiplied" in handle.describe()


def test_a_failed_patch_leaves_the_model_as_it_was(llama, monkeypatch):
    from ropewalk.engine import band_patch

    before = logits(llama)
    monkeypatch.setattr(band_patch, "banded_attention", lambda q, *_: q * 0)
    with pytest.raises(rw.UnsupportedModel, match="does not reproduce"):
        rw.patch(llama, "rerope:20")
    monkeypatch.undo()
    assert torch.equal(logits(llama), before)
    rw.patch(llama, "rerope:20").undo()


@pytest.mark.parametrize(("spec", "runs"), [("yarn:4", 1), ("yarn:4|logn", 1), ("yarn:4|rerope:20|logn", 4)])
def test_an_interrupted_patch_leaves_the_model_as_it_was(spec, runs):
    model = FAMILIES["llama"]()
    before, buffers = logits(model), dict(model.named_buffers())
    for last in range(1, runs + 1):
        left = iter(range(last, 0, -1))

        def interrupt(*_, left=left):
            if next(left) == 1:
                raise KeyboardInterrupt

        hook = model.lm_head.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            rw.patch(model, spec)
        hook.remove()
        assert torch.equal(logits(model), before)
        assert all(value is buffers[name] for name, value in model.named_buffers())
        assert not model._forward_pre_hooks
        assert not model.model.rotary_emb._forward_pre_hooks
    rw.patch(model, spec).undo()


def test_a_model_that_runs_otherwise_under_another_attention_is_refused(monkeypatch):
    """Falcon does. What the patch must give is what the untouched model gave, not what it gives while it is watched."""
    model = FAMILIES["llama"]()
    forward = model.lm_head.forward
    own = model.config._attn_implementation
    monkeypatch.setattr(
        model.lm_head, "forward", lambda x: forward(x) * (1 if model.config._attn_implementation == own else 2)
    )
    with pytest.raises(rw.UnsupportedModel, match="does not reproduce"):
        rw.patch(model, "rerope:20")
