"""The models that the harness measures: local, served, functions and stand-ins."""
