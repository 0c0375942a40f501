"""The Triton kernels of a GPU step: in Triton's interpreter, and compiled for GPUs that need not be there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ropewalk.engine.runners.gpu.kernels import UNAVAILABLE

ENGINE_TESTS = Path(__file__).parent.parent
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of a multiprocessor that programs can use, by compute capability."""

pytestmark = pytest.mark.skipif(UNAVAILABLE is not None, reason=str(UNAVAILABLE))


def run(arguments, interpret):
    """Run Python with Triton's interpreter on or off."""
    env = {**os.environ, "TRITON_INTERPRET": str(int(interpret)), "PYTHONPATH": os.pathsep.join(sys.path)}
    env.pop("PYTEST_XDIST_WORKER", None)
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True, check=False)


def test_the_kernels_compute_what_torch_does():
    file = str(Path(__file__).with_name("interpreted_kernels.py"))
    ran = run(["-m", "pytest", "-q", "-p", "no:cacheprovider", file], interpret=True)
    assert ran.returncode == 0 and " passed" in ran.stdout, ran.stdout[-3000:] + ran.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("capability", SHARED_MEMORY)
def test_the_kernels_compile_without_spills(capability):
    ran = run([str(ENGINE_TESTS / "compile_kernels.py"), str(capability)], interpret=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {"add_norm", "heads", "attend", "join", "gate", "int8_linear"}
    for kernel in kernels:
        assert kernel["stack"] == 0, kernel
        programs = 1 if kernel["case"] == "float32" else 2
        assert programs * kernel["shared"] <= SHARED_MEMORY[capability], kernel
        if kernel["kernel"] == "attend" and kernel["case"] in ("plain", "map"):
            assert kernel["wide loads"] > kernel["loads"] / 2, kernel
