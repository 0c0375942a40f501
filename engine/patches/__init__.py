"""Scalers put into transformers models, and taken out again."""
