"""Keep transformers and the hub client quiet for the length of one call, and put all back after."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no log lines inside the block; the caller's settings are restored."""
    import huggingface_hub.utils
    import transformers.utils.logging

    logging: Any = transformers.utils.logging
    hub: Any = huggingface_hub.utils
    verbosity = logging.get_verbosity()
    bars, no_hub_bars = logging.is_progress_bar_enabled(), hub.are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
        (hub.disable_progress_bars if no_hub_bars else hub.enable_progress_bars)()
