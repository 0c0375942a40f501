"""The protocols of perplexity, and the cells that measure them."""
