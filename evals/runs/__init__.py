"""Runs: folders of measured cells, which can be compared and merged."""
