"""Speed and memory: comparisons with other engines, and the cost of position maps."""
