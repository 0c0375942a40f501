"""The entry point of the group `vllm.general_plugins`. vLLM calls it in every process, perhaps several times."""

from __future__ import annotations

_BACKEND = "ropewalk.engine.vllm_plugin.backend.RopewalkCPUBackend"


def register() -> None:
    """Let vLLM read configs that name a scaler. Models with other configs run as without the plug-in."""
    from .rotary import install

    if not install():
        return
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, _BACKEND)
