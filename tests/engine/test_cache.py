"""The contiguous cache against concatenation."""

import torch
from transformers import LlamaConfig, MistralConfig
from transformers.cache_utils import DynamicCache

from ropewalk.engine.cache import ContiguousLayer, new_cache


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
    small = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 64}
    assert isinstance(new_cache(LlamaConfig(**small), 8).layers[0], ContiguousLayer)
    assert isinstance(new_cache(MistralConfig(**small, sliding_window=4), 8), DynamicCache)
