"""Small caches of the compiled kernels, and what is in them."""

import torch

from ropewalk.engine.kv_cache import CacheShape


def shape(dtype=torch.float32, folder=None, dim=16):
    return CacheShape(layers=3, heads=2, dim=dim, dtype=dtype, folder=folder)


def states(count, seed=0, dim=16):
    return torch.randn(1, 2, count, dim, generator=torch.Generator().manual_seed(seed))


def fill(cache, count, seed=0):
    for index, layer in enumerate(cache.layers):
        layer.update(states(count, seed + index), -states(count, seed + index))


def rows(cache, count):
    return [getattr(layer, name)[:, :, :count].clone() for layer in cache.layers for name in layer.buffers]


def unchanged(cache, before, count):
    return all(torch.equal(a, b) for a, b in zip(rows(cache, count), before, strict=True))
