"""The choice of a runner: int8 and bfloat16, refusals with their reasons, and wrong descriptions of families."""

import contextlib
import copy
import dataclasses
import io
import os
import re
import subprocess
import sys

import numba
import pytest
import torch
from decoders import DECODERS, IDS, compiled, difference, in_bfloat16, in_chunks, noisy, read
from families import FAMILIES, build
from prepared import python
from torch import nn

from ropewalk.engine.model import Model
from ropewalk.engine.runners import family as families
from ropewalk.engine.runners.choose import RunnerOptions
from ropewalk.engine.runners.cpu import threads
from ropewalk.engine.runners.cpu.runner import CompiledRunner
from ropewalk.engine.runners.cpu.tables import StoredLinear
from ropewalk.engine.runners.decoder_runner import MAX_STEP_TOKENS
from ropewalk.engine.runners.family import Family, LinearLayer
from ropewalk.engine.runners.transformers import TransformersRunner
from ropewalk.errors import ConfigError, UnsupportedModel

pytestmark = pytest.mark.usefixtures("freed_memory_is_overwritten")
CHUNKS = ([1000], [1], [MAX_STEP_TOKENS + 4, 2])


# Kinds of weights


def test_int8_rows_are_within_half_a_step_of_their_own():
    weight = torch.randn(7, 48, generator=torch.manual_seed(0)) * torch.logspace(-3, 3, 7)[:, None]
    weight[3] = 0
    stored = StoredLinear.rounded_to_int8(LinearLayer(weight, None))
    assert stored.weight.dtype == torch.int8 and stored.bias is None
    assert torch.allclose(stored.scale, weight.abs().amax(1) / 127, rtol=1e-6, atol=1e-29)
    error = (stored.weight.double() * stored.scale.double()[:, None] - weight.double()).abs()
    assert (error <= 0.5001 * stored.scale[:, None]).all()
    assert (stored.weight.abs().amax(1)[weight.abs().amax(1) > 0] == 127).all()
    assert (stored.weight[3] == 0).all()


@pytest.mark.parametrize("name", ["llama", "gemma2", "phi3"])
def test_int8_weights_are_the_model_with_those_weights(name):
    """All linear layers and the head are rounded, for steps and for chunks. The embedding is not, tied or not."""
    hf = DECODERS[name]()
    runner = compiled(hf, weights="int8", cache="float32")
    expected = read(hf)
    rounded = copy.deepcopy(hf)
    rounded.set_output_embeddings(copy.deepcopy(rounded.get_output_embeddings()))
    for module in rounded.modules():
        if isinstance(module, nn.Linear):
            stored = StoredLinear.rounded_to_int8(LinearLayer(module.weight.detach(), None))
            module.weight = nn.Parameter(stored.weight * stored.scale[:, None])
    for sizes in CHUNKS:
        logits = in_chunks(runner, sizes)
        assert difference(logits, read(rounded)) < 5e-5
        assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.2


def test_bfloat16_weights_are_widened_exactly():
    hf = in_bfloat16(DECODERS["llama"]())
    exact = compiled(hf, cache="float32")
    assert exact.new_cache(1).layers[0].keys.dtype == torch.float32
    narrow = compiled(hf)
    assert narrow.new_cache(1).layers[0].keys.dtype == torch.bfloat16
    expected = read(copy.deepcopy(hf).float())
    for sizes in CHUNKS:
        assert difference(in_chunks(exact, sizes), expected) < 2e-5
        logits = in_chunks(narrow, sizes)
        assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("name", DECODERS)
def test_bfloat16_models_are_compared_with_float32_arithmetic(name):
    """So the result of the check is the same on every CPU, whatever its 16-bit arithmetic."""
    hf = noisy(DECODERS[name]())
    exact = read(copy.deepcopy(hf).float())
    assert difference(read(hf), exact) > 3e-2
    runner = compiled(hf, cache="float32")
    for sizes in CHUNKS:
        assert difference(in_chunks(runner, sizes), exact) < 2e-5


def test_an_error_of_a_thousandth_is_refused_in_bfloat16(monkeypatch):
    def slightly_wrong(hf):
        right = families.decoder(hf)
        return dataclasses.replace(right, final_norm=right.final_norm * 1.001)

    monkeypatch.setattr("ropewalk.engine.runners.cpu.runner.decoder", slightly_wrong)
    with pytest.raises(UnsupportedModel, match=r"its logits differ by 0.001 of their size"):
        compiled(in_bfloat16(DECODERS["llama"]()))


def test_an_int8_cache_is_close_to_a_float32_one():
    hf = DECODERS["llama"]()
    runner, expected = compiled(hf, cache="int8"), read(hf)
    for sizes in CHUNKS:
        logits = in_chunks(runner, sizes)
        assert 1e-4 < (logits - expected).norm() / expected.norm() < 0.1
    rows = [(IDS[0, n : n + 2].tolist(), runner.new_cache(1)) for n in (20, 33)]
    for (_, cache), count in zip(rows, (20, 33), strict=True):
        runner.forward(IDS[0, :count].tolist(), cache, 1)
    alone = torch.cat([runner.step([(ids, cache.fork())]) for ids, cache in rows])
    assert torch.equal(runner.step(rows), alone)


@pytest.mark.parametrize("options", [{}, {"weights": "int8", "cache": "float32"}])
def test_chunks_run_without_inference_mode(options):
    """An earlier call in inference mode may have made the buffer for widened weights."""
    hf = DECODERS["llama"]()
    runner = compiled(hf if options else in_bfloat16(hf), **options)
    expected = in_chunks(runner, [40])
    ids, cache = IDS[0, :40].tolist(), runner.new_cache(1)
    assert torch.equal(runner.forward(ids, cache, 40), expected[:40])


# Settings


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compile": "yes"}, "compile 'yes' is none of"),
        ({"compile": 0}, "compile 0 is none of"),
        ({"compile": 1}, "compile 1 is none of"),
        ({"cache": "float16"}, "unknown kv_dtype 'float16'"),
        ({"compile": False, "weights": "int8"}, "need the compiled kernels"),
        ({"compile": False, "cache": "bfloat16"}, "need the compiled kernels"),
    ],
)
def test_settings_that_do_not_fit_are_errors(options, message):
    with pytest.raises(ConfigError, match=message):
        RunnerOptions(**options)


def model(hf, **options):
    return Model(hf, None, name="small", options=RunnerOptions(**options))


def test_auto_compiles_what_it_can_and_says_so():
    for options in ({}, {"compile": True}):
        served = model(DECODERS["llama"](), **options)
        assert type(served._runner) is CompiledRunner and served._runner.is_compiled
        assert "compiled steps" in served.describe()
        assert "weights in float32, cache in float32" in served.describe()
    assert "weights in int8" in model(DECODERS["llama"](), weights="int8").describe()
    plain = model(DECODERS["llama"](), compile=False)
    assert type(plain._runner) is TransformersRunner and "not the compiled kernels" not in plain.describe()


def test_a_numba_that_cannot_be_imported_is_a_reason(tmp_path, tiny_folder):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('Numba needs NumPy 1.9 or less')")
    (tmp_path / "script.py").write_text(f"import ropewalk as rw; print(rw.load({str(tiny_folder)!r}).describe())")
    run = python(tmp_path / "script.py")  # its folder is the first where Python looks for modules
    reason = "not the compiled kernels: numba cannot be imported: Numba needs NumPy 1.9 or less"
    assert reason in run.stdout, run.stderr


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_is_told_that_kernels_are_compiled_once(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_this_place").mkdir()  # numba makes it when it reads the sources
    monkeypatch.setattr("ropewalk.engine.runners.choose.FOLDER", tmp_path)
    said = []
    for _ in range(2):
        monkeypatch.setattr(sys, "stderr", Terminal())
        model(DECODERS["llama"]())
        said.append("compiling kernels for this machine, once" in sys.stderr.getvalue())
        (tmp_path / "kernels_of_this_place" / "step.nbi").touch()
    assert said == [True, False]


class Adapted(nn.Linear):
    """A freshly made adapter."""


def adapted(where):
    hf = DECODERS["llama"]()
    owner = hf if where == "head" else hf.model.layers[1].self_attn
    name = "lm_head" if where == "head" else "v_proj"
    old = getattr(owner, name)
    new = Adapted(old.in_features, old.out_features, bias=old.bias is not None)
    new.load_state_dict(old.state_dict())
    setattr(owner, name, new)
    return hf


def float64_head():
    hf = DECODERS["llama"]()
    hf.lm_head.double()
    hf.lm_head.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    return hf


def resized(**sizes):
    return build("llama", sizes)


REFUSED = {
    "unknown family": (FAMILIES["granite"], "the family 'granite' is not described"),
    "odd hidden size": (lambda: resized(hidden_size=72, head_dim=16), "a multiple of 16, and 72"),
    "odd intermediate size": (lambda: resized(intermediate_size=100), "a multiple of 16, and 100"),
    "odd head": (lambda: resized(head_dim=24), "a multiple of 16, and 24"),
    "adapter": (lambda: adapted("layer"), "Adapted is not a plain linear layer"),
    "adapted head": (lambda: adapted("head"), "Adapted is not a plain linear layer"),
    "other activation": (lambda: resized(hidden_act="relu"), "the activation 'relu' has no compiled form"),
    "other activation by its other name": (
        lambda: build("gemma2", {"hidden_activation": "gelu"}),
        "the activation 'gelu' has no compiled form",
    ),
    "float64": (lambda: DECODERS["llama"]().double(), "float32 or bfloat16, not torch.float64"),
    "head in float64": (float64_head, "weights in float64 have no compiled form"),
}


@pytest.mark.parametrize(("build_model", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_compiled_is_refused_or_run_by_its_own_modules(build_model, message):
    hf = build_model()
    with pytest.raises(UnsupportedModel, match=f"the compiled kernels cannot run this model: .*{message}"):
        model(hf, compile=True)
    with pytest.raises(UnsupportedModel, match=message):
        model(hf, weights="int8")
    warns = contextlib.nullcontext() if "family" in message else pytest.warns(UserWarning, match=message)
    with warns as told, torch.inference_mode():
        served = model(hf)
        assert type(served._runner) is TransformersRunner
        logits = served._runner.forward(IDS[0].tolist(), served.new_cache(1), 3)
    assert told is None or told[0].filename == model.__code__.co_filename
    assert difference(logits, read(hf)[-3:]) < 2e-5
    assert re.search(f"not the compiled kernels: .*{message}", served.describe())


# Families


def described(**changes):
    return dataclasses.replace(Family(), **changes)


WRONG = {
    "norms add one": ("llama", described(norm_adds_one=True)),
    "norms do not add one": ("gemma", described()),
    "no norm of the heads": ("qwen3", described()),
    "norm over all heads": ("qwen3", described(query_key_norm="whole")),
    "no norm after": ("gemma2", described(norm_adds_one=True)),
    "one norm after": (
        "gemma2",
        described(
            norms=("input_layernorm", None, "pre_feedforward_layernorm", "post_feedforward_layernorm"),
            norm_adds_one=True,
        ),
    ),
    "norms the other way round": (
        "llama",
        described(norms=("post_attention_layernorm", None, "input_layernorm", None)),
    ),
    "norms that are missing": ("llama", described(norms=families.FAMILIES["gemma2"].norms)),
    "fused": ("llama", described(fused=True)),
}


@pytest.mark.parametrize("cast", [lambda hf: hf, in_bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("name", "wrong"), WRONG.values(), ids=WRONG)
def test_a_family_that_is_described_wrongly_is_refused(monkeypatch, name, wrong, cast):
    hf = cast(DECODERS[name]())
    compiled(hf)
    monkeypatch.setitem(families.FAMILIES, hf.config.model_type, wrong)
    with pytest.raises(UnsupportedModel, match=r"family's description|does not have the modules of the family"):
        compiled(hf)


WAITING = """
import time, torch
torch.set_num_threads(2)
from ropewalk.engine.runners.cpu.kernels import touch
from ropewalk.engine.runners.cpu.threads import share_threads
share_threads()
spent = []
for _ in range(9):
    touch(2)
    before = time.process_time()
    time.sleep(0.05)
    spent.append(time.process_time() - before)
print(sorted(spent)[4])
"""


@pytest.mark.skipif(sys.platform != "linux" or len(os.sched_getaffinity(0)) < 2, reason="needs GNU OpenMP and two CPUs")
def test_threads_that_wait_do_not_spin():
    """CPU time of a process that sleeps after a kernel. A spinning thread takes 5 ms of it, on a busy machine too."""
    threads = {"OMP_NUM_THREADS": "2", "NUMBA_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **threads}
    seconds = []
    for spin in ({}, {"GOMP_SPINCOUNT": "300000"}):
        run = subprocess.run(
            [sys.executable, "-c", WAITING], env=env | spin, capture_output=True, text=True, check=True
        )
        seconds.append(float(run.stdout))
    assert seconds[1] > 3 * seconds[0], "what a user sets is respected, and is seen here to spin"


def test_the_kernels_use_as_many_threads_as_torch_does_and_leave_it_its_own():
    """The start of numba gives OpenMP, and so torch, a thread for every core. The tests set one thread."""
    runner = compiled(DECODERS["llama"]())
    runner.forward([1], runner.new_cache(8), 1)
    assert (torch.get_num_threads(), numba.get_num_threads()) == (1, 1)
    assert len(threads._sleeping_threads) == 1, "they keep the others from spinning"
