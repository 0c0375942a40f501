"""16-bit models in float32 arithmetic, and the checks of a patch that use it."""

import copy

import pytest
import torch
from decoders import DECODERS, compiled, difference, in_bfloat16, noisy
from families import FAMILIES

import ropewalk as rw
from ropewalk.engine.attention import banded
from ropewalk.engine.patches import band_patch
from ropewalk.engine.patches.float32 import float32_arithmetic
from ropewalk.engine.patches.probe import logits
from ropewalk.errors import UnsupportedModel

# A layer that reads a weight of its child, a cast to the head's dtype, convolutions, states, experts, and usual ones.
ALL_KINDS = ("llama", "deepseek_v32", "hy_v4", "lfm2", "bamba", "mixtral", "gpt_oss", "gemma3n_text", "qwen3_next")


def tensors(model):
    return {
        id(tensor) for module in model.modules() for tensor in [*module._parameters.values(), *module._buffers.values()]
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL_KINDS)
def test_logits_are_those_of_a_float32_copy_and_the_tensors_come_back(name, dtype):
    model = FAMILIES[name]().eval()
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    held, before = tensors(model), logits(model)
    with float32_arithmetic(model):
        widened = logits(model)
    assert widened.dtype == torch.float32
    assert torch.equal(widened, logits(copy.deepcopy(model).float()))
    assert not torch.equal(widened, before.float())
    assert tensors(model) == held and torch.equal(logits(model), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_error_inside_restores_the_tensors():
    model = in_bfloat16(DECODERS["llama"]())
    held = tensors(model)
    model.model.layers[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), float32_arithmetic(model):
        logits(model)
    assert tensors(model) == held


def test_a_model_that_is_in_float32_already_is_left_alone():
    model = DECODERS["llama"]()
    held = tensors(model)
    with float32_arithmetic(model):
        assert tensors(model) == held


@pytest.fixture
def short_products():
    """Rounds products of float32 matrices to bfloat16, if the CPU can, as a program may have set it."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


def test_checks_do_not_depend_on_the_matmul_precision(short_products):
    set_to = torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    a = torch.randn(256, 256, generator=torch.manual_seed(0))
    exact = a.double() @ a.double()
    for cast in (lambda hf: hf, in_bfloat16):
        model = cast(DECODERS["llama"]())
        assert compiled(model).is_compiled
        with rw.patch(model, "rerope:20"):
            pass
        with float32_arithmetic(model):
            assert difference(a @ a, exact) < 1e-6
    assert set_to == (torch.backends.mkldnn.matmul.fp32_precision, torch.backends.cuda.matmul.fp32_precision)


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3", "olmo2"])
def test_a_map_is_patched_into_a_model_with_noisy_arithmetic(name):
    model = noisy(DECODERS[name]())
    with rw.patch(model, "rerope:20"):
        pass


def test_an_attention_that_is_wrong_by_a_hundredth_is_refused_in_bfloat16(monkeypatch):
    def wrong(*args, **kwargs):
        return banded.banded_attention(*args, **kwargs) * 1.01

    monkeypatch.setattr(band_patch, "banded_attention", wrong)
    with pytest.raises(UnsupportedModel, match="in a way that ropewalk does not reproduce"):
        rw.patch(in_bfloat16(DECODERS["llama"]()), "rerope:20")


def test_a_model_with_rounded_frequencies_is_patched_too():
    exact, rounded = DECODERS["llama"](), DECODERS["llama"]().bfloat16()
    with rw.patch(rounded, "rerope:20"), rw.patch(exact, "rerope:20"):
        assert difference(logits(rounded).float(), logits(exact)) < 0.1
