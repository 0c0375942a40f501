"""Runners: they run tokens on top of a cache, by the model's own modules or by compiled kernels."""
