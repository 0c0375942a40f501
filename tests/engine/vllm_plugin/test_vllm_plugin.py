"""The plug-in for vLLM without vLLM: what it changes, what it refuses, and how it reads the description of a batch.

`make interop` runs it in vLLM.
"""

from __future__ import annotations

import json
import subprocess
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import ropewalk as rw
from ropewalk.engine.attention.paged import Chunk, PagedBatch, chunks_of
from ropewalk.engine.attention.paged_rope import PagedRope
from ropewalk.engine.vllm_plugin.register import register
from ropewalk.engine.vllm_plugin.vllm_objects import (
    architecture_of,
    check_config,
    check_layer,
    check_version,
    is_named_config,
    layout_of,
    texts_of,
)
from ropewalk.scaling.named_scaler import NamedScaler

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tiny-llama"


@pytest.fixture(scope="module")
def content(tmp_path_factory):
    out = tmp_path_factory.mktemp("named") / "out"
    rw.export(FOLDER, out, rope="rerope:64|logn", target="vllm", length="4x")
    return json.loads((out / "config.json").read_text())


def vllm_config(content, **changes):
    """What the plug-in reads of vLLM's configuration."""
    hf_config = SimpleNamespace(**content, to_dict=lambda: content, get_text_config=lambda: hf_config)
    found = SimpleNamespace(
        model_config=SimpleNamespace(hf_config=hf_config, hf_text_config=hf_config, use_mla=False, max_model_len=1024),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        speculative_config=None,
        device_config=SimpleNamespace(device_type="cpu"),
    )
    for path, value in changes.items():
        section, _, name = path.partition("__")
        setattr(getattr(found, section) if name else found, name or section, value)
    return found


@pytest.fixture
def vllm(monkeypatch, content):
    """As much of vLLM as the plug-in calls before a model is built."""
    backends = {}

    def get_rope(*args, **options):
        return args, options

    parts = {
        "vllm": {"__version__": "0.32.0"},
        "vllm.config": {"get_current_vllm_config": lambda: vllm_config(content)},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        "vllm.model_executor.layers.rotary_embedding": {"get_rope": get_rope},
        "vllm.v1": {},
        "vllm.v1.attention": {},
        "vllm.v1.attention.backends": {},
        "vllm.v1.attention.backends.registry": {
            "AttentionBackendEnum": SimpleNamespace(CPU_ATTN="CPU_ATTN"),
            "register_backend": backends.__setitem__,
        },
    }
    for name, values in parts.items():
        module = types.ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
        above, _, last = name.rpartition(".")
        if above:
            monkeypatch.setattr(sys.modules[above], last, module, raising=False)
    rotary = sys.modules["vllm.model_executor.layers.rotary_embedding"]
    return SimpleNamespace(rotary=rotary, get_rope=get_rope, backends=backends, module=sys.modules["vllm"])


def test_a_second_call_changes_nothing(vllm):
    register()
    replaced = vllm.rotary.get_rope
    register()
    assert vllm.rotary.get_rope is replaced is not vllm.get_rope and len(vllm.backends) == 1


def test_other_models_get_the_embedding_of_vllm(vllm):
    register()
    for parameters in (None, {"rope_type": "yarn", "factor": 4.0}):
        assert vllm.rotary.get_rope(64, 128, True, parameters, dtype="x") == (
            (64, 128, True, parameters),
            {"dtype": "x"},
        )
        assert vllm.rotary.get_rope(64, max_position=128, rope_parameters=parameters)[0][3] is parameters


def test_a_named_scaler_gets_queries_and_keys_as_they_are(vllm, content):
    register()
    embedding = vllm.rotary.get_rope(32, 1024, rope_parameters=content["rope_parameters"])
    q, k = torch.randn(3, 8), torch.randn(3, 4)
    assert all(torch.equal(x, y) for x, y in zip(embedding(torch.arange(3), q, k), (q, k), strict=True))


def test_another_version_is_refused_for_named_scalers_only(vllm, content):
    vllm.module.__version__ = "0.31.2"
    register()
    assert vllm.rotary.get_rope(64, 128)
    with pytest.raises(rw.UnsupportedModel, match=r"verified with vLLM 0\.32\.x, and this is 0\.31\.2"):
        vllm.rotary.get_rope(32, 1024, rope_parameters=content["rope_parameters"])


def test_a_model_whose_pairs_lie_otherwise_is_refused(vllm, content):
    register()
    with pytest.raises(rw.UnsupportedModel, match="in another way"):
        vllm.rotary.get_rope(32, 1024, is_neox_style=False, rope_parameters=content["rope_parameters"])


def test_the_entry_point_is_cheap_to_import():
    heavy = "{'torch', 'transformers', 'numba'} & set(sys.modules)"
    code = f"import sys, ropewalk.engine.vllm_plugin.register; sys.exit(repr({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("version", ["0.32.0", "v0.32.1", "0.32.1rc1+cpu"])
def test_verified_versions(version):
    check_version(version)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallel"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallel"),
        ({"model_config__use_mla": True}, "latent attention"),
        ({"model_config__disable_sliding_window": True}, "the option disable_sliding_window"),
        ({"cache_config__cache_dtype": "fp8_e4m3"}, "a cache of fp8_e4m3"),
        ({"speculative_config": SimpleNamespace(method="eagle")}, "speculative decoding with eagle"),
        ({"device_config": SimpleNamespace(device_type="cuda")}, "device cuda"),
    ],
)
def test_options_that_are_refused(content, changes, words):
    check_config(vllm_config(content))
    with pytest.raises(rw.UnsupportedModel, match=f"does not serve a named scaler with {words}"):
        check_config(vllm_config(content, **changes))


def test_an_option_that_vllm_lacks_is_not_in_use(content):
    config = vllm_config(content, parallel_config=SimpleNamespace())
    del config.device_config, config.model_config.use_mla
    check_config(config)


@pytest.mark.parametrize("names", [["GptOssForCausalLM"], None])
def test_architectures_that_were_not_verified_are_refused(content, names):
    found = names[0] if names else "a model without a name"
    with pytest.raises(rw.UnsupportedModel, match=f"not with {found}; "):
        check_config(vllm_config(content | {"architectures": names}))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("MistralForCausalLM", {"sliding_window": 64}, "MistralForCausalLM without sliding windows, not with them"),
        ("Qwen2ForCausalLM", {"layer_types": ["sliding_attention", "full_attention"]}, "Qwen2ForCausalLM without"),
        (
            "Gemma3ForCausalLM",
            {"layer_types": ["sliding_attention"] * 2},
            "with layers that see the whole text, not with a window",
        ),
    ],
)
def test_windows_that_were_not_verified_are_refused(name, fields, words):
    def config(**fields):
        return SimpleNamespace(architectures=[name], get_text_config=lambda: SimpleNamespace(**fields))

    assert not architecture_of(config(layer_types=["full_attention"], sliding_window=64)).interleaved
    with pytest.raises(rw.UnsupportedModel, match=words):
        architecture_of(config(**fields))


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"sinks": True}, "attention sinks of the model"),
        ({"alibi": True}, r"a linear bias on distances \(ALiBi\)"),
        ({"attn_type": "encoder"}, "attention of type encoder"),
        ({"cache_dtype": "fp8"}, "a cache of fp8"),
        ({"kv_shared": True}, "layers that share a cache"),
        ({"others": ["chunk_lookback"]}, "the options chunk_lookback of attention"),
    ],
)
def test_layers_that_are_refused(properties, words):
    for dtype in ("auto", "bfloat16", "float16", "float32"):
        check_layer(cache_dtype=dtype)
    with pytest.raises(rw.UnsupportedModel, match=rf"with {words}\. Export"):
        check_layer(**properties)


def test_only_configs_that_name_a_scaler_are_taken(content):
    assert is_named_config(vllm_config(content))
    assert not is_named_config(vllm_config(content | {"rope_parameters": {"rope_type": "default"}}))
    nested = {"full_attention": content["rope_parameters"], "sliding_attention": None}
    assert is_named_config(vllm_config(content | {"rope_parameters": nested}))
    assert not is_named_config(SimpleNamespace(model_config=None))


def test_rows_without_tokens_are_left_out():
    assert chunks_of([0, 3, 3, 4, 4], [10, 0, 7, 0]) == [Chunk(0, 0, 3, 10), Chunk(2, 3, 4, 7)]


def test_a_batch_of_vllm_is_read_as_runs_over_pages(content):
    config, named = vllm_config(content), NamedScaler.read(content)
    metadata = SimpleNamespace(
        num_reqs=2,
        causal=True,
        query_start_loc_cpu=torch.tensor([0, 2, 3, 3], dtype=torch.int32),
        seq_lens=torch.tensor([5, 33, 0], dtype=torch.int32),
        block_table_tensor=torch.tensor([[4, 0], [2, 7], [0, 0]], dtype=torch.int32),
    )
    batch = PagedBatch(PagedRope(named, layout_of(config, named)), *texts_of(metadata), 32)
    pages = torch.zeros(8, 2, 2, 32, 32)
    values = torch.arange(3.0)[:, None, None].expand(3, 2, 32) + 1
    batch.write(torch.ones(3, 2, 32), values, pages)
    written = pages[:, :, 1].amax((1, 3)).nonzero().tolist()  # [page, place]
    assert batch.tokens == 3 and written == [[4, 3], [4, 4], [7, 0]]
    assert [float(pages[block, 0, 1, place, 0]) for block, place in written] == [1, 2, 3]


def test_attention_in_both_directions_is_refused():
    with pytest.raises(rw.UnsupportedModel, match="not causal"):
        texts_of(SimpleNamespace(causal=False))


def test_numba_is_not_loaded_before_the_first_decode_step():
    """vLLM's worker does not start where it is."""
    modules = "ropewalk.engine.vllm_plugin.rotary, ropewalk.engine.attention.paged"
    code = f"import sys, {modules}; sys.exit('numba' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
