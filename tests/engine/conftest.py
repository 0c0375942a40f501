"""Fixtures that more than one file of engine tests uses."""

import ctypes

import pytest
from families import FAMILIES
from pretend_cuda import pretend_cuda

import ropewalk as rw


@pytest.fixture(scope="module")
def model(tiny_folder):
    """The tiny model in the compiled kernels, with room beyond its trained length."""
    return rw.load(tiny_folder, max_length=4096, compile=True)


@pytest.fixture
def untouched(model):
    """Every test finds the model without a scaler, whatever the one before it did."""
    yield
    model.rope = None


@pytest.fixture(scope="module")
def llama():
    return FAMILIES["llama"]()


@pytest.fixture(scope="module")
def llama64():
    return FAMILIES["llama"]().double()


@pytest.fixture
def freed_memory_is_overwritten():
    """So that a kernel which reads an array that numba has freed fails, and not only where another thread takes it."""
    mallopt, perturb = getattr(ctypes.CDLL(None), "mallopt", None), -6
    if mallopt is None:  # glibc only
        yield
        return
    mallopt(perturb, 165)
    yield
    mallopt(perturb, 0)


@pytest.fixture
def cuda():
    """A machine with one GPU, a pretended one."""
    with pretend_cuda() as device:
        yield device
