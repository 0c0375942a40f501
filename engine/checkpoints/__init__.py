"""A model's files: where they are, and how they are read as data.

`source.py` finds a model by its name, `hub.py` and `archive.py` download it. `config.py` and `checkpoint.py` read a
Hugging Face folder. `gguf_conversion.py` converts a GGUF file to such a folder, and `gguf_tokenizer.py` reads its
tokenizer.
"""
