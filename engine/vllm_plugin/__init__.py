"""The plug-in by which vLLM serves a model under any scaler whose frequencies do not follow the text.

vLLM keeps its scheduler, its paged cache, batches and the distribution over processes. `register.py` is the entry
point. A config that names a scaler (`scaling/named_scaler.py`) gets a rotary embedding that leaves queries and keys as
they are (`rotary.py`), and attention that rotates them (`backend.py`). `vllm_objects.py` refuses what was not verified.
"""
