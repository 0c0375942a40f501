"""Compiles the kernels of a GPU step without a GPU, as `TritonOps` calls them, and prints what each uses.

Run as a script: python compile_kernels.py CAPABILITY. Every line is a JSON object.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from ropewalk.engine.attention.rotation import Layout
from ropewalk.engine.runners.gpu.kernels import ops
from ropewalk.engine.runners.gpu.ops import CacheRows, StepBands, TokenTree

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
ALIGNED = [["tt.divisibility", 16]]
calls: list[tuple] = []


def record(kernel, *arguments, grid, warmup, **options):
    """Takes the place of a launch."""
    calls.append((kernel, arguments, options))


def usage(kernel, arguments, options, capability):
    """Registers, bytes of stack (where spilled registers go) and shared memory; for attention also its loads."""
    signature, constants, aligned = {}, {}, {}

    def describe(value, place, is_constant=False):
        if is_constant or value is None:
            constants[place] = value
            return "constexpr"
        if isinstance(value, tuple):
            return tuple(describe(one, (*place, index)) for index, one in enumerate(value))
        if isinstance(value, torch.Tensor):
            aligned[place] = ALIGNED
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0:
            aligned[place] = ALIGNED
        return "i32"

    for index, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
        signature[parameter.name] = describe(value, (index,), parameter.is_constexpr)
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", dump(compiled.asm["cubin"], "-res-usage")).groups()
    found = {
        "kernel": kernel.__name__,
        "registers": int(registers),
        "stack": int(stack),
        "shared": compiled.metadata.shared,
    }
    if kernel.__name__ == "attend":
        code = dump(compiled.asm["cubin"], "-sass")  # over a second
        found |= {"wide loads": len(re.findall(r"LDG\S*\.128", code)), "loads": len(re.findall(r"LDG", code))}
    return found


def dump(cubin, flag):
    """What cuobjdump says of machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / "cuobjdump", flag, file.name], capture_output=True, text=True, check=True).stdout


def empty(*size, dtype=torch.float32):
    return torch.empty(size, dtype=dtype, device="meta")


def run(step, dtype, cache, N, H, K, D, E, inner, layout, bands, softcap=None, tree=False, norms=None):
    """Call the operations on tensors without numbers."""
    numbers = {"dtype": cache, "heads": K}
    layer = SimpleNamespace(shape=SimpleNamespace(**numbers), capacity=131072)
    rows = CacheRows(layers=[layer] * N, addresses=empty(N, 2, 3, dtype=torch.int64), slots=empty(N, dtype=torch.int64))
    half = layout.dim // 2
    shifts = (empty(131072, 2, half), *[None] * (bands - 1)) if bands > 1 else (None,)
    at = StepBands(
        queries=empty(bands, N, 2, half),
        edges=empty(N, bands, 2, dtype=torch.int32),
        scales=empty(N),
        shifts=shifts,
    )
    paths = TokenTree(start=1000, ancestors=empty(N, 3, dtype=torch.int32)) if tree else None
    step.add_norm(empty(N, E), empty(N, E, dtype=dtype), empty(E) if norms else None, empty(E), 1e-6, dtype)
    weights = {None: (None, None), "heads": (empty(D), empty(D)), "whole": (empty(H * D), empty(K * D))}[norms]
    qkv = empty(N, (H + 2 * K) * D, dtype=dtype)
    q = step.heads(qkv, H, K, *weights, norms == "whole", 1e-6, empty(N, 2, half), layout, rows)
    step.attention(q, rows, at, layout, softcap, paths)
    step.int8_linear(empty(N, E, dtype=dtype), empty(inner, E, dtype=torch.int8), empty(inner))
    step.gate(empty(N, 2 * inner, dtype=dtype), "gelu_tanh" if softcap else "silu")


def main():
    JITFunction.run = record
    ops._processors = lambda device: 132
    step, half = ops.TritonOps(), torch.bfloat16
    llama = {"N": 1, "H": 32, "K": 8, "D": 128, "E": 4096, "inner": 14336, "layout": Layout(0, 128, False)}
    cases = {
        "plain": {"dtype": half, "cache": half, "bands": 1},
        "map": {"dtype": half, "cache": half, "bands": 2, "norms": "heads"},
        "int8 map": {"dtype": half, "cache": torch.int8, "bands": 3, "norms": "whole"},
        "tree": {"dtype": half, "cache": half, "bands": 2, "tree": True, "N": 8},
        "wide heads": {
            "dtype": half,
            "cache": half,
            "bands": 2,
            "softcap": 50.0,
            "H": 8,
            "K": 4,
            "D": 256,
            "layout": Layout(0, 256, False),
            "norms": "heads",
        },
        "float32": {"dtype": torch.float32, "cache": torch.float32, "bands": 2},
        "neighbours": {"dtype": half, "cache": half, "bands": 2, "layout": Layout(0, 64, True)},
    }
    for name, case in cases.items():
        calls.clear()
        run(step, **(llama | case))
        for call in calls:
            print(json.dumps({"case": name, **usage(*call, int(sys.argv[1]))}), flush=True)


if __name__ == "__main__":
    main()
