"""Models written for other software."""
