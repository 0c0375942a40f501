"""Long-context inference built around RoPE scaling.

    import ropewalk as rw

    print(rw.scalers())                                     # every scaling method
    model = rw.load("smollm2-135m", rope="auto")
    print(model)                                            # what runs it, its scaler and its reach
    print(model.generate("Once upon a time", max_new_tokens=64))
    print(model.chat([{"role": "user", "content": "What is a ropewalk?"}]))
    print(model.score(open("book.txt").read()))             # loss, perplexity, bits per byte
    model.rope = "ntk:4|resonance"                          # another scaler, without loading again
    with model.session() as text:                           # a long text that is read once
        text.append(open("report.txt").read())
        print(text.generate("\\n\\nIn one sentence:").text)
    handle = rw.patch(hf_model, "yarn:4")                   # a transformers model of your own
    handle.undo()
    rw.export("smollm2-135m", "out", rope="yarn:4")         # for vLLM, SGLang, llama.cpp, transformers

Names are imported on first use, so that `import ropewalk` and the command line start without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    AssetError,
    ConfigError,
    ContextOverflow,
    DataError,
    EndpointError,
    OutOfMemory,
    PatchError,
    RopewalkError,
    UnsupportedModel,
)
from .version import __version__

if TYPE_CHECKING:
    from .engine.chat_session import ChatSession
    from .engine.completion import Completion, Score, TokenHealing
    from .engine.exports.export import Export, export
    from .engine.load import load
    from .engine.model import Model
    from .engine.nbce import NBCE
    from .engine.patches.patch import PatchHandle, patch
    from .engine.sampling import SamplingParams
    from .engine.session import Session
    from .engine.token_healing import Healed, heal
    from .evals.tuning.tune import tune
    from .scaling.spec import parse, scalers
    from .tokenizer_tools.windows import windows

_LAZY = {
    "Completion": ".engine.completion",
    "Model": ".engine.model",
    "Score": ".engine.completion",
    "TokenHealing": ".engine.completion",
    "Export": ".engine.exports.export",
    "export": ".engine.exports.export",
    "Healed": ".engine.token_healing",
    "heal": ".engine.token_healing",
    "load": ".engine.load",
    "NBCE": ".engine.nbce",
    "PatchHandle": ".engine.patches.patch",
    "patch": ".engine.patches.patch",
    "SamplingParams": ".engine.sampling",
    "ChatSession": ".engine.chat_session",
    "Session": ".engine.session",
    "parse": ".scaling.spec",
    "scalers": ".scaling.spec",
    "tune": ".evals.tuning.tune",
    "windows": ".tokenizer_tools.windows",
}

__all__ = [
    "NBCE",
    "AssetError",
    "ChatSession",
    "Completion",
    "ConfigError",
    "ContextOverflow",
    "DataError",
    "EndpointError",
    "Export",
    "Healed",
    "Model",
    "OutOfMemory",
    "PatchError",
    "PatchHandle",
    "RopewalkError",
    "SamplingParams",
    "Score",
    "Session",
    "TokenHealing",
    "UnsupportedModel",
    "__version__",
    "evals",
    "export",
    "heal",
    "load",
    "parse",
    "patch",
    "scalers",
    "tune",
    "windows",
]


def __getattr__(name: str) -> Any:
    if name == "evals":
        return importlib.import_module(".evals", __name__)
    if name not in _LAZY:
        raise AttributeError(f"module 'ropewalk' has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name], __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
