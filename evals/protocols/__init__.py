"""Perplexity protocols, and the cells that measure them."""
