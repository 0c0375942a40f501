"""The compiled kernels hold every key once, rotated as the bands of most keys read it."""

import pytest
import torch
from decoders import DECODERS, IDS, compiled, difference, in_chunks
from live import greedy

import ropewalk as rw
from ropewalk.engine import cache as caches
from ropewalk.engine.cache import cache_bytes

pytestmark = [
    pytest.mark.usefixtures("freed_memory_is_overwritten"),
    pytest.mark.filterwarnings("ignore:.*some distances are longer than in training:UserWarning"),
]
LENGTH = 140  # models are trained at 64
MAPS = [
    "rerope:20",
    "leaky-rerope:20,k=4",
    "self-extend:4,window=20",
    "dual-chunk",
    "string:20,window=4",
    "jet-long:20",
    "dpe:4/1/8/2,window=20",
    "self-logistic:20,rate=0.2,capacity=6",
    "sink-window:30",
    "yarn:2|rerope:20|logn",
]


@pytest.fixture(scope="module")
def runners():
    hf = DECODERS["llama"]()
    return {kind: compiled(hf, cache=kind) for kind in ("float32", "bfloat16", "int8")}


@pytest.mark.parametrize("sizes", [[1000], [1], [50, 1, 1, 16, 3, 30]], ids=str)
@pytest.mark.parametrize("spec", MAPS)
@torch.inference_mode()
def test_a_rounded_cache_under_a_map_is_close_to_an_exact_one(runners, spec, sizes):
    logits = {}
    for kind, runner in runners.items():
        runner.use(rw.parse(spec), LENGTH)
        logits[kind] = in_chunks(runner, sizes)
    for kind, most in (("bfloat16", 0.03), ("int8", 0.1)):
        error = (logits[kind] - logits["float32"]).norm() / logits["float32"].norm()
        assert 1e-4 < error < most, kind


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("spec", MAPS)
@torch.inference_mode()
def test_a_cache_under_a_map_takes_the_memory_of_a_plain_one(runners, spec, kind):
    runner, bytes_held = runners[kind], []
    for each in ("none", spec):
        runner.use(rw.parse(each), LENGTH)
        cache = runner.new_cache(LENGTH)
        in_chunks(runner, [100, 1], IDS[:, :LENGTH], cache)
        bytes_held.append(cache_bytes(cache))
    assert bytes_held == [LENGTH * runner.bytes_per_token] * 2


@pytest.mark.parametrize("spec", ["rerope:64", "self-extend:4,window=64", "dual-chunk"])
def test_the_first_token_after_a_long_prompt_makes_no_buffers(tiny_folder, spec):
    model = rw.load(tiny_folder, spec, max_length=8192, compile=True)
    ids, cache = [1 + 7 * n % 1000 for n in range(4096)], model.new_cache(4096 + 8)
    held = cache_bytes(cache)
    places = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    model.generate_ids(ids, greedy(4), cache)
    assert cache_bytes(cache) == held == (4096 + 8) * model.bytes_per_token
    assert [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers] == places


@pytest.mark.parametrize("spec", MAPS)
def test_only_narrow_bands_with_a_key_map_of_their_own_rotate_stored_keys(runners, spec):
    runner = runners["float32"]
    runner.use(rw.parse(spec), LENGTH)
    (table,) = runner._rotations
    wide = max(range(len(table.bands)), key=lambda band: table.visible(10_000)[band][2])
    assert table.shifts(wide, 10) is None
    rotating = [band.name for n, band in enumerate(table.bands) if table.shifts(n, 10) is not None]
    assert rotating == ([] if spec.startswith(("dual-chunk", "string", "sink-window")) else ["near"])


@pytest.mark.parametrize(
    "spec", ["rerope:20", "self-extend:4,window=20", "dpe:4/2,window=20", "dynamic-yarn|jet-long:20"]
)
@torch.inference_mode()
def test_shifts_lead_from_the_stored_position_to_that_of_the_band(runners, spec):
    runner = runners["float32"]
    runner.use(rw.parse(spec), LENGTH)
    (table,) = runner._rotations
    near = table.bands[0]
    assert near.name == "near"
    table.shifts(0, 3)
    rows = torch.from_numpy(table.shifts(0, 200))  # grown
    j = torch.arange(len(rows))
    stored = table.stored(j) if "dpe" in spec else table.stored(j)[:, None]
    angle = (near.key(j)[:, None] - stored) * table.frequencies.inv_freq
    assert len(rows) >= 200
    assert torch.allclose(rows, torch.stack((angle.cos(), angle.sin()), 1).float(), atol=1e-6)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@torch.inference_mode()
def test_keys_that_move_up_are_rotated(runners, kind, monkeypatch):
    monkeypatch.setattr(caches, "SPARE", 4)
    monkeypatch.setattr(caches, "_STRIDE", 8)
    runner = runners[kind]
    runner.use(rw.parse("sink-window:16"), None)
    expected = in_chunks(runner, [1000])
    cache = runner.new_cache(LENGTH)
    got = in_chunks(runner, [30, *[3] * 12, *[1] * 30, 44], cache=cache)
    assert cache.layers[0].evicted > 60
    assert difference(got, expected) < {"float32": 5e-5, "bfloat16": 0.1, "int8": 0.2}[kind]
