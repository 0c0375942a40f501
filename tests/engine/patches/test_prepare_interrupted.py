"""Ctrl-C while a scaler is prepared for another length: the next request gets its own frequencies."""

import pytest
from live import TEXT

import ropewalk as rw
from ropewalk.engine.patches.derived import DerivedNumbers
from ropewalk.engine.runners import decoder_runner
from ropewalk.engine.runners.runner import Runner

STAGES = {
    "frequencies are written": (DerivedNumbers, "apply"),
    "the runner is told": (Runner, "use"),
    "the angles are computed": (decoder_runner, "RotationTable"),
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("compile", [True, False], ids=["compiled", "modules"])
@pytest.mark.parametrize("spec", ["dynamic-ntk", "dynamic-yarn|logn"])
def test_the_next_request_has_its_own_frequencies(tiny_folder, monkeypatch, stage, compile, spec):
    if stage == "the angles are computed" and not compile:
        pytest.skip("transformers' modules compute them in every call")
    model = rw.load(tiny_folder, spec, max_length=4096, compile=compile)
    long = TEXT * 12
    expected = [model.score(text).logprobs for text in (TEXT, long)]
    model.score(TEXT)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], interrupt)
        with pytest.raises(KeyboardInterrupt):
            model.score(long)
    for text, logprobs in zip((TEXT, long), expected, strict=True):
        assert (model.score(text).logprobs - logprobs).abs().max() == 0
