"""What is measured: a model in this process, one that is served elsewhere, or a stand-in."""
