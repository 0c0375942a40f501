"""The models that can be measured: local models, served models, functions, and fake models for
tests."""
