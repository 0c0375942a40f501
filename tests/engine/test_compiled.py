"""Every described family by the compiled network, in any chunks, against transformers' own logits."""

import pytest
from decoders import DECODERS, IDS, WINDOW, compiled, difference, in_chunks, read

from ropewalk.engine.compiled import FEW
from ropewalk.engine.family import FAMILIES

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*distances that were never trained are in use:UserWarning"),
]
TOLERANCE = 2e-5  # of the largest logit; float32 leaves 1e-6 to 5e-6
CHUNKS = {"whole": [1000], "one by one": [1], "small": [5, FEW, 1], "large": [FEW + 1, 30], "mixed": [40, 3, 1, 17, 16]}


@pytest.fixture(scope="module", params=DECODERS)
def served(request):
    hf = DECODERS[request.param]()
    return hf, compiled(hf), read(hf)


def test_every_described_family_is_here():
    assert {DECODERS[name]().config.model_type for name in DECODERS} == set(FAMILIES)


@pytest.mark.parametrize("sizes", CHUNKS.values(), ids=CHUNKS)
def test_logits_are_those_of_transformers_in_any_chunks(served, sizes):
    _, network, expected = served
    assert difference(in_chunks(network, sizes), expected) < TOLERANCE


def test_only_the_last_logits_that_are_asked_for_come(served):
    _, network, expected = served
    for count in (FEW, 60):
        for keep in (1, 3):
            found = network.forward(IDS[0, :count].tolist(), network.new_cache(1), keep)
            assert found.shape == (keep, expected.shape[1])
            assert difference(found, expected[count - keep : count]) < TOLERANCE


def test_windows_are_seen_by_the_text():
    """What the tests above show of windows: a model that ignored them would be far off."""
    hf = DECODERS["mistral"]()
    expected = read(hf)
    hf.config.sliding_window = WINDOW + 1
    assert difference(read(hf), expected) > 1e-2
