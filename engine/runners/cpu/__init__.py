"""A network of our own on the CPU."""
