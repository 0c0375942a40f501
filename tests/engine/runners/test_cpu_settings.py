"""The compiled kernels on older CPUs: runs some tests again with fewer instructions than this CPU has.

A CPU with AVX512-BF16 and one with AVX2 only round products differently, so a test may fail on only one of them. On a
newer CPU, these tests cover both.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ropewalk as rw

ENGINE_TESTS = Path(__file__).parent.parent
AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+f16c,+bmi2",
}
TESTS = (
    "runners/test_compiled.py",
    "patches/test_float32.py",
    "runners/test_compiled_settings.py::test_bfloat16_models_are_compared_with_float32_arithmetic",
    "runners/test_compiled_settings.py::test_bfloat16_weights_are_widened_exactly",
    "runners/test_cpu_settings.py::test_the_engine_runs_smollm2",
)

pytestmark = pytest.mark.slow


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() == "AVX2", reason="this CPU is such a one")
def test_the_engine_passes_its_tests_with_avx2():
    env = {**os.environ, **AVX2, "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("PYTEST_XDIST_WORKER", None)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *(str(ENGINE_TESTS / name) for name in TESTS),
    ]
    ran = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.model
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "int8"])
def test_the_engine_runs_smollm2(dtype):
    assert "compiled steps" in rw.load("smollm2-135m", dtype=dtype).describe()
