"""Runs: folders of result rows, the cells that are measured, comparison and merging."""
