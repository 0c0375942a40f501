"""Calls of transformers that print nothing, in one thread at a time."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

__all__ = ["quiet_transformers"]

# transformers patches torch for the whole process while it builds a model: another thread's model would lack weights.
_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch off progress bars, warnings and retry notices of transformers and the hub; our errors say what matters.

    Only one thread at a time is inside, because the settings of transformers hold for the whole process.
    """
    from transformers.utils import logging as settings

    hub = logging.getLogger("huggingface_hub")
    with _LOCK, warnings.catch_warnings():
        level, hub_level, bars = settings.get_verbosity(), hub.level, settings.is_progress_bar_enabled()
        warnings.simplefilter("ignore")
        hub.setLevel(logging.ERROR)
        settings.set_verbosity_error()
        settings.disable_progress_bar()
        try:
            yield
        finally:
            hub.setLevel(hub_level)
            settings.set_verbosity(level)
            if bars:
                settings.enable_progress_bar()
