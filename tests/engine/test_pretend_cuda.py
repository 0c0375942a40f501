"""The pretended GPU refuses what CUDA refuses, and counts what a GPU would do."""

import pytest
import torch
from pretend_cuda import CudaTensor


def test_mixed_devices(cuda):
    on_device = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="same device"):
        on_device + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.cat([on_device, torch.ones(3)])
    with pytest.raises(RuntimeError, match="indices"):
        torch.ones(3)[torch.tensor([0], device="cuda:0")]
    with pytest.raises(RuntimeError, match="numpy"):
        on_device.numpy()
    assert (on_device + torch.tensor(1.0)).tolist() == [2, 2, 2]  # a number may be on the CPU


def test_counts(cuda):
    x = torch.tensor([1.0, 2.0], device="cuda:0")
    y = (x * 2)[:1]
    assert (cuda.uploads.total(), cuda.kernels.total(), cuda.syncs.total()) == (1, 1, 0)
    assert isinstance(y, CudaTensor) and y.device.type == "cuda"
    assert int(y) == 2 and bool(x.any()) and x.nonzero().shape == (2, 1)
    assert cuda.syncs.total() == 3
    assert x[torch.tensor([1])].tolist() == [2.0]
    assert cuda.uploads.total() == 2


def test_cpu_tensors_are_not_counted(cuda):
    assert torch.arange(3).sum().item() == 3
    assert not cuda.kernels and not cuda.syncs and not cuda.uploads
