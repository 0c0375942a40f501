"""The runner of the compiled kernels, for the CPU."""
