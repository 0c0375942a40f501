"""Runs: cells that are measured once, kept in a folder, compared and merged."""
