"""The contiguous cache against concatenation."""

from types import SimpleNamespace

import pytest
import torch
from kv_caches import shape
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from ropewalk import OutOfMemory, PatchError
from ropewalk.engine import cache as caches
from ropewalk.engine.cache import (
    CacheLost,
    ContiguousLayer,
    UnrotatedLayer,
    adopt,
    attends_to_everything,
    cache_bytes,
    can_rewind,
    evict,
    is_lack_of_memory,
    layers_agree,
    most_held,
    new_cache,
    restoring,
    rewind,
    tokens_read,
)
from ropewalk.engine.kv_cache import KVCache
from ropewalk.engine.rotated_keys import RotatedKeys

SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}


def test_holds_what_was_appended_and_grows():
    layer, pieces = ContiguousLayer(capacity=4), []
    for n in (1, 3, 5, 2):
        pieces.append(torch.randn(1, 2, n, 8))
        keys, values = layer.update(pieces[-1], -pieces[-1])
        assert torch.equal(keys, torch.cat(pieces, 2))
        assert torch.equal(values, -torch.cat(pieces, 2))
    assert layer.get_seq_length() == 11
    assert layer.capacity >= 11


def test_a_step_does_not_move_the_buffer():
    layer = ContiguousLayer(capacity=16)
    first, _ = layer.update(torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8))
    second, _ = layer.update(torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8))
    assert first.data_ptr() == second.data_ptr()


def test_crop_forgets_the_end():
    layer = ContiguousLayer(capacity=8)
    states = torch.randn(1, 1, 6, 8)
    layer.update(states, states)
    layer.crop(-2)
    keys, _ = layer.update(states[:, :, :1], states[:, :, :1])
    assert torch.equal(keys, torch.cat([states[:, :, :4], states[:, :, :1]], 2))
    layer.crop(0)
    assert layer.get_seq_length() == 5


def test_models_with_windows_keep_transformers_cache():
    assert isinstance(new_cache(LlamaConfig(**SMALL), 8).layers[0], UnrotatedLayer)
    windows = new_cache(MistralConfig(**SMALL, sliding_window=4), 8)
    assert [type(layer) for layer in windows.layers] == [DynamicSlidingWindowLayer] * 2


def test_a_window_that_the_model_does_not_know_drops_no_keys():
    config = LlamaConfig(**SMALL, sliding_window=4)  # as in a Mistral that was converted
    assert [type(layer) for layer in new_cache(config, 8).layers] == [UnrotatedLayer] * 2
    assert config.sliding_window == 4


def states(n, rows=1):
    return torch.randn(rows, 2, n, 8)


def rotating(calls):
    """Rotated keys are keys times 10; `calls` are the parts that were rotated."""

    def rotate(start, stop):
        calls.append((start, stop))
        return 10 * rotate.keys[:, :, start:stop]

    return rotate


def test_rotated_keys_get_their_room_at_once():
    """They do not grow at the first token after a prompt, which would take twice their memory and a copy."""
    layer, calls = UnrotatedLayer(capacity=20), []
    rotate = rotating(calls)
    for count in (12, 1, 1):
        keys, _ = layer.update(states(count), states(count))
        rotate.keys = keys
        layer.rotated.get("a", 0, keys, rotate)
        assert [copy.shape[2] for copy in layer.rotated.tensors] == [20]
    assert calls == [(0, 12), (12, 13), (13, 14)]


def test_turned_keys_are_made_once_and_extended():
    held, calls = RotatedKeys(), []
    held.capacity = 6
    rotate = rotating(calls)
    rotate.keys = states(20)
    for length in (3, 4, 4, 9):
        held.capacity = 6 if length < 6 else 12  # as the layer grows
        assert torch.equal(held.get("a", 0, rotate.keys[:, :, :length], rotate), 10 * rotate.keys[:, :, :length])
    assert calls == [(0, 3), (3, 4), (4, 9)]
    assert [copy.shape[2] for copy in held.tensors] == [12]
    held.get("a", 1, rotate.keys[:, :, :2], rotate)  # another band
    held.get("a", 0, rotate.keys[:, :, :9], rotate)
    assert calls[3:] == [(0, 2)]
    held.crop(5)
    held.get("a", 1, rotate.keys[:, :, :2], rotate)
    assert torch.equal(held.get("a", 0, rotate.keys[:, :, :9], rotate), 10 * rotate.keys[:, :, :9])
    assert calls[4:] == [(5, 9)]
    held.get("b", 0, rotate.keys[:, :, :2], rotate)
    assert calls[5:] == [(0, 2)]
    assert len(held.tensors) == 1
    held.get("b", 0, rotate.keys[:, :, :2], rotate)
    assert len(calls) == 6
    held.clear()
    assert held.tensors == []
    held.get("b", 0, rotate.keys[:, :, :2], rotate)
    assert calls[6:] == [(0, 2)]


def test_rows_are_chosen_repeated_and_put_in_order():
    layer, given, rotate = UnrotatedLayer(capacity=4), states(3, rows=2), rotating([])
    for change in (layer.reorder_cache, layer.batch_select_indices, layer.batch_repeat_interleave):
        change(torch.tensor([0]))  # nothing is held yet
    layer.update(given, -given)
    rotate.keys = given
    layer.rotated.get("a", 0, given, rotate)
    layer.reorder_cache(torch.tensor([1, 0]))
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([0, 2, 3]))
    expected = given[[1, 0, 0]]
    assert torch.equal(layer.keys[:, :, :3], expected)
    assert torch.equal(layer.values[:, :, :3], -expected)
    assert torch.equal(layer.rotated.tensors[0][:, :, :3], 10 * expected)


def test_room_is_doubled_and_what_is_held_stays():
    layer, given = UnrotatedLayer(), states(3)
    assert (layer.capacity, layer.length, layer.evicted, layer.needed) == (256, 0, 0, 0)
    layer.reserve(256)
    assert layer.capacity == 256
    layer.reserve(257)
    assert layer.capacity == 512
    layer = UnrotatedLayer(capacity=3)
    layer.update(given, -given)
    assert layer.is_initialized
    assert layer.keys.shape[2] == 3
    assert (layer.dtype, layer.device) == (given.dtype, given.device)
    layer.reserve(4)
    assert layer.capacity == layer.keys.shape[2] == layer.values.shape[2] == 6
    layer.reserve(100)
    assert layer.capacity == layer.keys.shape[2] == 100
    keys, values = layer.update(given, -given)
    assert torch.equal(keys, torch.cat((given, given), 2))
    assert torch.equal(values, -keys)
    assert keys.rotated is layer.rotated
    assert layer.get_mask_sizes(5) == (11, 0)
    assert layer.get_max_length() == -1
    assert layer.is_croppable
    assert not layer.is_sliding


def test_crop_and_reset_forget_turned_keys_too():
    layer, given, calls = UnrotatedLayer(), states(6), []
    rotate = rotating(calls)
    rotate.keys = given
    layer.update(given, given)
    layer.rotated.get("a", 0, given, rotate)
    layer.crop(-2)
    assert layer.length == 4
    layer.rotated.get("a", 0, given, rotate)
    assert calls == [(0, 6), (4, 6)]
    for wrong in (1, -5):
        with pytest.raises(AssertionError):
            layer.crop(wrong)
    layer.crop(-4)
    assert layer.length == 0
    layer.update(given, given)
    layer.evict(1, 2, 3)
    layer.rotated.get("a", 0, given[:, :, :4], rotate)
    layer.reset()
    assert (layer.length, layer.evicted, layer.rotated.tensors) == (0, 0, [])


def test_keys_are_dropped_behind_the_first_ones():
    layer, given, calls = UnrotatedLayer(capacity=16), states(10), []
    rotate = rotating(calls)
    rotate.keys = given
    layer.update(given, -given)
    layer.rotated.get("a", 0, given, rotate)
    layer.evict(2, 3, 6)
    remaining = torch.cat((given[:, :, :2], given[:, :, 5:]), 2)
    assert (layer.length, layer.evicted, layer.needed, layer.capacity) == (7, 3, 6, 16)
    assert torch.equal(layer.keys[:, :, :7], remaining)
    assert torch.equal(layer.values[:, :, :7], -remaining)
    rotate.keys = remaining
    assert torch.equal(layer.rotated.get("a", 0, remaining, rotate), 10 * remaining)
    assert calls == [(0, 10), (2, 7)]
    layer.evict(2, 1, 6)
    assert layer.evicted == 4


@pytest.mark.parametrize("kind", [ContiguousLayer, UnrotatedLayer])
def test_rotated_keys_move_up_as_they_are_given(kind):
    layer, given, moved = kind(capacity=16), states(10), states(5)
    layer.update(given, -given)
    layer.evict(2, 3, 6, moved)
    assert torch.equal(layer.keys[:, :, :7], torch.cat((given[:, :, :2], moved), 2))
    assert torch.equal(layer.values[:, :, :7], -torch.cat((given[:, :, :2], given[:, :, 5:]), 2))


def filled(tokens, layers=2, capacity=16):
    cache = new_cache(LlamaConfig(**SMALL), capacity)
    for index in range(layers):
        given = states(tokens)
        cache.update(given, given, index)
    return cache


def test_many_keys_are_dropped_at_once_and_the_end_stays():
    (first, last), most = (4, 64), most_held((4, 64))
    assert most == 68 + caches.SPARE + caches._STRIDE
    assert most_held((4, 5000)) == 5004 + caches.SPARE + 5000
    cache = filled(most - 1)
    evict(cache, (first, last))
    assert cache.get_seq_length() == most - 1
    cache = filled(most)
    given = [layer.keys.clone() for layer in cache.layers]
    evict(cache, (first, last))
    for layer, keys in zip(cache.layers, given, strict=True):
        assert torch.equal(layer.keys[:, :, : layer.length], keys[:, :, [*range(4), *range(1028, most)]])
    assert [layer.length for layer in cache.layers] == [68 + caches.SPARE] * 2
    assert [layer.evicted for layer in cache.layers] == [caches._STRIDE] * 2
    assert [layer.needed for layer in cache.layers] == [67] * 2
    assert tokens_read(cache) == tokens_read(cache.layers[1]) == most
    assert can_rewind(cache, caches.SPARE + 1)
    assert not can_rewind(cache, caches.SPARE + 2)
    rewind(cache, caches.SPARE + 1)
    assert cache.get_seq_length() == 67
    rewind(cache, 0)
    with pytest.raises(
        PatchError, match=r"the last 1 tokens of this cache .* dropped\) cannot be rewound; give a new cache"
    ):
        rewind(cache, 1)
    wide = filled(5004 + caches.SPARE + 4999)
    evict(wide, (4, 5000))
    assert wide.layers[0].evicted == 0


def test_every_layer_is_asked_for_its_rotated_keys():
    cache, moved, asked = filled(most_held((4, 64))), states(64 + caches.SPARE), []

    def rotated(*place):
        asked.append(place)
        return moved + place[0]

    evict(cache, (4, 64), rotated)
    assert asked == [(0, 4, caches._STRIDE), (1, 4, caches._STRIDE)]
    for index, layer in enumerate(cache.layers):
        assert torch.equal(layer.keys[:, :, 4 : layer.length], moved + index)


def test_caches_of_other_kinds_are_left_alone():
    windows = new_cache(MistralConfig(**SMALL, sliding_window=4), 8)
    given = states(2000)
    for index in range(2):
        windows.update(given, given, index)
    evict(windows, (4, 8))
    assert tokens_read(windows) == 2000
    assert not can_rewind(windows)
    empty = DynamicCache()
    assert can_rewind(empty)
    assert tokens_read(empty) == 0
    adopt(empty, 32)
    assert empty.layer_class_to_replicate is UnrotatedLayer
    empty.update(given, given, 0)
    assert type(empty.layers[0]) is UnrotatedLayer
    assert can_rewind(empty, 2000)  # nothing was dropped, so nothing is needed
    full = DynamicCache(config=LlamaConfig(**SMALL))
    full.update(given, given, 0)
    adopt(full, 32)
    assert [type(layer) for layer in full.layers] == [DynamicLayer, UnrotatedLayer]  # one holds keys already
    assert full.layers[1].capacity == 32
    plain = DynamicCache(config=LlamaConfig(**SMALL))
    adopt(plain)
    assert plain.layers[0].capacity == 256
    mixed = new_cache(LlamaConfig(**SMALL), 8)
    mixed.layers[1] = windows.layers[1]
    assert not can_rewind(mixed)


def test_which_models_attend_to_everything():
    assert attends_to_everything(LlamaConfig(**SMALL))
    assert not attends_to_everything(MistralConfig(**SMALL, sliding_window=4))
    assert attends_to_everything(MistralConfig(**SMALL, sliding_window=None))
    assert not attends_to_everything(SimpleNamespace(layer_types=["full_attention", "sliding_attention"]))
    assert attends_to_everything(SimpleNamespace(layer_types=["full_attention"] * 2, sliding_window=4))
    assert attends_to_everything(LlamaConfig(**SMALL, sliding_window=4))
    assert attends_to_everything(SimpleNamespace())


def test_bytes_are_those_of_buffers_and_rotated_keys():
    cache = filled(10, capacity=16)
    layer_bytes = 2 * 16 * 8 * 4
    assert cache_bytes(cache) == 4 * layer_bytes
    rotate = rotating([])
    rotate.keys = cache.layers[0].keys
    cache.layers[0].rotated.get("a", 0, rotate.keys, rotate)
    assert cache_bytes(cache) == 5 * layer_bytes
    assert cache_bytes(new_cache(LlamaConfig(**SMALL), 8)) == 0
    plain = DynamicCache()
    plain.update(states(10), states(10), 0)
    assert cache_bytes(plain) == 2 * 2 * 10 * 8 * 4
    assert cache_bytes(KVCache(shape(torch.int8), 16)) == 16 * shape(torch.int8).bytes_per_token  # with its scales


LACKS = [
    MemoryError(),
    torch.OutOfMemoryError("no words that are known"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", LACKS, ids=str)
def test_a_step_without_memory_leaves_the_caches_as_they_were(error):
    cache, other = filled(10), filled(6)
    with pytest.raises(OutOfMemory, match="out of memory after 16 tokens; shorten") as raised, restoring(cache, other):
        cache.update(states(3), states(3), 0)  # the second layer does not come to it
        raise error
    assert raised.type is OutOfMemory
    assert [layer.length for held in (cache, other) for layer in held.layers] == [10, 10, 6, 6]


def test_other_errors_leave_a_step_as_it_is():
    cache = filled(10)
    with pytest.raises(RuntimeError, match="shapes do not match"), restoring(cache):
        cache.update(states(3), states(3), 0)
        raise RuntimeError("shapes do not match")
    assert cache.layers[0].length == 13


def test_an_error_that_follows_from_a_lack_of_memory_is_one():
    error = RuntimeError("the capture failed")
    assert not is_lack_of_memory(error)
    error.__context__ = torch.OutOfMemoryError()
    assert is_lack_of_memory(error)


def test_a_cache_that_cannot_go_back_is_lost():
    torn = filled(most_held((4, 64)))
    torn.layers[0].evict(4, 100, 0)
    assert layers_agree(filled(3)) and not layers_agree(torn)
    windows = new_cache(MistralConfig(**SMALL, sliding_window=4), 8)
    for cache in (torn, windows):
        with pytest.raises(CacheLost), restoring(cache):
            raise MemoryError
