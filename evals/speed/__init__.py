"""Speed and memory: of position maps, and beside other engines."""
