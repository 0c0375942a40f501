"""Puts scalers into transformers models, and takes them out again."""
