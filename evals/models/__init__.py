"""The models that can be measured: local and served models, functions, and fake models for tests."""
