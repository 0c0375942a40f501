"""transformers at work: without a word, and in one thread at a time."""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Iterator

__all__ = ["quiet_transformers"]

# While it makes a model transformers patches torch for the whole process: another thread's model would lack weights.
_TURN = threading.RLock()


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars, warnings or retry notices from transformers and the hub meanwhile: our errors say what matters.

    Threads take turns, since transformers and its settings are the process's.
    """
    from transformers.utils import logging as settings

    hub = logging.getLogger("huggingface_hub")
    with _TURN, warnings.catch_warnings():
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
