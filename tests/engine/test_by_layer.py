"""Scalers that differ by layer, on every engine, compared with a model whose layers are computed one scaler at a time.

The other tests of the engines have such scalers in their lists too.
"""

from contextlib import ExitStack, contextmanager, nullcontext

import pytest
import torch
from decoders import DECODERS, IDS, LAYERED, LENGTH, TOLERANCE, compiled, difference, in_chunks, read
from families import build
from live import MORE, TEXT, cache_difference, check_cache, greedy

import ropewalk as rw
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.engine.runners.gpu.reference import TorchOps
from ropewalk.engine.runners.gpu.runner import GpuRunner
from ropewalk.errors import ConfigError, UnsupportedModel
from ropewalk.scaling import RopeSpec, parse

pytestmark = pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning")

FACTORS = "/".join(str(1 + n) for n in range(8))
FREQUENCIES = [
    "yarn:2@0|yarn:4@1-",
    "linear:3@1",
    f"ntk:4@0/2|longrope:4,short={FACTORS},long={FACTORS}@1",
    "yarn:4@0-1|resonance@1-",
]
OTHERS = [
    "rerope:20@1",
    "logn@0|temperature:1.3@2",
    "rerope:20@1|yarn:2@0|logn@1-",
    "self-extend:4,window=20@0|dual-chunk@1|sink-window:30@2",
    "dynamic-yarn@1-|rerope:20@0",
]
CHUNKS = {"whole": [1000], "one by one": [1], "mixed": [50, 1, 1, MAX_STEP_TOKENS, 3, 30]}


@pytest.fixture(scope="module")
def llama3():
    return DECODERS["llama"]()


@pytest.fixture(scope="module")
def runners(llama3):
    return compiled(llama3), GpuRunner(llama3, rotary_sites(llama3), TorchOps())


@contextmanager
def tables_by_hand(hf, spec):
    """The attention of every layer gets cosines and sines of its own, computed here."""
    rope = RopeSpec(dim=16, base=1e4, trained_length=64)
    scaler = parse(spec)

    def replaced(layer):
        inv_freq, factor = scaler.on(layer).frequencies(rope)

        def hook(module, args, kwargs):
            angles = torch.arange(kwargs["hidden_states"].shape[1]).double()[:, None] * torch.cat((inv_freq, inv_freq))
            kwargs["position_embeddings"] = tuple((factor * f(angles)).float()[None] for f in (torch.cos, torch.sin))
            return args, kwargs

        return hook

    with ExitStack() as stack:
        for index, layer in enumerate(hf.model.layers):
            hook = layer.self_attn.register_forward_pre_hook(replaced(index), with_kwargs=True)
            stack.callback(hook.remove)
        yield


def layer_by_layer(hf, spec, ids=IDS):
    """The logits of a model whose layer i is computed with the whole model under the scaler of layer i."""
    scaler, outputs, logits = parse(spec), [], None
    for index in range(len(hf.model.layers)):
        each = scaler.on(index)
        length = ids.shape[1] if each.depends_on_length else None
        with rw.patch(hf, each, length=length) if each.parts else nullcontext(), ExitStack() as stack:
            for place, layer in enumerate(hf.model.layers[: index + 1]):
                new = outputs[place] if place < index else None

                def hook(module, args, output, new=new):
                    if new is None:
                        outputs.append(output)
                    return new

                stack.callback(layer.register_forward_hook(hook).remove)
            logits = read(hf, ids)
    return logits


@pytest.mark.parametrize("spec", FREQUENCIES)
def test_frequencies_are_tables_of_cosines_by_layer(llama3, runners, spec):
    untouched = read(llama3)
    with tables_by_hand(llama3, spec):
        expected = read(llama3)
    assert difference(expected, untouched) > 1e-2
    assert difference(layer_by_layer(llama3, spec), expected) < TOLERANCE
    with rw.patch(llama3, spec):
        assert difference(read(llama3), expected) < TOLERANCE
    assert torch.equal(read(llama3), untouched)
    for runner in runners:
        runner.use(parse(spec), None)
        for sizes in CHUNKS.values():
            assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


@pytest.mark.parametrize("spec", OTHERS)
def test_any_facet_by_layer(llama3, runners, spec):
    expected = layer_by_layer(llama3, spec)
    assert difference(expected, read(llama3)) > 1e-2
    depends = parse(spec).depends_on_length
    with rw.patch(llama3, spec, length=LENGTH if depends else None):
        assert difference(read(llama3), expected) < TOLERANCE
    for runner in runners:
        runner.use(parse(spec), LENGTH if depends else None)
        for sizes in CHUNKS.values():
            assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


@pytest.mark.parametrize("spec", ["yarn:4@1-|logn@2", "yarn:2@0-1|yarn:4@2-3|rerope:30@1-2"])
@pytest.mark.parametrize("name", LAYERED)
def test_layers_of_several_kinds(name, spec):
    """With windows, without rotation, with frequencies of their own: only what all layers of one scaler would get."""
    hf = DECODERS[name]()
    try:
        expected = layer_by_layer(hf, spec)
        with rw.patch(hf, spec):
            assert difference(read(hf), expected) < TOLERANCE
    except ConfigError as error:
        assert "changes nothing: these layers" in str(error)
        return
    for runner in (compiled(hf), GpuRunner(hf, rotary_sites(hf), TorchOps())):
        runner.use(parse(spec), None)
        assert difference(in_chunks(runner, [50, 1, 3]), expected) < TOLERANCE


@pytest.mark.parametrize("spec", ["yarn:2", "rerope:20", "self-extend:4,window=20", "logn", "dynamic-ntk"])
def test_the_same_scaler_for_all_layers_is_the_scaler_itself(llama3, runners, spec):
    scaler, parts = parse(spec), parse(f"{spec}@0|{spec}@1|{spec}@2-")
    for runner in runners:
        for sizes in CHUNKS.values():
            runner.use(scaler, LENGTH)
            expected = in_chunks(runner, sizes)
            runner.use(parts, LENGTH)
            assert torch.equal(in_chunks(runner, sizes), expected)
    if scaler.member("positions"):
        with rw.patch(llama3, scaler):
            expected = read(llama3)
        with rw.patch(llama3, parts):
            assert torch.equal(read(llama3), expected)


def test_the_same_scaler_for_all_layers_has_one_rotation(llama3, runners):
    for runner in runners:
        runner.use(parse("yarn:2@0|yarn:2@1-"), None)
        assert len(runner._rotations) == 1
        runner.use(parse("yarn:2@1"), None)
        assert len(runner._rotations) == 2


@pytest.mark.parametrize("after", ["yarn:4@0|rerope:20@1", "logn@0|yarn:2@1", "none"])
@pytest.mark.parametrize("before", ["none", "yarn:2@1", "rerope:20@0|yarn:4@1"])
def test_the_keys_of_every_layer_rotate_to_its_scaler(model, untouched, before, after):
    """The keys under a scaler that all layers share, which other tests compare with a text that is read again."""
    model.rope = before
    session = model.session()
    session.append(TEXT * 4)
    tokens = session.tokens
    model.rope = after
    changed = session.fork()
    changed.append(MORE)
    for layer in range(len(model.hf.model.layers)):
        model.rope = parse(after).on(layer)
        uniform = session.fork()
        uniform.append(MORE)
        one, other = (each._cached.cache.layers[layer] for each in (changed, uniform))
        assert torch.equal(one.key_rows(0, tokens), other.key_rows(0, tokens))
    model.rope = before
    changed.append(MORE)
    assert cache_difference(changed._cached.cache, session._cached.cache, tokens) < 1e-5


@pytest.mark.parametrize("spec", ["yarn:4@0|rerope:20@1", "self-extend:4,window=16@1|logn"])
def test_a_session_is_cropped_forked_and_saved(model, untouched, tmp_path, spec):
    model.rope = spec
    assert f"rope     {spec}" in model.describe()
    session = model.session()
    session.append(TEXT * 4 + MORE)
    session.save(tmp_path / "s")
    expected = session.fork().generate("x = ", greedy(4))
    session.crop(session.tokens - 20)
    check_cache(model, session)
    loaded = model.session(tmp_path / "s")
    assert loaded.generate("x = ", greedy(4)).token_ids == expected.token_ids
    check_cache(model, loaded)
    again = model.session()
    again.append(TEXT * 4 + MORE)
    again.generate("x = ", greedy(4))
    assert cache_difference(loaded._cached.cache, again._cached.cache, loaded.tokens) < 1e-5


def test_factor_1_is_the_untouched_model(llama3, runners):
    ids = IDS[:, :60]
    for runner in runners:
        runner.use(parse("none"), None)
        expected = in_chunks(runner, [1000], ids)
        runner.use(parse("yarn:1@0|ntk:1@1|logn@2"), None)
        assert torch.equal(in_chunks(runner, [1000], ids), expected)


def test_a_patch_says_what_every_layer_has(llama3):
    with rw.patch(llama3, "yarn:4@1-|rerope:20@2") as handle:
        text = handle.describe()
    assert "layers 0  none: factor on cos and sin 1\n" in text
    assert "layers 1  yarn:4: factor on cos and sin 1.13863\n" in text
    assert "layers 2  yarn:4|rerope:20: bands near, far, factor on cos and sin 1.13863\n" in text
    assert "reach     64 tokens (trained: 64)" in text


@pytest.mark.parametrize("spec", ["yarn:2@3", "yarn:2@0-3", "yarn:2@0/7-", "logn@1/5"])
def test_layers_that_the_model_does_not_have(llama3, spec):
    with pytest.raises(ConfigError, match=f"{spec}: the model has the layers 0 to 2 only"):
        rw.patch(llama3, spec)
    with rw.patch(llama3, "yarn:2@2-"):
        pass


@pytest.mark.parametrize("spec", ["yarn:2@0|yarn:4@2", "rerope:20@0", "logn@1"])
def test_layers_in_which_a_scaler_changes_nothing(spec):
    types = ["sliding_attention", "sliding_attention", "full_attention"]
    fields = {"num_hidden_layers": 3, "layer_types": types, "sliding_window": 24}
    with pytest.raises(ConfigError, match="changes nothing: these layers of Gemma3ForCausalLM see a sliding window"):
        rw.patch(build("gemma3_text", fields), spec)


def test_numbers_that_all_layers_share():
    """The scale of latent attention follows from rope_parameters."""
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    hf = build("deepseek_v3", {"rope_parameters": {**yarn, "mscale": 1.0, "mscale_all_dim": 1.0}})
    with pytest.raises(UnsupportedModel, match="for all layers at once, and yarn:8@1 differs by layer"):
        rw.patch(hf, "yarn:8@1")


@pytest.mark.parametrize("target", ["hf", "vllm", "sglang", "llama.cpp", "ollama"])
@pytest.mark.parametrize("spec", ["yarn:2@0|yarn:4@1-", "yarn:4|logn@1", "rerope:64@1"])
def test_no_file_holds_a_scaler_that_differs_by_layer(tiny_folder, tmp_path, spec, target):
    with pytest.raises(ConfigError, match="differs by layer"):
        rw.export(tiny_folder, tmp_path / "out", target=target, rope=spec)
    assert not (tmp_path / "out").exists()
