"""What runs tokens on top of a cache: the model's own modules, or compiled kernels."""
