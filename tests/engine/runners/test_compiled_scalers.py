"""Scalers by the compiled kernels, beyond the trained length, compared with the same model patched."""

import itertools

import pytest
from decoders import (
    DECODERS,
    IDS,
    LAYERED,
    LENGTH,
    LONGROPE,
    SPECS,
    TOLERANCE,
    compiled,
    difference,
    in_chunks,
    read,
    under,
)
from families import DEFAULT, build

import ropewalk as rw
from ropewalk.engine.patches.scaler_slot import ScalerSlot
from ropewalk.engine.rotary_site import rotary_sites
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.engine.runners.transformers import TransformersRunner

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning"),
]
CHUNKS = {"whole": [1000], "one by one": [1], "mixed": [50, 1, 1, MAX_STEP_TOKENS, 3, 30]}


@pytest.fixture(scope="module")
def llama_and_runner():
    hf = DECODERS["llama"]()
    return hf, compiled(hf)


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("spec", SPECS)
def test_llama_under_every_kind_of_scaler(llama_and_runner, spec, sizes):
    hf, runner = llama_and_runner
    with under(runner, hf, spec, LENGTH):
        expected = read(hf)
    assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


def test_the_logits_of_the_scalers_differ_clearly(llama_and_runner):
    _, runner = llama_and_runner
    logits = {}
    for spec in SPECS:
        runner.use(rw.scaling.parse(spec), LENGTH)
        logits[spec] = in_chunks(runner, [1000])
    for one in SPECS:
        for other in SPECS[: SPECS.index(one)]:
            assert difference(logits[one], logits[other]) > 100 * TOLERANCE, (one, other)


MIXED = ["yarn:4", "logn", "rerope:30|logn", "self-extend:4,window=30", "dual-chunk", "sink-window:30", "jet-long:20"]
MIXED += ["dpe:4/1,window=30"]
ODD = ["llama-3.1", "llama-one-head", "phi3", "olmo2", "gemma"]


@pytest.mark.parametrize(
    ("name", "spec"),
    [*itertools.product(LAYERED, MIXED), *itertools.product(ODD, ["yarn:4", "rerope:30|logn", "dual-chunk"])],
)
def test_layers_of_several_kinds_have_their_own_rotation(name, spec):
    hf = DECODERS[name]()
    if name == "phi3" and spec == "yarn:4":
        spec = "ntk:4"
    if name == "llama-3.1":
        spec = spec.replace("yarn:4", "yarn:8")  # its own scaling reaches four times as far
    runner = compiled(hf)
    with under(runner, hf, spec, LENGTH):
        expected = read(hf)
    assert difference(expected, read(hf)) > 1e-3 or name == "llama-3.1"
    for sizes in ([50, 1, 1, MAX_STEP_TOKENS, 3, 30], [1, 1, 5]):
        assert difference(in_chunks(runner, sizes), expected) < TOLERANCE


@pytest.mark.parametrize("spec", ["none", "logn", "rerope:20"])
@pytest.mark.parametrize("length", [60, LENGTH])
def test_frequencies_of_the_models_own_that_depend_on_length(spec, length):
    """Long Phi-3 models have one set of frequencies within the trained length, and another beyond it."""
    hf = build("phi3", LONGROPE)
    runner, ids = compiled(hf), IDS[:, :length]
    runner.use(rw.scaling.parse(spec), length)
    with rw.patch(hf, spec):
        expected = read(hf, ids)
    if spec != "none" and length > 64:  # the patch lets them grow with the text
        expected = in_chunks(runner, [1000], ids)
    for sizes in ([1000], [1], [20, 1]):
        assert difference(in_chunks(runner, sizes, ids), expected) < TOLERANCE


DYNAMIC = "llama", {"rope_parameters": {**DEFAULT, "rope_type": "dynamic", "factor": 2.0}}


@pytest.mark.parametrize("spec", ["none", "logn", "rerope:20"])
@pytest.mark.parametrize("length", [60, LENGTH])
@pytest.mark.parametrize("row", [("phi3", LONGROPE), DYNAMIC])
def test_the_modules_of_transformers_keep_the_frequencies_too(row, spec, length):
    """Without a scaler slot they would change frequencies in the middle of a text, and keep the old keys."""
    hf, ids, scaler = build(*row), IDS[:, :length], rw.scaling.parse(spec)
    kernels, modules = compiled(hf), TransformersRunner(hf)
    kernels.use(scaler, length)
    expected = read(build(*row), ids) if spec == "none" else in_chunks(kernels, [1000], ids)
    switch = ScalerSlot(hf, rotary_sites(hf), modules)
    switch.put(scaler)
    for sizes in ([1000], [1], [20, 1]):
        switch.prepare(scaler, length)
        assert modules.rope_state == (scaler, length)
        assert difference(in_chunks(modules, sizes, ids), expected) < TOLERANCE
        switch.prepare(scaler, None)
    switch.put(rw.scaling.Scaler())
    assert difference(read(hf), read(build(*row))) == 0


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("spec", ["none", "step-log:0.4,length=20", "rerope:20|logn", "yarn:8|temperature:1.2"])
def test_a_temperature_of_the_models_own_is_multiplied(spec, sizes):
    """transformers' module computes it from the position ids."""
    hf = DECODERS["ministral3"]()
    runner = compiled(hf)
    with under(runner, hf, spec, LENGTH):
        expected = read(hf)
    assert difference(in_chunks(runner, sizes), expected) < TOLERANCE
    hf.config.rope_parameters["llama_4_scaling_beta"] = 0.0
    with under(runner, hf, spec, LENGTH):
        assert difference(read(hf), expected) > 0.1
