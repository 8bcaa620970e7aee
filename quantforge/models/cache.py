"""Under which names a decoder takes and returns its key-value cache.

transformers says `cache` from 5.24 on; before, and in networks that bring their own code, it is
`past_key_values`.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values")


def cache_arguments(module: nn.Module, cache: Any) -> dict[str, Any]:
    """Arguments with which `module` reads `cache` and adds to it; None makes a new one."""
    known = inspect.signature(module.forward).parameters
    name = next((name for name in NAMES if name in known), NAMES[-1])
    return {name: cache, "use_cache": True}


def cache_of(output: Any) -> Any:
    """The cache in what a decoder returned.

    Raises:
        AttributeError: there is none.
    """
    return output.cache if hasattr(output, "cache") else output.past_key_values
