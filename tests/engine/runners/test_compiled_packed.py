"""A small Llama whose matrices are blocks of many formats, compared with transformers on the unpacked weights."""

import copy

import numpy as np
import pytest
import torch
from decoders import IDS, compiled, difference, in_chunks, read
from families import build
from gguf import GGMLQuantizationType
from kernel_data import FORMATS, packed
from torch import nn

from ropewalk.engine.packed import PackedEmbedding, PackedLinear, PackedWeight
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.errors import UnsupportedModel

pytestmark = pytest.mark.usefixtures("freed_memory_is_overwritten")
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "attention_bias": True,
}


def mixed(formats, family="llama", **sizes):
    """A model whose linear layers and embedding are of the formats in turn, and the same with float32 weights."""
    plain = build(family, {**SIZES, **sizes})
    hf, random = copy.deepcopy(plain), np.random.default_rng(0)
    names = [name for name, module in plain.named_modules() if isinstance(module, (nn.Linear, nn.Embedding))]
    for n, name in enumerate(names):
        module = plain.get_submodule(name)
        weight, values = packed(random, formats[n % len(formats)], *module.weight.shape)
        module.weight = nn.Parameter(torch.from_numpy(values), requires_grad=False)
        if isinstance(module, nn.Embedding):
            hf.set_submodule(name, PackedEmbedding(weight))
        else:
            hf.set_submodule(name, PackedLinear(weight, None if module.bias is None else module.bias.detach()))
    return hf, plain


@pytest.fixture(scope="module", params=["mixed", "Q4_K", "Q5_0", "phi3"])
def served(request):
    formats = FORMATS if request.param in ("mixed", "phi3") else [request.param]
    hf, plain = mixed(formats, "phi3" if request.param == "phi3" else "llama")
    return compiled(hf, cache="float32"), plain


@pytest.mark.parametrize("sizes", [[1], [1000], [MAX_STEP_TOKENS], [40, 3, 1, 17]], ids=str)
def test_logits_are_those_of_the_unpacked_weights_in_any_chunks(served, sizes):
    runner, plain = served
    assert difference(in_chunks(runner, sizes), read(plain)) < 2e-5


def test_greedy_tokens_are_those_of_transformers(served):
    runner, plain = served
    text = IDS[:, :30]
    expected = plain.generate(text, max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0)[0].tolist()
    tokens, cache = text[0].tolist(), runner.new_cache(80)
    with torch.inference_mode():
        logits = runner.forward(tokens, cache, 1)
        while len(tokens) < len(expected):
            tokens.append(int(logits[-1].argmax()))
            logits = runner.forward(tokens[-1:], cache, 1)
    assert tokens == expected


def test_a_row_of_a_batch_has_the_bits_of_the_row_alone(served):
    runner, _ = served
    rows = []
    for n in range(9):
        cache = runner.new_cache(60)
        with torch.inference_mode():
            runner.forward(IDS[0, : 20 + n].tolist(), cache, 1)
        rows.append(([int(IDS[0, 20 + n])], cache))
    with torch.inference_mode():
        alone = torch.cat([runner.step([(ids, cache.fork())]) for ids, cache in rows])
        for count in (2, 4, 5, 9):
            batch = runner.step([(ids, cache.fork()) for ids, cache in rows[:count]])
            assert torch.equal(batch, alone[:count])


def test_the_runner_names_the_formats_and_keeps_its_cache_in_bfloat16():
    runner = compiled(mixed(["Q6_K", "Q4_K"])[0])
    assert runner.weights == "Q4_K + Q6_K"
    assert runner.precision == "Q4_K + Q6_K, bfloat16 cache, float32 arithmetic"
    assert "weights in Q4_K + Q6_K, cache in bfloat16" in runner.how
    assert runner.new_cache(1).layers[0].keys.dtype == torch.bfloat16


def test_packed_weights_may_be_rounded_to_int8():
    hf, plain = mixed(["Q8_0", "Q6_K"])
    logits = in_chunks(compiled(hf, weights="int8", cache="float32"), [20])
    assert torch.equal(logits, in_chunks(compiled(plain, weights="int8", cache="float32"), [20]))


def test_a_format_without_a_kernel_is_refused_by_name():
    hf, _ = mixed(["Q4_K"])
    layer = hf.model.layers[1].mlp
    layer.down_proj = PackedLinear(PackedWeight(torch.zeros(256, 2 * 84, dtype=torch.uint8), GGMLQuantizationType.Q2_K))
    with pytest.raises(UnsupportedModel, match="weights in the format Q2_K have no compiled form"):
        compiled(hf)


@pytest.mark.parametrize("where", ["head", "projection"])
def test_a_plain_layer_among_packed_ones_keeps_its_dtype(where):
    hf, plain = mixed(["Q4_K"])
    if where == "head":
        hf.lm_head = plain.lm_head
    else:
        hf.model.layers[0].self_attn.k_proj = plain.model.layers[0].self_attn.k_proj
    runner = compiled(hf, cache="float32", precision="float32")
    assert runner.weights == "Q4_K + float32"
    assert difference(in_chunks(runner, [1]), read(plain)) < 2e-5
