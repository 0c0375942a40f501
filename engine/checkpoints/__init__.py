"""A model's files: where they are, and how they are read as data.

`source.py` finds a model by its name, `hub.py` and `archive.py` download it. `config.py` and `checkpoint.py` read a
Hugging Face folder. `gguf_conversion.py` makes such a folder for a GGUF file; `gguf_config.py`, `gguf_tokenizer.py` and
`gguf_weights.py` read its parts.
"""
