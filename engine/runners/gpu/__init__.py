"""The engine on a GPU: its operations, as tensor operations and as Triton kernels."""
